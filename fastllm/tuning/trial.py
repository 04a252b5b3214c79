"""A trial: the command as a process, watched through its metrics.jsonl."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fastllm.training.metrics import read_metrics
from fastllm.tuning.results import to_toml
from fastllm.tuning.search import Plan

if TYPE_CHECKING:
    import optuna

# Time for a stopped trial to end on its own.
GRACE_S = 10

# A trial's process: runs a command of this package until it ends or its parent dies, even by
# SIGKILL: then the system closes the pipe that is stdin here. It watches before it imports torch,
# which takes seconds, and by os.read: sys.stdin has a lock that Python needs at its exit.
CHILD = """
import os, runpy, signal, sys, threading

def end_with_parent():
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)

threading.Thread(target=end_with_parent, daemon=True).start()
runpy.run_module("fastllm." + sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


class Process(Protocol):
    """A trial's process, here or on another machine."""

    lost: str
    """How the machine ended the process, if it was the machine's fault."""

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""

    def terminate(self) -> None:
        """Asks the process to end."""

    def kill(self) -> None:
        """Ends the process and those it started, at once."""


# Starts a process from the command, its flags, its number of threads, its log and its current
# folder.
StartProcess = Callable[[str, list[str], int, Path, Path], Process]


class TrialProcess:
    """A command of this package as a process that ends at the latest when this one does."""

    lost = ""

    def __init__(
        self, command: str, flags: list[str], threads: int, log: Path, current_folder: Path
    ) -> None:
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-c", CHILD, command, *flags, "--threads", str(threads)],
                cwd=current_folder,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                stdin=subprocess.PIPE,  # never written to, and open until this process ends
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches only the study, which stops its trials
            )

    def poll(self) -> int | None:
        return self._process.poll()

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        if self.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class RunningTrial:
    """A trial of the study and its process, in a folder of its own."""

    def __init__(self, trial: "optuna.Trial", plan: Plan, start: StartProcess) -> None:
        self.trial = trial
        self.folder = plan.trial_folder(trial.number)
        self.losses: list[tuple[float, int]] = []  # validation loss and step
        self.stopped_because = ""
        self._kill_at = math.inf
        self.folder.mkdir(exist_ok=True)
        settings = self.folder / "settings.toml"
        settings.write_text(to_toml({**plan.fixed, **trial.params}), encoding="utf-8")
        flags = ["--config", str(settings), "--out_dir", str(self.folder)]
        log = self.folder.absolute() / "log.txt"
        self.process = start(plan.config.command, flags, plan.threads, log, Path.cwd())

    def read_losses(self) -> None:
        """Reports new validation losses to the study, which may prune the trial."""
        # A trial that was started again repeats the steps after its checkpoint.
        last = self.losses[-1][1] if self.losses else -1
        for line in read_metrics(self.folder / "metrics.jsonl", last):
            self._report(line["step"], line.get("val_loss"))
        if time.monotonic() >= self._kill_at:
            self.process.kill()

    def _report(self, step: int, loss: float | None) -> None:
        if loss is None or self.stopped_because:
            return
        if not math.isfinite(loss):
            self.stop(f"the validation loss is {loss} at step {step}")
            return
        # Indexed by validation: with one per epoch, the steps depend on the batch size.
        self.trial.report(loss, len(self.losses))
        self.losses.append((loss, step))
        if self.trial.should_prune():
            self.stop("pruned")

    def stop(self, reason: str) -> None:
        """Asks the process to end, and kills it if it takes longer than `GRACE_S`."""
        if not self.stopped_because and self.process.poll() is None:
            self.stopped_because = reason
            self._kill_at = time.monotonic() + GRACE_S
            self.process.terminate()

    def record(self, study: "optuna.Study") -> None:
        """Records the end of the process in the study.

        Raises:
            ValueError: it succeeded without a validation.
        """
        from optuna.trial import TrialState

        if self.stopped_because == "interrupted" or self.process.lost:
            requeue(study, self.trial.number)
            return
        if self.losses:
            self.trial.set_user_attr("step", min(self.losses)[1])
        if self.stopped_because == "pruned":
            study.tell(self.trial, state=TrialState.PRUNED)
        elif self.stopped_because or self.process.poll():
            self.trial.set_user_attr("reason", self.stopped_because or self._failure())
            study.tell(self.trial, state=TrialState.FAIL)
        elif self.losses:
            study.tell(self.trial, min(self.losses)[0])
        else:
            raise ValueError(
                f"{self.folder} ended without a val_loss in metrics.jsonl to compare trials by; "
                "hold out a part of the text for validation"
            )

    def _failure(self) -> str:
        """Why the process failed: the last line of its log."""
        log = (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in log.splitlines() if line.strip()]
        last = lines[-1].removeprefix("error: ") if lines else "log.txt is empty"
        status = self.process.poll()
        assert status is not None
        if status >= 0:
            return last
        hint = " (perhaps out of memory)" if status == -signal.SIGKILL else ""
        return f"killed by {signal.Signals(-status).name}{hint}, after: {last}"


def requeue(study: "optuna.Study", number: int) -> None:
    """Ends a running trial as failed, and queues its settings to be tried again."""
    from optuna.trial import TrialState

    study.tell(number, state=TrialState.FAIL)
    study.enqueue_trial(study.trials[number].params)
