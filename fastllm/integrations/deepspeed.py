"""Training under DeepSpeed: `python -m fastllm.train --launcher deepspeed --num_workers 2`.

ZeRO shards what every process would otherwise keep: the optimizer's moments (stage 1), the
gradients as well (2), the weights as well (3). Steps, losses and checkpoints are those of any other
run, so a run may continue with DeepSpeed or without it.

Stages 1 and 2 use all fused operations. Stage 3 gathers weights in hooks on every module, and
operations that fuse several modules would bypass these hooks; so only attention, between its
projections, and the optimizer remain fused.
"""

import json
import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fastllm.command import describe_error
from fastllm.device import autocast
from fastllm.models.decoder import DecoderModel
from fastllm.training.checkpoint import Progress, load_training_state
from fastllm.training.config import ResolvedRun, TrainConfig
from fastllm.training.distributed import (
    SINGLE,
    ProcessError,
    ProcessGroup,
    check_batch_size,
)
from fastllm.training.engine import (
    DDP,
    LossModule,
    dummy_sequence,
    make_optimizers,
    rebuild_model,
)

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that it found none
try:
    import deepspeed
except ImportError as error:
    raise ImportError(
        f"--launcher deepspeed needs DeepSpeed ({error}): pip install deepspeed"
    ) from None

# It calls functions that newer versions of PyTorch have renamed.
warnings.filterwarnings("ignore", ".*_tensor` is deprecated", FutureWarning)

# DeepSpeed's settings that flags of train determine, each with its flag.
FLAG_OF_SETTING = {
    "train_batch_size": "--batch_size",
    "train_micro_batch_size_per_gpu": "--batch_size",
    "gradient_accumulation_steps": "--grad_accum",
    "gradient_clipping": "--max_grad_norm",
    "optimizer": "--optimizer",
    "scheduler": "--lr_schedule",
    "fp16": "--precision",
    "bf16": "--precision",
    "torch_autocast": "--precision",
}
# Elements in a message between processes, 20 MB; DeepSpeed's default buffers take gigabytes.
BUCKET = 5_000_000
MOMENTS = ("exp_avg", "exp_avg_sq")


def launch(count: int, arguments: list[str]) -> None:
    """Trains in `count` processes of this command on this machine; exits with their status.

    Raises:
        ProcessError: one of them was killed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import DefaultLogsSpecs, LaunchConfig, elastic_launch

    for part in ("agent.server", "multiprocessing"):  # our own messages are clearer
        logging.getLogger(f"torch.distributed.elastic.{part}.api").setLevel(logging.CRITICAL)
    try:
        with TemporaryDirectory() as logs:
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=count,
                run_id="fastllm",
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",  # any free port
                max_restarts=0,
                monitor_interval=0.1,
                logs_specs=DefaultLogsSpecs(log_dir=logs),
            )
            elastic_launch(config, sys.executable)("-m", "fastllm.train", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            raise ProcessError(
                f"process {rank} was killed by {name}; --resume continues from the last checkpoint"
            ) from None
        raise SystemExit(failure.exitcode) from None  # that process has printed why
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None


def write_settings(config: TrainConfig, run_dir: Path) -> None:
    """Writes deepspeed.json into the run's folder, unless it exists or another file is given."""
    file = run_dir / "deepspeed.json"
    if config.deepspeed_config is None and not file.exists():
        stage = config.zero_stage or 1
        zero: dict[str, Any] = {
            "stage": stage,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            "overlap_comm": False,
        }
        if config.offload:
            zero["offload_optimizer"] = {"device": config.offload}
            if stage == 3:
                zero["offload_param"] = {"device": config.offload}
        file.write_text(json.dumps({"zero_optimization": zero}, indent=2) + "\n", encoding="utf-8")


def read_settings(config: TrainConfig, file: Path) -> dict[str, Any]:
    """DeepSpeed's settings from a file.

    Raises:
        ValueError: they contradict the run's settings.
        OSError: there is no such file.
    """
    try:
        settings = json.loads(file.read_text(encoding="utf-8-sig"))
        zero = settings.get("zero_optimization", {})
        stage, offload = zero.get("stage"), zero.get("offload_optimizer", {}).get("device")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} does not hold DeepSpeed's settings: {error}") from None
    for name, flag in FLAG_OF_SETTING.items():
        if name in settings:
            raise ValueError(f"{file} sets {name}, which {flag} determines; remove it there")
    if stage not in (1, 2, 3):
        raise ValueError(f"{file} has zero_optimization.stage {stage}; 1, 2 and 3 are supported")
    for name, asked, found in (
        ("zero_stage", config.zero_stage, stage),
        ("offload", config.offload, offload),
    ):
        if asked is not None and asked != found:
            raise ValueError(
                f"{file} has {name} {found}, not {asked}; leave the flag out, or change or remove "
                "the file"
            )
    return settings


