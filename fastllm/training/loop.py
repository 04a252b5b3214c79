"""The training loop: what happens between a model and a trained model.

Every random number of a step is a function of (seed, step), and the order of the data one of
(seed, epoch). So the step count is all that a resumed run needs to go on bit for bit, from any
step, and validating or sampling on the way changes nothing.
"""

import contextlib
import hashlib
import math
import signal
import sys
import time
from collections.abc import Iterator
from itertools import starmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from fastllm.command import StopRequest, stop_on_signals
from fastllm.data.loader import TextDataset, collate
from fastllm.device import autocast
from fastllm.generation.decoding import generate_tokens
from fastllm.models.decoder import DecoderModel
from fastllm.optim import local
from fastllm.tokenization import Tokenizer
from fastllm.training.checkpoint import Progress, save_checkpoint
from fastllm.training.config import TrainConfig
from fastllm.training.distributed import SINGLE, ProcessGroup
from fastllm.training.engine import DDP, FSDP, Engine, Pipeline
from fastllm.training.evaluation import Evaluation, evaluate
from fastllm.training.metrics import MetricsLog, resident_mb


class TrainingError(Exception):
    """Training cannot go on; the message says why and what to try."""


def batches(
    dataset_size: int,
    batch_size: int,
    seed: int,
    epoch: int,
    first_batch: int,
    data_group: ProcessGroup = SINGLE,
) -> Iterator[list[int]]:
    """Indices of every batch from `first_batch` of `epoch` on, epoch after epoch, for ever.

    Of each batch, this process's share; a last batch of few sequences may have none for it.
    """
    while True:
        generator = torch.Generator().manual_seed(derive_seed(seed, "epoch", epoch))
        order = torch.randperm(dataset_size, generator=generator)
        for start in range(first_batch * batch_size, dataset_size, batch_size):
            yield data_group.shard(order[start : start + batch_size].tolist())
        epoch, first_batch = epoch + 1, 0


