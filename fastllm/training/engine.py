"""What computes a training step: one process, or several that divide it among them.

However many there are, `batch_size` is what all of them together take at once, and the loss is the
mean over the tokens that the whole step predicts. So the number of processes changes what a run
computes by no more than rounding, but for dropout, whose masks are drawn by each process.
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
from fastllm.ops.linear_cross_entropy import linear_cross_entropy
from fastllm.ops.parameters import Linear
from fastllm.optim import Adam, AdamW
from fastllm.training.checkpoint import Progress, load_training_state
from fastllm.training.config import TrainConfig
from fastllm.training.distributed import SINGLE, ProcessError, ProcessGroup, check_batch_size


class Engine:
    """Trains in this process alone; the base of what trains in several.

    Args:
        config: the settings of the run.
        model: on its device.
        group: who trains together.

    Attributes:
        model: the part of it whose parameters this process holds.
        optimizers: of these parameters.
        data_group: the processes that share the sequences of a batch out among them.
        in_step: whether all processes must compute the loss of a batch equally often.
        caveat: what keeps some of the operations from running, to go behind their names.
    """

    in_step = False
    caveat = ""
    clips_in_optimizer = True

    def __init__(
        self, config: TrainConfig, model: DecoderModel, group: ProcessGroup = SINGLE
    ) -> None:
        self.config = config
        self.group = self.data_group = group
        self.device = next(model.parameters()).device
        self.model = model
        self._divide()
        self.optimizers = make_optimizers(self.model, config, self.clips_in_optimizer)
        # fp16 knows no gradient below 6e-8; elsewhere this does nothing.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")

    def _divide(self) -> None:
        """Gives this process its part of the model."""

    def loss(self, ids: Tensor) -> Tensor:
        """Mean loss of sequences [B, S]; in several processes, of this one's."""
        return self.model.loss(ids, ids)

    def backward(self, ids: Tensor, weight: float, last: bool) -> float:
        """Adds the gradients of the sequences' loss times `weight` to those there are.

        Args:
            ids: [B, S], this process's sequences; there may be none.
            weight: this process's part of what the step predicts.
            last: whether an update follows.

        Returns:
            Loss times `weight`.
        """
        if not weight:
            return 0.0
        with autocast(self.device.type, self.config.precision):
            loss = self.loss(ids)
        if weight != 1:
            loss = loss * weight
        self.scaler.scale(loss).backward()
        return loss.item()

    def set_learning_rates(self, factor: float) -> None:
        """Multiplies the learning rates of the settings by `factor`."""
        for optimizer in self.optimizers:
            muon = isinstance(optimizer, torch.optim.Muon)
            for group in optimizer.param_groups:
                group["lr"] = factor * (self.config.muon_lr if muon else self.config.lr)

    def update(self) -> float | None:
        """The norm of the gradients; None where one overflowed and nothing was changed."""
        norm, scale = 0.0, self.scaler.get_scale()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        if self.config.max_grad_norm and not (
            self.clips_in_optimizer and len(self.optimizers) == 1
        ):
            norm = self.clip()
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)  # unless a gradient overflowed
            if isinstance(optimizer, Adam) and optimizer.grad_norm is not None:
                norm = optimizer.grad_norm
        self.zero_grad()
        self.scaler.update()
        return norm if self.scaler.get_scale() >= scale else None

    def clip(self) -> float:
        """Clips the gradients of the whole model; returns their norm before."""
        return float(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm))

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def whole_model(self) -> DecoderModel | None:
        """The model with all weights, to generate with; None in all processes but the first."""
        return self.model if self.group.is_main else None

    def load(self, checkpoint: Path) -> Progress:
        """Fills the optimizers from a checkpoint, as `load_training_state` does."""
        return load_training_state(checkpoint, self.model, self.optimizers, self.group)

    def to_save(self) -> tuple[DecoderModel, list[torch.optim.Optimizer]]:
        """What this process adds to a checkpoint: the model and the optimizers, or its parts."""
        return self.model, self.optimizers