class DeepSpeed(DDP):
    """Shards a training step's memory by DeepSpeed's ZeRO, around our own optimizer."""

    in_step = True  # stage 3 gathers weights in every forward
    clips_in_optimizer = False

    def __init__(self, run: ResolvedRun, model: DecoderModel, group: ProcessGroup = SINGLE) -> None:
        super().__init__(run, model, group)
        config = run.config
        group.broadcast(lambda: write_settings(config, run.run_dir))
        file = config.deepspeed_config or run.run_dir / "deepspeed.json"
        settings = read_settings(config, file)
        os.environ.setdefault("LOCAL_RANK", str(group.rank))  # DeepSpeed requires it, on CPUs too
        # Keeps DeepSpeed from compiling extensions for a minute; none of them is used here.
        deepspeed.ops.__compatible_ops__ = {}
        deepspeed.utils.logger.setLevel(logging.ERROR)
        try:
            self._zero, *_ = deepspeed.initialize(
                model=_AutocastLossModule(model, run.precision),
                optimizer=self.optimizers[0],
                config={
                    "zero_allow_untested_optimizer": True,
                    "zero_force_ds_cpu_optimizer": False,
                    **settings,
                    "train_micro_batch_size_per_gpu": -(-config.batch_size // group.size),
                    "gradient_clipping": config.max_grad_norm,
                },
            )
        except ValidationError as error:
            raise ValueError(f"{file}: {describe_error(error)}") from None
        if self._zero.zero_optimization_stage() == 3:
            self.caveat = " (ZeRO stage 3 leaves all but attention and adam to PyTorch)"
        # Stages 1 and 2 look up the optimizer's state only once, when just one group has state;
        # so every group gets its moments here.
        for param_group in self.optimizers[0].param_groups:
            for flat in param_group["params"]:
                moments = {entry: torch.zeros_like(flat) for entry in MOMENTS}
                self.optimizers[0].state[flat] = {"step": torch.zeros(()), **moments}

    def _divide(self) -> None:
        check_batch_size(self.config.batch_size, self.group.size)

    def loss(self, ids: Tensor) -> Tensor:
        return self._zero(ids)

    def backward(self, ids: Tensor, weight: float, last: bool) -> float:
        ids = ids if weight else dummy_sequence(ids, self.model)
        self._zero.set_gradient_accumulation_boundary(last)
        loss = self.loss(ids)
        # DeepSpeed averages over the processes.
        self._zero.backward(loss * (weight * self.group.size), scale_wrt_gas=False)
        return loss.item() * weight

    def update(self) -> float | None:
        self._zero.step()
        if self._zero.optimizer.overflow or not self.config.max_grad_norm:
            return None
        return float(self._zero.get_global_grad_norm())

    def whole_model(self) -> DecoderModel | None:
        model = self._whole_model()
        return model if self.group.is_main else None

    def _whole_model(self) -> DecoderModel:
        with deepspeed.zero.GatheredParameters(list(self.model.parameters())):
            weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        return rebuild_model(weights, self)

    def load(self, checkpoint: Path) -> Progress:
        whole = self._whole_model()
        (optimizer,) = make_optimizers(whole, self.config, self.clips_in_optimizer)
        progress = load_training_state(checkpoint, whole, [optimizer], self.group)
        if not optimizer.state:
            return progress
        # An update with a learning rate of 0 creates the moments, which are then filled.
        self.set_learning_rates(0.0)
        ids = torch.empty(1, self.config.max_seq_len, dtype=torch.long, device=self.device)
        self.backward(ids, 0.0, last=True)
        self.update()
        theirs = dict(whole.named_parameters())
        for name, parameter in self.model.named_parameters():
            state = optimizer.state[theirs[name]]
            for entry in MOMENTS:
                self._set(parameter, entry, state[entry])
        for flat in self.optimizers[0].state.values():
            flat["step"].copy_(state["step"])
        return progress

    def _set(self, parameter: nn.Parameter, entry: str, value: Tensor) -> None:
        """Sets a moment of a parameter, or this process's shard of it."""
        if self._zero.zero_optimization_stage() < 3:
            deepspeed.utils.safe_set_full_optimizer_state(parameter, value, entry)
            return
        # For stage 3 that function fails unless the size is a multiple of the number of ranks.
        rank, count = self.group.rank, self.group.size
        size = -(-value.numel() // count)
        padded = nn.functional.pad(value.flatten(), (0, size * count - value.numel()))
        part = padded[rank * size : (rank + 1) * size]
        deepspeed.utils.safe_set_local_optimizer_state(parameter, part, entry)

    def to_save(self) -> tuple[DecoderModel, list[torch.optim.Optimizer]]:
        whole = self._whole_model()
        (optimizer,) = make_optimizers(whole, self.config, self.clips_in_optimizer)
        theirs = dict(whole.named_parameters())
        if self._zero.global_steps:  # otherwise there are no moments yet
            step = next(iter(self.optimizers[0].state.values()))["step"]
            for name, parameter in self.model.named_parameters():
                moments = {
                    entry: deepspeed.utils.safe_get_full_optimizer_state(parameter, entry)
                    for entry in MOMENTS
                }
                optimizer.state[theirs[name]] = {"step": step.clone(), **moments}
        return whole, [optimizer]


class _AutocastLossModule(LossModule):
    """Enters autocast inside the module, since DeepSpeed disables an autocast around it."""

    def __init__(self, model: DecoderModel, precision: str) -> None:
        super().__init__(model)
        self.precision = precision

    def forward(self, ids: Tensor) -> Tensor:
        with autocast(ids.device.type, self.precision):
            return super().forward(ids)
