"""Engines compute training steps: in one process, or divided among several.

`batch_size` counts the sequences of all processes together, and the loss is the mean over the
tokens that the whole step predicts. So the number of processes changes the results of a run only by
rounding, and by dropout, whose masks each process draws for itself.
"""

import contextlib
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastllm.device import autocast
from fastllm.models.decoder import DecoderModel
from fastllm.ops.decoder import Linear
from fastllm.ops.linear_cross_entropy import linear_cross_entropy
from fastllm.ops.torch_private import multiplies_bf16
from fastllm.optim import Adam, AdamW, Fp32Muon
from fastllm.training.checkpoint import Progress, load_training_state
from fastllm.training.config import ResolvedRun, TrainConfig
from fastllm.training.distributed import SINGLE, ProcessError, ProcessGroup, check_batch_size


class Engine:
    """Trains in this process alone; the base class of the engines for several.

    Args:
        model: on its device.
        group: the processes that train together.

    Attributes:
        model: the model, or the part of it whose parameters this process holds.
        optimizers: of these parameters.
        data_group: the processes among which the sequences of a batch are sharded.
        in_step: whether all processes must compute the loss of a batch equally often.
        caveat: why some fused operations do not run; logged after their names.
    """

    in_step = False
    caveat = ""
    clips_in_optimizer = True

    def __init__(self, run: ResolvedRun, model: DecoderModel, group: ProcessGroup = SINGLE) -> None:
        self.run = run
        self.config = run.config
        self.group = self.data_group = group
        self.device = next(model.parameters()).device
        self.model = model
        self._divide()
        self.optimizers = make_optimizers(self.model, run.config, self.clips_in_optimizer)
        # fp16 underflows below 6e-8; other precisions need no loss scaling.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=run.precision == "fp16")

    def _divide(self) -> None:
        """Prepares this process's part of the model."""

    def loss(self, ids: Tensor) -> Tensor:
        """Mean loss of this process's sequences [B, S]."""
        return self.model.loss(ids, ids)

    def backward(self, ids: Tensor, weight: float, last: bool) -> float:
        """Accumulates the gradients of `weight` times the loss of the sequences.

        Args:
            ids: [B, S], this process's sequences; B may be 0.
            weight: this process's fraction of the tokens that the step predicts.
            last: whether an update follows.

        Returns:
            `weight` times the loss.
        """
        if not weight:
            return 0.0
        with autocast(self.device.type, self.run.precision):
            loss = self.loss(ids)
        if weight != 1:
            loss = loss * weight
        self.scaler.scale(loss).backward()
        return loss.item()

    def set_learning_rates(self, factor: float) -> None:
        """Sets the learning rates to `factor` times those of the settings."""
        for optimizer in self.optimizers:
            muon = isinstance(optimizer, torch.optim.Muon)
            for group in optimizer.param_groups:
                group["lr"] = factor * (self.config.muon_lr if muon else self.config.lr)

    def update(self) -> float | None:
        """Updates the parameters, unless a gradient overflowed in fp16.

        Returns:
            The norm of the gradients before clipping; None if they are not clipped or one
            overflowed.
        """
        norm, scale = None, self.scaler.get_scale()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        if self.config.max_grad_norm and not (
            self.clips_in_optimizer and len(self.optimizers) == 1
        ):
            norm = self.clip()
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)  # skipped if a gradient overflowed
            if isinstance(optimizer, Adam) and optimizer.grad_norm is not None:
                norm = optimizer.grad_norm
        self.zero_grad()
        self.scaler.update()
        return norm if self.scaler.get_scale() >= scale else None

    def clip(self) -> float:
        """Clips the gradients of the whole model; returns their norm before clipping."""
        return float(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm))

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def whole_model(self) -> DecoderModel | None:
        """The model with all weights, to generate with; None on all ranks but 0."""
        return self.model if self.group.is_main else None

    def load(self, checkpoint: Path) -> Progress:
        """Fills the optimizers from a checkpoint, as `load_training_state` does."""
        return load_training_state(checkpoint, self.model, self.optimizers, self.group)

    def to_save(self) -> tuple[DecoderModel, list[torch.optim.Optimizer]]:
        """The model and the optimizers, or this process's parts of them, for a checkpoint."""
        return self.model, self.optimizers