def choose_engine(config: TrainConfig, group: ProcessGroup) -> type[Engine]:
    """What computes the steps of a run."""
    if config.launcher == "deepspeed":
        from fastllm.integrations.deepspeed import DeepSpeed

        return DeepSpeed
    if group.size == 1:
        return Engine
    return {"ddp": DDP, "fsdp": FSDP, "pipeline": Pipeline}[config.parallel]


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any parts: equal for equal ones, unrelated for others."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Trainer:
    """Trains `model` on `train_set` as `config` says, recording and saving in `run_dir`.

    Args:
        model: on its device.
        val_set: what is held out, or None.
        checkpoint: continue from this one.
        group: who trains together; each has a trainer of its own.

    Attributes:
        engine: computes the steps.
        progress: how far the run is.
        total_steps: where it ends.
        evaluation: the last validation of `train`, or None.
        max_minutes: limit of the next `train`, from its start; 0 for none.
        stopped_by: the signal that ended `train` early, or None.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: DecoderModel,
        tokenizer: Tokenizer,
        train_set: TextDataset,
        val_set: TextDataset | None,
        run_dir: Path,
        checkpoint: Path | None = None,
        group: ProcessGroup = SINGLE,
    ) -> None:
        self.config = config
        self.model = model
        self.group = group
        self.tokenizer = tokenizer
        self.train_set = train_set
        self.val_set = val_set
        self.run_dir = run_dir
        self.engine = choose_engine(config, group)(config, model, group)
        self.progress = Progress(text_sha256=train_set.text_sha256)
        if checkpoint is not None:
            self.progress = self.engine.load(checkpoint)
            if self.progress.text_sha256 != train_set.text_sha256:
                raise ValueError(
                    f"{train_set.file_path} is not the text that this run began with; give its "
                    "text back, or start a new run in another out_dir"
                )
            if self.progress.loss_scale and self.engine.scaler.is_enabled():
                self.engine.scaler.load_state_dict(self.progress.loss_scale)
        self.batches_per_epoch = math.ceil(len(train_set) / config.batch_size)
        self.steps_per_epoch = math.ceil(self.batches_per_epoch / config.grad_accum)
        self.total_steps = config.max_steps or config.epochs * self.steps_per_epoch
        self.max_minutes = config.max_minutes
        self.stopped_by: signal.Signals | None = None
        self._asked = StopRequest()  # the processes agree on it between two steps
        self.evaluation: Evaluation | None = None
        self._saved_step = self.progress.step if checkpoint is not None else -1

    def train(self) -> None:
        """Runs to the end, or until a signal or a limit; saves a checkpoint in every case.

        Raises:
            TrainingError: the loss is no longer a number.
            CheckpointError: a checkpoint cannot be written.
        """
        config, progress = self.config, self.progress
        start, before = time.monotonic(), progress.elapsed_s
        deadline = start + 60 * self.max_minutes if self.max_minutes else math.inf
        logged_tokens, logged_s = progress.tokens, progress.training_s
        sample_interval = 0 if config.quiet else config.sample_interval
        loader = self._loader()
        self.model.train()
        with (
            stop_on_signals(self._asked),
            self._profiler() as profiler,
            contextlib.closing(
                MetricsLog(self.run_dir / "metrics.jsonl", progress.step + 1)
                if self.group.is_main
                else _NoLog()
            ) as log,
            tqdm(
                total=self.total_steps,
                initial=progress.step,
                disable=config.quiet or not self.group.is_main,
                unit="step",
                # In a log file, a line now and then is enough.
                mininterval=0.1 if sys.stderr.isatty() else 10,
            ) as bar,
        ):
            ending = progress.step >= self.total_steps
            while not ending:
                step_start = time.monotonic()
                outcome = self._step(loader, deadline)
                if outcome is None:  # a signal came between two batches of the step
                    break
                loss, grad_norm, lr, is_late = outcome
                step = progress.step
                progress.training_s += time.monotonic() - step_start
                profiler.step()
                ending = step >= self.total_steps or is_late

                new_val_loss = None
                if self.val_set is not None and (
                    ending or step % (config.eval_interval or self.steps_per_epoch) == 0
                ):
                    new_val_loss = self._validate(self.val_set)
                    patience = config.patience or math.inf
                    ending = ending or progress.evaluations_since_best >= patience
                progress.elapsed_s = before + time.monotonic() - start
                if new_val_loss is not None or ending or step % config.log_interval == 0:
                    speed = (progress.tokens - logged_tokens) / (progress.training_s - logged_s)
                    logged_tokens, logged_s = progress.tokens, progress.training_s
                    memory = resident_mb()
                    log.write(
                        step=step,
                        epoch=(step - 1) // self.steps_per_epoch + 1,
                        loss=loss,
                        val_loss=new_val_loss,
                        lr=lr,
                        grad_norm=grad_norm,
                        tokens=progress.tokens,
                        tokens_per_second=round(speed, 1),
                        elapsed_s=round(progress.elapsed_s, 3),
                        rss_mb=round(memory, 1),
                    )
                    bar.set_postfix_str(
                        f"loss {loss:.3f}, {speed:,.0f} tokens/s, {memory:,.0f} MiB", refresh=False
                    )
                bar.update()
                if sample_interval and step % sample_interval == 0:
                    sample = self.sample()
                    if self.group.is_main:
                        bar.write(f"--- step {step}\n{sample}\n---", file=sys.stderr)
                if step % config.save_interval == 0 or progress.best_step == step:
                    self.save()
                if self.group.size == 1:  # else all have agreed within the step
                    self.stopped_by = self._asked.poll()
                if self.stopped_by:
                    break
            if self._saved_step != progress.step:
                self.save()
            if self.group.size == 1:
                self.stopped_by = self._asked.poll()

    def stop(self, number: signal.Signals) -> None:
        """Has `train` save and stop after the step at hand, as this signal to the process would."""
        self._asked.stopped_by = number

    def _step(
        self, loader: Iterator[dict[str, Tensor]], deadline: float
    ) -> tuple[float, float | None, float, bool] | None:
        """One optimizer step: loss, gradient norm, learning rate and whether the time is over.

        None if a signal came before it was done.
        """
        config, progress, engine = self.config, self.progress, self.engine
        # All that a step draws comes from this generator; seeding every device's would take 0.1 ms.
        rank = [self.group.rank] if self.group.rank else []
        torch.default_generator.manual_seed(derive_seed(config.seed, "step", progress.step, *rank))
        in_epoch = progress.step % self.steps_per_epoch
        count = min(config.grad_accum, self.batches_per_epoch - in_epoch * config.grad_accum)
        step_batches = [next(loader)["input_ids"].to(engine.device) for _ in range(count)]
        predicted = [int((self.model.targets(ids) != -100).sum()) for ids in step_batches]
        all_predicted, seen = engine.data_group.all_reduce(
            sum(predicted), sum(ids.numel() for ids in step_batches)
        )
        loss = 0.0
        for i, (ids, tokens) in enumerate(zip(step_batches, predicted, strict=True), 1):
            if self._asked.poll() and config.grad_accum > 1 and self.group.size == 1:
                # The step has changed nothing yet; a resumed run does it from its first batch.
                engine.zero_grad()
                self.stopped_by = self._asked.stopped_by
                return None
            if all_predicted:
                # By its tokens, so that the sum is the gradient of one big batch.
                loss += engine.backward(ids, tokens / all_predicted, last=i == count)
        came = self._asked.poll()
        late = self.group.is_main and time.monotonic() >= deadline
        loss, stops, lates = self.group.all_reduce(loss, came is not None, late)
        if stops:
            self.stopped_by = came or signal.SIGTERM
        self._check_finite("loss", loss)
        factor = self.learning_rate_factor(progress.step)
        engine.set_learning_rates(factor)
        grad_norm = engine.update() if all_predicted else 0.0
        progress.step += 1
        progress.tokens += int(seen)
        return loss, grad_norm, factor * config.lr, lates > 0

    def _check_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise self._diverged(f"the {name} is {value}")

    def _diverged(self, problem: str) -> TrainingError:
        return TrainingError(
            f"{problem} at step {self.progress.step + 1}. Try a lower --lr or more --warmup_steps; "
            "the last checkpoint was saved before this"
        )

    def learning_rate_factor(self, step: int) -> float:
        """What the learning rates are multiplied by at `step`, counted from 0."""
        config = self.config
        warmup = config.warmup_steps
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = min(1.0, (step - warmup) / max(1, self.total_steps - warmup))
        floor = config.min_lr / config.lr
        if config.lr_schedule == "cosine":
            return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2
        if config.lr_schedule == "linear":
            return floor + (1 - floor) * (1 - done)
        return 1.0

    def _loader(self) -> Iterator[dict[str, Tensor]]:
        epoch, step_in_epoch = divmod(self.progress.step, self.steps_per_epoch)
        order = batches(
            len(self.train_set),
            self.config.batch_size,
            self.config.seed,
            epoch,
            step_in_epoch * self.config.grad_accum,
            self.engine.data_group,
        )
        return iter(
            DataLoader(
                self.train_set,
                batch_sampler=order,
                num_workers=self.config.num_workers,
                collate_fn=collate,
                worker_init_fn=_leave_signals_to_the_trainer,
            )
        )

    def _validate(self, val_set: TextDataset) -> float:
        progress = self.progress
        with autocast(self.engine.device.type, self.config.precision):
            self.evaluation = evaluate(self.model, val_set, self.config.batch_size, self.engine)
        progress.val_loss = self.evaluation.loss
        self._check_finite("validation loss", progress.val_loss)
        if progress.best_val_loss is None or progress.val_loss < progress.best_val_loss:
            progress.best_val_loss, progress.best_step = progress.val_loss, progress.step
            progress.evaluations_since_best = 0
        else:
            progress.evaluations_since_best += 1
        return progress.val_loss

    def sample(self, tokens: int = 300) -> str:
        """Text that the model makes up, the same for the same weights.

        All processes call this together; the text comes from the first, "" from the others.
        """
        model = self.engine.whole_model()
        if model is None:
            return ""
        was_training = model.training
        model.eval()
        first = self.train_set.tokens[:1].tolist()
        generated = generate_tokens(model, first, tokens, temperature=0.8, seed=0)
        text = self.tokenizer.decode([*first, *generated])
        model.train(was_training)
        return text

    def save(self) -> None:
        """Writes a checkpoint of this step.

        Raises:
            TrainingError: a weight is no longer a finite number.
            CheckpointError: the checkpoint cannot be written.
        """
        progress = self.progress
        model, optimizers = self.engine.to_save()
        problem = next(filter(None, starmap(why_not_finite, model.named_parameters())), None)
        (problems,) = self.group.all_reduce(problem is not None)
        if problems:
            raise self._diverged(problem or "a weight in another process is no finite number")
        progress.loss_scale = self.engine.scaler.state_dict()
        save_checkpoint(
            self.run_dir,
            self.config,
            self.tokenizer,
            model,
            optimizers,
            progress,
            self.group,
            keep=[progress.best_step] if progress.best_step else [],
            keep_newest=self.config.keep_checkpoints,
        )
        self._saved_step = progress.step

    def _profiler(self) -> Any:
        if not self.config.profile or not self.group.is_main:
            return contextlib.nullcontext(_NoProfiler())
        return torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=5, warmup=2, active=5, repeat=1),
            on_trace_ready=lambda p: p.export_chrome_trace(str(self.run_dir / "profile.json")),
        )


def why_not_finite(name: str, parameter: Tensor) -> str | None:
    """Names a number in a parameter that is not finite; None where all are."""
    here = local(parameter.detach())
    for extreme in torch.aminmax(here) if here.numel() else ():
        if not extreme.isfinite():
            return f"the largest or smallest number of {name} is {extreme.item()}"
    return None


def _leave_signals_to_the_trainer(worker: int) -> None:
    # Ctrl-C, or a service manager's stop, reaches every process of the group; the training process
    # still needs its workers, who end with it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _NoLog:
    def write(self, **values: Any) -> None:
        """Nothing: the first process keeps the record."""

    def close(self) -> None:
        """Nothing."""


class _NoProfiler:
    def step(self) -> None:
        """Nothing: profiling is off."""
