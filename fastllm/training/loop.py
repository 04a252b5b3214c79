"""The training loop: what happens between a model and a trained model.

Every random number of a step is a function of (seed, step), and the order of the data one of
(seed, epoch). So the step count is all that a resumed run needs to continue bit for bit, from any
step, and validating or sampling on the way changes nothing.
"""

import contextlib
import hashlib
import math
import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterator
from itertools import starmap
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from fastllm.command import StopRequest, first_line, stop_on_signals
from fastllm.data.loader import WORKER_TIMEOUT_S, TextDataset, collate_ids
from fastllm.device import autocast
from fastllm.generation.decoding import generate_tokens
from fastllm.optim import local
from fastllm.tokenization import Tokenizer
from fastllm.training.checkpoint import CheckpointError, Progress, save_checkpoint
from fastllm.training.config import ResolvedRun, TrainConfig
from fastllm.training.distributed import SINGLE, ProcessGroup
from fastllm.training.engine import Engine
from fastllm.training.evaluation import Evaluation, evaluate
from fastllm.training.metrics import MetricsLog, resident_mb, tokens_per_second
from fastllm.training.timing import Timing


class TrainingError(Exception):
    """Training cannot continue; the message says why and what to try."""


class LoaderError(Exception):
    """The processes that load data have failed; the message says why and what to try."""


class LoaderTimeout(LoaderError):
    """The processes that load data have sent nothing for `POLL_S`."""


# The stop request is looked at this often while a batch is awaited.
POLL_S = 1


class StepResult(NamedTuple):
    """A finished step: mean loss, gradient norm and learning rate.

    The loss is None if the step had nothing to predict, and the norm also if gradients are not
    clipped or one overflowed.
    `is_late` says that the time limit of the command has passed.
    """

    loss: float | None
    grad_norm: float | None
    lr: float
    is_late: bool