class DDP(Engine):
    """Each process has the whole model and a shard of the sequences; gradients are all-reduced.

    PyTorch's `DistributedDataParallel` does that, bucket by bucket, overlapped with the backward. A
    small model gets all of its gradients from one operation, at the end of the backward.
    """

    def _divide(self) -> None:
        check_batch_size(self.config.batch_size, self.group.size)
        with warnings.catch_warnings():
            # PyTorch 2.9 does not know the successor, forward_sync_buffers.
            warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
            self._wrapped = nn.parallel.DistributedDataParallel(
                LossModule(self.model), broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def loss(self, ids: Tensor) -> Tensor:
        return self._wrapped(ids) if torch.is_grad_enabled() else self.model.loss(ids, ids)

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Keeps gradients in this process, except for the last batch of a step."""
        return contextlib.nullcontext() if last else self._wrapped.no_sync()

    def backward(self, ids: Tensor, weight: float, last: bool) -> float:
        # A process with nothing to predict must take part too: the others wait for it.
        ids = ids if weight else dummy_sequence(ids, self.model)
        with self.accumulating(last):
            with autocast(self.device.type, self.run.precision):
                loss = self.loss(ids)
            factor = weight * self.group.size  # DDP averages over the processes
            self.scaler.scale(loss if factor == 1 else loss * factor).backward()
        return loss.item() * weight


class FSDP(DDP):
    """Like `DDP`, but each process keeps only a shard of every weight, gradient and moment.

    PyTorch's `fully_shard` gathers the weights of a block when they are needed.
    """

    in_step = True
    clips_in_optimizer = False

    def _divide(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        check_batch_size(self.config.batch_size, self.group.size)
        if self.run.precision == "fp16":
            raise ProcessError("fsdp does not scale losses for fp16; use bf16")
        if self.config.optimizer == "muon":
            raise ProcessError("muon needs whole matrices, which fsdp shards; use ddp or adamw")
        mesh = init_device_mesh(self.device.type, (self.group.size,))
        for block in self.model.transformer_blocks:
            fully_shard(block, mesh=mesh)
        # Not the model itself: fully_shard changes the class of its module, and the fused loss
        # declines subclasses.
        self._wrapped: Any = fully_shard(LossModule(self.model), mesh=mesh)

    def loss(self, ids: Tensor) -> Tensor:
        return self._wrapped(ids)

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager[None]:
        self._wrapped.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    def clip(self) -> float:
        norm: Any = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        return float(norm.full_tensor())

    def whole_model(self) -> DecoderModel | None:
        whole = {}
        for name, tensor in self.model.state_dict().items():
            full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if self.group.is_main:
                whole[name] = full
        return rebuild_model(whole, self) if whole else None


class Pipeline(Engine):
    """Each process has some of the layers; a batch goes through them in microbatches.

    The first rank has the embeddings, the last the head and the loss. PyTorch's `Schedule1F1B`
    alternates forwards and backwards, so that ranks work on different microbatches at once.
    """

    in_step = True
    clips_in_optimizer = False

    def _divide(self) -> None:
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B

        model, group, config = self.model, self.group, self.config
        count = len(model.transformer_blocks)
        if count < group.size:
            raise ProcessError(
                f"{count} layers cannot be divided among {group.size} processes; start fewer"
            )
        if model.tie_word_embeddings:
            raise ProcessError(
                "pipeline cannot tie the embeddings to the head, which are on different ranks; "
                "use ddp or fsdp"
            )
        if self.run.precision == "fp16":
            raise ProcessError("pipeline does not scale losses for fp16; use bf16")
        own = group.shard(range(count))
        for i in range(count):
            if i not in own:
                model.transformer_blocks[i] = IdentityStage()
        self._is_last = group.rank == group.size - 1
        if not group.is_main:
            model.embedding_layer = IdentityStage()  # type: ignore[assignment]
        if not self._is_last:
            model.final_norm = None
            model.lm_head = IdentityStage()  # type: ignore[assignment]
        self.data_group = SINGLE  # every process takes all sequences
        # A batch takes as long as n + size - 1 microbatches: size - 1 fill and drain the pipeline.
        microbatches = min(
            range(group.size, 4 * group.size + 1),
            key=lambda n: (n + group.size - 1) * math.ceil(config.batch_size / n),
        )
        shape = (math.ceil(config.batch_size / microbatches), config.max_seq_len)
        self._rows = microbatches * shape[0]
        x = torch.empty(*shape, config.hidden_size, device="meta", requires_grad=True)
        stage = PipelineStage(
            StageModule(model, self.run.precision),
            group.rank,
            group.size,
            self.device,
            input_args=torch.empty_like(x[..., 0], dtype=torch.long) if group.is_main else x,
            output_args=x,
        )
        self._schedule = Schedule1F1B(stage, microbatches, self._microbatch_loss, scale_grads=False)

    def loss(self, ids: Tensor) -> Tensor:
        (loss,) = self.group.all_reduce(self._run(self._schedule.eval, ids, 1.0))
        return torch.tensor(loss)

    def backward(self, ids: Tensor, weight: float, last: bool) -> float:
        return self._run(self._schedule.step, ids, weight)

    def _run(self, schedule: Callable[..., Any], ids: Tensor, weight: float) -> float:
        """The weighted loss on the last rank, 0 on the others."""
        self._scale = weight / max(1, int((self.model.targets(ids) != -100).sum()))
        missing = self._rows - len(ids)
        ids = nn.functional.pad(ids, (0, 0, 0, missing), value=self.model.padding_idx)
        losses: list[Tensor] = []
        schedule(*([ids] if self.group.is_main else []), target=ids, losses=losses)
        return sum(loss.item() for loss in losses)

    def _microbatch_loss(self, x: Tensor, ids: Tensor) -> Tensor:
        targets = nn.functional.pad(self.model.targets(ids), (0, 1), value=-100)
        predicted = int((targets != -100).sum())
        if not predicted:  # the mean over no tokens is NaN
            return x.sum() * 0
        head = Linear(self.model.lm_head.weight, self.model.lm_head.bias)
        softcap = self.model.config.head_softcap
        with autocast(self.device.type, self.run.precision):
            loss = linear_cross_entropy(x, head, targets, softcap=softcap)
        return loss * (predicted * self._scale)

    def clip(self) -> float:
        parameters = list(self.model.parameters())
        own = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        (squares,) = self.group.all_reduce(float(own) ** 2)
        norm = torch.tensor(squares).sqrt()
        nn.utils.clip_grads_with_norm_(parameters, self.config.max_grad_norm, norm)
        return float(norm)

    def whole_model(self) -> DecoderModel | None:
        parts: list[Any] | None = [None] * self.group.size if self.group.is_main else None
        weights = {name: tensor.cpu() for name, tensor in self.model.state_dict().items()}
        dist.gather_object(weights, parts)
        if parts is None:
            return None
        return rebuild_model({k: v for part in parts for k, v in part.items()}, self)


def choose_engine(config: TrainConfig, group: ProcessGroup) -> type[Engine]:
    """The engine that `config.parallel` names, if there are several processes."""
    if group.size == 1:
        return Engine
    return {"ddp": DDP, "fsdp": FSDP, "pipeline": Pipeline}[config.parallel]


class LossModule(nn.Module):
    """A module whose forward is the model's loss, for PyTorch's wrappers of modules."""

    def __init__(self, model: DecoderModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model.loss(ids, ids)


class StageModule(nn.Module):
    """A stage of the pipeline: from its input to the input of the next stage."""

    def __init__(self, model: DecoderModel, precision: str) -> None:
        super().__init__()
        self.model = model
        self.precision = precision

    def forward(self, x: Tensor) -> Tensor:
        with autocast(x.device.type, self.precision):
            return self.model.hidden_states(x)


class IdentityStage(nn.Module):
    """Takes the place of a part of the model that another rank has."""

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        return x


def rebuild_model(weights: dict[str, Tensor], engine: Engine) -> DecoderModel:
    """A whole model with the engine's settings and these weights."""
    padding_idx = engine.model.padding_idx
    model = engine.config.build_model(engine.model.vocab_size, padding_idx)
    model.load_state_dict(weights)
    return model.to(engine.device)


def dummy_sequence(ids: Tensor, model: DecoderModel) -> Tensor:
    """A sequence [1, S] with a finite loss."""
    return ids.new_full((1, ids.size(1)), int(model.padding_idx == 0))


def make_optimizers(
    model: DecoderModel, config: TrainConfig, clip: bool = True
) -> list[torch.optim.Optimizer]:
    """The optimizers of a run. Vectors (biases, norms) and embeddings get no weight decay.

    Embeddings tied to the head do decay, as its matrix, like GPT-2's in nanoGPT.

    Args:
        clip: let Adam clip the gradients, if it alone updates all of them.
    """
    matrices = [p for p in model.transformer_blocks.parameters() if p.ndim == 2]
    head = [model.lm_head.weight] if isinstance(model.lm_head, nn.Linear) else []
    decayed = [*matrices, *head]
    others = [p for p in model.parameters() if all(p is not d for d in decayed)]
    muon = config.optimizer == "muon"
    optimizer_class = Adam if config.optimizer == "adam" else AdamW
    adam = optimizer_class(
        [
            {"params": head if muon else decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        # The norm covers Muon's matrices as well, so the engine clips for both optimizers.
        max_grad_norm=config.max_grad_norm or None if clip and not muon else None,
    )
    if not muon:
        return [adam]
    on_cpu = all(matrix.is_cpu for matrix in matrices)
    muon_class = Fp32Muon if on_cpu and not multiplies_bf16() else torch.optim.Muon
    return [muon_class(matrices, config.muon_lr, config.weight_decay), adam]