class DDP(Engine):
    """Each process has the whole model and a part of the sequences; gradients are added up.

    PyTorch's `DistributedDataParallel` does that, bucket by bucket while the backward goes on. Of a
    small model all gradients come at its end, from one operation.
    """

    def _divide(self) -> None:
        check_batch_size(self.config.batch_size, self.group.size)
        with warnings.catch_warnings():
            # Later versions of PyTorch have another name for it, which earlier ones do not know.
            warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
            self._wrapped = nn.parallel.DistributedDataParallel(
                LossOf(self.model), broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def loss(self, ids: Tensor) -> Tensor:
        return self._wrapped(ids) if torch.is_grad_enabled() else self.model.loss(ids, ids)

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients stay in this process, unless it is the last batch of a step."""
        return contextlib.nullcontext() if last else self._wrapped.no_sync()

    def backward(self, ids: Tensor, weight: float, last: bool) -> float:
        # A process with nothing to predict takes part all the same: the others wait for it.
        ids = ids if weight else something_to_predict(ids, self.model)
        with self.accumulating(last):
            with autocast(self.device.type, self.config.precision):
                loss = self.loss(ids)
            factor = weight * self.group.size  # PyTorch averages over the processes
            self.scaler.scale(loss if factor == 1 else loss * factor).backward()
        return loss.item() * weight


class FSDP(DDP):
    """As `DDP`, while each process keeps a part of every weight, gradient and moment.

    PyTorch's `fully_shard` brings a block's weights together where they are needed.
    """

    in_step = True
    clips_in_optimizer = False

    def _divide(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        check_batch_size(self.config.batch_size, self.group.size)
        if self.config.precision == "fp16":
            raise ProcessError("fsdp does not scale losses for fp16; use bf16")
        if self.config.optimizer == "muon":
            raise ProcessError("muon needs whole matrices, which fsdp divides; use ddp or adamw")
        mesh = init_device_mesh(self.device.type, (self.group.size,))
        for block in self.model.transformer_blocks:
            fully_shard(block, mesh=mesh)
        # Not the model itself: it would be one of another class, and its head not be fused.
        self._wrapped: Any = fully_shard(LossOf(self.model), mesh=mesh)

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
        return rebuilt(whole, self) if whole else None


class Pipeline(Engine):
    """Each process has some of the layers; a batch goes through them in pieces.

    The first process embeds, the last has the head and the loss. PyTorch's `Schedule1F1B` has a
    process compute the backward of one piece while the others are at the forward of later ones.
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
                "pipeline cannot tie the embeddings to the head, which are in different processes; "
                "use ddp or fsdp"
            )
        if config.precision == "fp16":
            raise ProcessError("pipeline does not scale losses for fp16; use bf16")
        here = group.shard(range(count))
        for i in range(count):
            if i not in here:
                model.transformer_blocks[i] = Elsewhere()
        self._is_last = group.rank == group.size - 1
        if not group.is_main:
            model.embedding_layer = Elsewhere()  # type: ignore[assignment]
        if not self._is_last:
            model.final_norm = None
            model.lm_head = Elsewhere()  # type: ignore[assignment]
        self.data_group = SINGLE  # every process takes all sequences
        # Every process is at work on one piece while count - 1 others are on their way.
        pieces = min(
            range(group.size, 4 * group.size + 1),
            key=lambda n: (n + group.size - 1) * math.ceil(config.batch_size / n),
        )
        shape = (math.ceil(config.batch_size / pieces), config.max_seq_len)
        self._rows = pieces * shape[0]
        x = torch.empty(*shape, config.hidden_size, device="meta", requires_grad=True)
        stage = PipelineStage(
            HiddenStatesOf(model, config.precision),
            group.rank,
            group.size,
            self.device,
            input_args=torch.empty_like(x[..., 0], dtype=torch.long) if group.is_main else x,
            output_args=x,
        )
        self._schedule = Schedule1F1B(stage, pieces, self._piece_loss, scale_grads=False)

    def loss(self, ids: Tensor) -> Tensor:
        (loss,) = self.group.all_reduce(self._run(self._schedule.eval, ids, 1.0))
        return torch.tensor(loss)

    def backward(self, ids: Tensor, weight: float, last: bool) -> float:
        return self._run(self._schedule.step, ids, weight)

    def _run(self, schedule: Callable[..., Any], ids: Tensor, weight: float) -> float:
        """The weighted loss in the last process, 0 in the others."""
        self._scale = weight / max(1, int((self.model.targets(ids) != -100).sum()))
        missing = self._rows - len(ids)
        ids = nn.functional.pad(ids, (0, 0, 0, missing), value=self.model.padding_idx)
        losses: list[Tensor] = []
        schedule(*([ids] if self.group.is_main else []), target=ids, losses=losses)
        return sum(loss.item() for loss in losses)

    def _piece_loss(self, x: Tensor, ids: Tensor) -> Tensor:
        targets = nn.functional.pad(self.model.targets(ids), (0, 1), value=-100)
        predicted = int((targets != -100).sum())
        if not predicted:  # the mean of nothing is not a number
            return x.sum() * 0
        head = Linear(self.model.lm_head.weight, self.model.lm_head.bias)
        with autocast(self.device.type, self.config.precision):
            return linear_cross_entropy(x, head, targets) * (predicted * self._scale)

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
        return rebuilt({k: v for part in parts for k, v in part.items()}, self)


class LossOf(nn.Module):
    """A model whose forward is its loss: what PyTorch's wrappers of a whole training step take."""

    def __init__(self, model: DecoderModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model.loss(ids, ids)


class HiddenStatesOf(nn.Module):
    """A part of a model, from its input to what the next part takes."""

    def __init__(self, model: DecoderModel, precision: str) -> None:
        super().__init__()
        self.model = model
        self.precision = precision

    def forward(self, x: Tensor) -> Tensor:
        with autocast(x.device.type, self.precision):
            return self.model.hidden_states(x)


class Elsewhere(nn.Module):
    """Stands for a part of the model that another process has."""

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        return x


def rebuilt(weights: dict[str, Tensor], engine: Engine) -> DecoderModel:
    """A whole model of the engine's settings with these weights."""
    padding_idx = engine.model.padding_idx
    model = engine.config.build_model(engine.model.vocab_size, padding_idx)
    model.load_state_dict(weights)
    return model.to(engine.device)


def something_to_predict(ids: Tensor, model: DecoderModel) -> Tensor:
    """A sequence [1, S] whose loss is a number."""
    return ids.new_full((1, ids.size(1)), int(model.padding_idx == 0))


def make_optimizers(
    model: DecoderModel, config: TrainConfig, clip: bool = True
) -> list[torch.optim.Optimizer]:
    """The optimizers of a run. Vectors (biases, norms) and embeddings get no weight decay.

    Embeddings that are tied to the head decay as its matrix does, like GPT-2's in nanoGPT.

    Args:
        clip: Adam clips the gradients, where it alone updates all of them.
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
        # Muon's matrices count for the common norm as well, so the engine clips for both.
        max_grad_norm=config.max_grad_norm or None if clip and not muon else None,
    )
    if not muon:
        return [adam]
    return [torch.optim.Muon(matrices, config.muon_lr, config.weight_decay), adam]