def batches(
    dataset_size: int,
    batch_size: int,
    seed: int,
    epoch: int,
    first_batch: int,
    data_group: ProcessGroup = SINGLE,
) -> Iterator[list[int]]:
    """Indices of every batch from `first_batch` of `epoch` on, epoch after epoch, without end.

    Each process gets its shard of a batch, which may be empty in the last batch of an epoch.
    """
    while True:
        generator = torch.Generator().manual_seed(derive_seed(seed, "epoch", epoch))
        order = torch.randperm(dataset_size, generator=generator)
        for start in range(first_batch * batch_size, dataset_size, batch_size):
            yield data_group.shard(order[start : start + batch_size].tolist())
        epoch, first_batch = epoch + 1, 0


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any parts: the same for the same parts, unrelated for others."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Trainer:
    """Trains a model as the settings of a run say, recording and saving in the run's folder.

    Args:
        val_set: the text held out for validation, or None.
        engine: computes the steps; it holds the model and the process group. Each process of a
            group has a trainer of its own.
        checkpoint: the checkpoint to continue from.

    Attributes:
        progress: how far the run is.
        total_steps: the step at which it ends.
        max_minutes: time after which `train` saves and stops; 0 for no limit.
        evaluation: the last validation of `train`, or None.
        stopped_by: the signal that ended `train` early, or None.
    """

    def __init__(
        self,
        run: ResolvedRun,
        tokenizer: Tokenizer,
        train_set: TextDataset,
        val_set: TextDataset | None,
        engine: Engine,
        checkpoint: Path | None = None,
    ) -> None:
        self.run = run
        self.config = config = run.config
        self.run_dir = run.run_dir
        self.tokenizer = tokenizer
        self.train_set = train_set
        self.val_set = val_set
        self.engine = engine
        self.model = engine.model
        self.group = engine.group
        self.progress = Progress(text_sha256=train_set.text_sha256)
        if checkpoint is not None:
            self._load(checkpoint)
        self.batches_per_epoch = math.ceil(len(train_set) / config.batch_size)
        self.steps_per_epoch = math.ceil(self.batches_per_epoch / config.grad_accum)
        self.total_steps = self._steps_of(config)
        self.max_minutes = config.max_minutes
        self.evaluation: Evaluation | None = None
        self.stopped_by: signal.Signals | None = None
        self._stop_request = StopRequest()  # of this process; ranks agree on it in every step
        self._saved_step = self.progress.step if checkpoint is not None else -1
        self._is_updating = False  # weights and progress are of different steps

    def _load(self, checkpoint: Path) -> None:
        self.progress = self.engine.load(checkpoint)
        if self.progress.text_sha256 != self.train_set.text_sha256:
            raise ValueError(
                "what --file_path names is not the text that this run began with; restore "
                "that text, or start a new run in another out_dir"
            )
        if self.progress.loss_scale and self.engine.scaler.is_enabled():
            self.engine.scaler.load_state_dict(self.progress.loss_scale)

    def train(self) -> None:
        """Runs to the end, or until a signal, a limit or an error; saves a checkpoint first.

        Raises:
            TrainingError: the loss is not finite; nothing is saved.
            CheckpointError: a checkpoint cannot be written.
            LoaderError: a data worker has failed.
        """
        config, progress = self.config, self.progress
        start, elapsed_before = time.monotonic(), progress.elapsed_s
        deadline = start + 60 * self.max_minutes if self.max_minutes else math.inf
        self.model.train()
        with (
            stop_on_signals(self._stop_request),
            self._loader() as loader,
            self._profiler() as profiler,
            contextlib.closing(_Recorder(self, deadline)) as recorder,
            self._saving_on_error(),
        ):
            is_finished = progress.step >= self.total_steps
            while not is_finished and not self.stopped_by:
                result = self._step(loader, deadline)
                if result is None:  # interrupted between two batches of the step
                    break
                if profiler is not None:
                    profiler.step()
                is_finished = progress.step >= self.total_steps or result.is_late
                val_loss = None
                if self.val_set is not None and (is_finished or self._validates_now()):
                    val_loss = self._validate(self.val_set)
                    is_finished = is_finished or self._is_out_of_patience()
                progress.elapsed_s = elapsed_before + time.monotonic() - start
                recorder.record(result, val_loss, is_finished)
                if self._samples_now():
                    recorder.write_sample(self.sample())
                if progress.step % config.save_interval == 0 or progress.best_step == progress.step:
                    self.save()
                self._check_stop_request()
            if self._saved_step != progress.step:
                self.save()
            self._check_stop_request()

    def measure(self) -> Timing:
        """Takes some steps, or fewer if a signal comes, to measure the time; saves nothing.

        A collective operation. The trainer is not to be used after it.
        """
        timing = Timing(self)
        self.model.train()
        with stop_on_signals(self._stop_request), self._loader() as loader:
            while not self.stopped_by and not self.group.broadcast(lambda: timing.is_measured):
                if self._step(loader, math.inf) is not None:
                    timing.update()
                self._check_stop_request()
        return timing

    @contextlib.contextmanager
    def _saving_on_error(self) -> Iterator[None]:
        """Saves the last whole step before an exception ends the run."""
        try:
            yield
        except (TrainingError, CheckpointError):
            raise  # there is nothing good to save, or nowhere to
        except BaseException:
            # Saving is a collective operation, and the other ranks do not know of the error.
            alone = self.group.size == 1
            if alone and not self._is_updating and 0 < self.progress.step != self._saved_step:
                self.save()
            raise

    def stop(self, number: signal.Signals) -> None:
        """Has `train` save and stop after the current step, as this signal would, but silently."""
        self._stop_request.set(number, announced=True)

    def _check_stop_request(self) -> None:
        if self.group.size == 1:  # otherwise the ranks agreed on it within the step
            self.stopped_by = self._stop_request.poll()

    @property
    def validation_interval(self) -> int:
        """Steps between validations."""
        return self.config.eval_interval or self.steps_per_epoch

    def _validates_now(self) -> bool:
        return self.progress.step % self.validation_interval == 0

    def _is_out_of_patience(self) -> bool:
        patience = self.config.patience or math.inf
        return self.progress.evaluations_since_best >= patience

    def _samples_now(self) -> bool:
        interval = 0 if self.config.quiet else self.config.sample_interval
        return bool(interval) and self.progress.step % interval == 0

    def _step(self, loader: Iterator[Tensor | None], deadline: float) -> StepResult | None:
        """One optimizer step; None if a signal interrupted it before it changed anything."""
        config, progress, engine = self.config, self.progress, self.engine
        start = time.monotonic()
        # All random numbers of a step come from this generator; seeding those of every device would
        # take 0.1 ms.
        rank = [self.group.rank] if self.group.rank else []
        torch.default_generator.manual_seed(derive_seed(config.seed, "step", progress.step, *rank))
        in_epoch = progress.step % self.steps_per_epoch
        count = min(config.grad_accum, self.batches_per_epoch - in_epoch * config.grad_accum)
        step_batches = []
        for _ in range(count):
            ids = next(loader)
            if ids is None:
                self.stopped_by = self._stop_request.poll()
                return None
            step_batches.append(ids.to(engine.device))
        predicted = [int((self.model.targets(ids) != -100).sum()) for ids in step_batches]
        all_predicted, all_tokens = engine.data_group.all_reduce(
            sum(predicted), sum(ids.numel() for ids in step_batches)
        )
        loss = 0.0
        for i, (ids, tokens) in enumerate(zip(step_batches, predicted, strict=True), 1):
            if config.grad_accum > 1 and self.group.size == 1 and self._stop_request.poll():
                # A resumed run takes this step again from its first batch.
                engine.zero_grad()
                self.stopped_by = self._stop_request.stopped_by
                return None
            if all_predicted:
                # Weighted by tokens, so that the sum is the gradient of one large batch.
                loss += engine.backward(ids, tokens / all_predicted, last=i == count)
        own_signal = self._stop_request.poll()
        is_late = self.group.is_main and time.monotonic() >= deadline
        loss, stops, late_ranks = self.group.all_reduce(loss, own_signal is not None, is_late)
        if stops:
            self.stopped_by = own_signal or signal.SIGTERM
        self._check_finite("loss", loss)
        factor = self.learning_rate_factor(progress.step)
        engine.set_learning_rates(factor)
        self._is_updating = True
        grad_norm = engine.update() if all_predicted else None
        progress.step += 1
        progress.tokens += int(all_tokens)
        self._is_updating = False
        progress.training_s += time.monotonic() - start
        return StepResult(
            loss if all_predicted else None, grad_norm, factor * config.lr, late_ranks > 0
        )

    def _check_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise self._diverged(f"the {name} is {value}")

    def _diverged(self, problem: str) -> TrainingError:
        return TrainingError(
            f"{problem} at step {self.progress.step + 1}. Try a lower --lr or more --warmup_steps; "
            "every checkpoint was saved before this"
        )

    def _steps_of(self, config: TrainConfig) -> int:
        return config.max_steps or config.epochs * self.steps_per_epoch

    def why_rate_jumps(self, saved: TrainConfig) -> str | None:
        """Says how the learning rate of the next step differs from that of the `saved` settings.

        None if it does not.
        """
        before, now = (
            self.learning_rate_factor(self.progress.step, config) * config.lr
            for config in (saved, self.config)
        )
        if math.isclose(before, now, rel_tol=1e-6):
            return None
        change = f"changed: the learning rate goes on at {now:.3g} instead of {before:.3g}"
        steps = self._steps_of(saved)
        if steps != self.total_steps:
            change += f"; the run has {self.total_steps:,} steps instead of {steps:,}"
        return change

    def learning_rate_factor(self, step: int, config: TrainConfig | None = None) -> float:
        """The factor on all learning rates at `step`, counted from 0.

        Args:
            config: the settings of the schedule; those of the run by default.
        """
        config = config or self.config
        warmup = config.warmup_steps
        if step < warmup:
            return (step + 1) / (warmup + 1)
        total = self.total_steps if config is self.config else self._steps_of(config)
        done = min(1.0, (step - warmup) / max(1, total - warmup))
        floor = config.min_lr / config.lr
        if config.lr_schedule == "cosine":
            return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2
        if config.lr_schedule == "linear":
            return floor + (1 - floor) * (1 - done)
        return 1.0

    @contextlib.contextmanager
    def _loader(self) -> Iterator[Iterator[Tensor | None]]:
        """The batches of token ids from this step on; None when a signal came before a batch."""
        epoch, step_in_epoch = divmod(self.progress.step, self.steps_per_epoch)
        order = batches(
            len(self.train_set),
            self.config.batch_size,
            self.config.seed,
            epoch,
            step_in_epoch * self.config.grad_accum,
            self.engine.data_group,
        )
        count = self.run.data_workers
        loader = DataLoader(
            self.train_set,
            batch_sampler=order,
            num_workers=count,
            collate_fn=collate_ids,
            worker_init_fn=_prepare_worker,
            timeout=POLL_S if count else 0,
        )
        others = multiprocessing.active_children()
        try:
            with _errors_of_workers(count), _child_signals_unchanged():
                arrays = iter(loader)
            with contextlib.closing(self._batches(arrays, count)) as each:
                del arrays
                yield each
        finally:  # the iterator has ended its workers, except those that do not react
            for worker in multiprocessing.active_children():
                if worker not in others:
                    worker.kill()
                    worker.join(POLL_S)

    def _batches(self, arrays: Iterator[Any], workers: int) -> Generator[Tensor | None, None, None]:
        deadline = time.monotonic() + WORKER_TIMEOUT_S
        while True:
            try:
                with _errors_of_workers(workers):
                    array = next(arrays)
            except LoaderError as error:
                if self.group.size == 1 and self._stop_request.stopped_by:
                    yield None
                elif not isinstance(error, LoaderTimeout) or time.monotonic() >= deadline:
                    raise
                continue
            yield torch.from_numpy(array)
            deadline = time.monotonic() + WORKER_TIMEOUT_S

    def _validate(self, val_set: TextDataset) -> float:
        progress = self.progress
        with autocast(self.engine.device.type, self.run.precision):
            self.evaluation = evaluate(
                self.model,
                val_set,
                self.config.batch_size,
                self.engine,
                before_batch=self._stop_request.poll,  # which says that a signal was heard
            )
        progress.val_loss = self.evaluation.loss
        self._check_finite("validation loss", progress.val_loss)
        if progress.best_val_loss is None or progress.val_loss < progress.best_val_loss:
            progress.best_val_loss, progress.best_step = progress.val_loss, progress.step
            progress.evaluations_since_best = 0
        else:
            progress.evaluations_since_best += 1
        return progress.val_loss

    def sample(self, tokens: int = 300) -> str:
        """Text generated by the model, the same for the same weights.

        A collective operation: all ranks call it together; rank 0 gets the text, the others "".
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
        """Writes a checkpoint of this step; a collective operation.

        Raises:
            TrainingError: a weight is not finite.
            CheckpointError: the checkpoint cannot be written.
        """
        progress = self.progress
        model, optimizers = self.engine.to_save()
        problem = next(filter(None, starmap(why_not_finite, model.named_parameters())), None)
        (problems,) = self.group.all_reduce(problem is not None)
        if problems:
            raise self._diverged(problem or "a weight on another rank is not finite")
        progress.loss_scale = self.engine.scaler.state_dict()
        save_checkpoint(
            self.run_dir,
            self.run.recorded,
            self.tokenizer,
            model,
            optimizers,
            progress,
            self.group,
            keep=[progress.best_step] if progress.best_step else [],
            keep_newest=self.config.keep_checkpoints,
        )
        self._saved_step = progress.step

    def _profiler(self) -> contextlib.AbstractContextManager[Any]:
        if not self.config.profile or not self.group.is_main:
            return contextlib.nullcontext()
        return torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=5, warmup=2, active=5, repeat=1),
            on_trace_ready=lambda p: p.export_chrome_trace(str(self.run_dir / "profile.json")),
        )


class _Bar(tqdm):  # type: ignore[type-arg]  # tqdm is generic in its stubs only
    """A progress bar that is told the time left."""

    seconds_left: float | None = None

    @property
    def format_dict(self) -> Any:
        left = "?" if self.seconds_left is None else self.format_interval(self.seconds_left)
        return {**super().format_dict, "left": left}


class _Recorder:
    """The lines of metrics.jsonl and the progress bar of a trainer; rank 0 has both."""

    def __init__(self, trainer: Trainer, deadline: float) -> None:
        self._trainer = trainer
        self._deadline = deadline
        self._timing = Timing(trainer)
        progress, is_main = trainer.progress, trainer.group.is_main
        self._logged_tokens, self._logged_s = progress.tokens, progress.training_s
        self._metrics = None
        if is_main:
            self._metrics = MetricsLog(trainer.run_dir / "metrics.jsonl", progress.step + 1)
        self._bar = _Bar(
            total=trainer.total_steps,
            initial=progress.step,
            disable=trainer.config.quiet or not is_main,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{left}{postfix}]",
            # In a log file, a line now and then is enough.
            mininterval=0.1 if sys.stderr.isatty() else 10,
        )

    def record(self, result: StepResult, val_loss: float | None, is_finished: bool) -> None:
        """Advances the bar; logs every `log_interval` steps, validations and the last step."""
        trainer, progress = self._trainer, self._trainer.progress
        is_due = progress.step % trainer.config.log_interval == 0
        if self._metrics and (is_due or is_finished or val_loss is not None):
            seconds = progress.training_s - self._logged_s
            speed = tokens_per_second(progress.tokens - self._logged_tokens, seconds)
            self._logged_tokens, self._logged_s = progress.tokens, progress.training_s
            memory = resident_mb()
            self._metrics.write(
                step=progress.step,
                epoch=(progress.step - 1) // trainer.steps_per_epoch + 1,
                loss=result.loss,
                val_loss=val_loss,
                lr=result.lr,
                grad_norm=result.grad_norm,
                tokens=progress.tokens,
                tokens_per_second=round(speed, 1),
                elapsed_s=round(progress.elapsed_s, 3),
                rss_mb=round(memory, 1),
            )
            loss = "none" if result.loss is None else f"{result.loss:.3f}"
            self._bar.set_postfix_str(
                f"loss {loss}, {speed:,.0f} tokens/s, {memory:,.0f} MiB", refresh=False
            )
        if self._metrics:
            self._update_time()
        self._bar.update()

    def _update_time(self) -> None:
        """Says how long the run takes as soon as that is measured; then keeps the time left."""
        timing, trainer = self._timing, self._trainer
        was_measured = timing.is_measured
        timing.update()
        if not timing.is_measured:
            return
        left = min(timing.seconds_after(trainer.progress.step), self._deadline - time.monotonic())
        self._bar.seconds_left = max(0, left)
        if not was_measured:
            time_line, warning = timing.describe()
            if not trainer.config.quiet:
                self._bar.write(f"time        {time_line}", file=sys.stderr)
            if warning:
                self._bar.write(warning, file=sys.stderr)

    def write_sample(self, text: str) -> None:
        """Prints generated text above the bar."""
        if self._metrics:
            step = self._trainer.progress.step
            self._bar.write(f"--- step {step}\n{text}\n---", file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
        if self._metrics:
            self._metrics.close()


def why_not_finite(name: str, parameter: Tensor) -> str | None:
    """Names a value of a parameter that is not finite; None if all are."""
    own = local(parameter.detach())
    for extreme in torch.aminmax(own) if own.numel() else ():
        if not extreme.isfinite():
            return f"the largest or smallest value of {name} is {extreme.item()}"
    return None


@contextlib.contextmanager
def _errors_of_workers(workers: int) -> Iterator[None]:
    """Turns errors of loading data in so many processes into one line with a remedy.

    Raises:
        LoaderTimeout: a process does not answer.
        LoaderError: a process cannot be started, or has failed.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not workers:
            raise
        # PyTorch has no class of its own for it.
        is_timeout = str(error).startswith("DataLoader timed out")
        raise (LoaderTimeout if is_timeout else LoaderError)(
            f"loading data in {workers} processes has failed: {first_line(error)}. "
            "Give --num_workers 0, which loads it in the training process"
        ) from error


@contextlib.contextmanager
def _child_signals_unchanged() -> Iterator[None]:
    """Undoes what PyTorch does to SIGCHLD: an exception anywhere in a step when a worker dies.

    Whoever waits for a batch of that worker notices as well.
    """
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def _prepare_worker(worker: int) -> None:
    # Ctrl-C reaches every process of the group, and the training process still needs its workers.
    # Other signals end them, as PyTorch's own SIGTERM at the end does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
