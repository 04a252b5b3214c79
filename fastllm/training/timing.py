"""How long a run takes: an estimate from its first steps."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from fastllm.training.metrics import format_duration, tokens_per_second

if TYPE_CHECKING:
    from fastllm.training.loop import Trainer

# Measured over so many steps, or fewer if they take so long. The steps before them fill caches and
# compile kernels.
WARM_UP_STEPS = 2
MEASURED_STEPS = 8
MEASURED_S = 5


class Timing:
    """How long a run takes, by the speed of its first steps after the warm-up.

    Attributes:
        is_measured: whether enough steps were taken.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.is_measured = False
        self._trainer = trainer
        self._first_step = trainer.progress.step
        self._warm = replace(trainer.progress)

    def update(self) -> None:
        """Takes account of a step that the trainer has finished."""
        progress = self._trainer.progress
        if progress.step <= self._first_step + WARM_UP_STEPS:
            self._warm = replace(progress)
            return
        self.is_measured = (
            self.is_measured
            or self._measured_steps >= MEASURED_STEPS
            or progress.training_s - self._warm.training_s >= MEASURED_S
        )

    @property
    def _measured_steps(self) -> int:
        return self._trainer.progress.step - self._warm.step

    @property
    def speed(self) -> float:
        """Tokens per second since the warm-up."""
        progress, warm = self._trainer.progress, self._warm
        return tokens_per_second(
            progress.tokens - warm.tokens, progress.training_s - warm.training_s
        )

    def seconds_after(self, step: int) -> float:
        """Seconds from this step to the last one of the run, with validations."""
        trainer = self._trainer
        tokens_per_step = (trainer.progress.tokens - self._warm.tokens) / self._measured_steps
        tokens = max(0, trainer.total_steps - step) * tokens_per_step
        if trainer.val_set is not None:
            interval = trainer.validation_interval
            validations = math.ceil(trainer.total_steps / interval) - step // interval
            sequences = max(0, validations) * len(trainer.val_set)
            # They need the forward only, a third of a step's arithmetic.
            tokens += sequences * trainer.config.max_seq_len / 3
        return tokens / self.speed

    def describe(self) -> tuple[str, str | None]:
        """The time of the run and what ends it; a warning if that cuts its schedule short."""
        trainer, config, first = self._trainer, self._trainer.config, self._first_step
        seconds, limit = self.seconds_after(first), 60 * trainer.max_minutes
        steps, total = max(0, trainer.total_steps - first), trainer.total_steps
        if not steps:
            return f"none: the run is at step {first:,} of {total:,}", None
        measured = f"(measured over {self._measured_steps} steps)"
        if not limit or seconds <= limit:
            kind = f"{'more ' if first else ''}step{'' if steps == 1 else 's'}"
            within = ", within --max_minutes" if limit else ""
            return f"about {format_duration(seconds)} for {steps:,} {kind}{within} {measured}", None
        reached = first + max(1, int(steps * limit / seconds))
        end = f"at about step {reached:,} of {total:,}"
        time_line = f"{format_duration(limit)}: --max_minutes ends the run {end} {measured}"
        if config.lr_schedule == "constant":
            return time_line, None
        preset = f"--preset {config.preset} " if config.preset else ""
        return time_line, (
            f"warning: --max_minutes ends the run {end}, before the learning rate has decayed; "
            f"{preset}--max_steps {reached} makes the schedule end with the run"
        )
