"""Search for the settings that learn best: `python -m fastllm.tune -- --file_path book.txt`.

One process asks optuna for settings, runs the tuned command with them, and reads the validation
losses from its metrics.jsonl while it runs. The study is in study.db, so that it can be killed and
started again.
"""

import argparse
import csv
import ctypes
import fcntl
import importlib
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field

from fastllm.command import (
    CommandSettings,
    errors_in_one_line,
    parse_settings,
    say,
    underscored,
)
from fastllm.files import replace_file
from fastllm.threads import available_cores
from fastllm.training.config import Count, NonNegative, PositiveCount, read_toml
from fastllm.training.loop import mix
from fastllm.training.metrics import read_metrics
from fastllm.training.processes import ProcessError

if TYPE_CHECKING:
    import optuna
    from matplotlib.axes import Axes
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

    from fastllm.integrations.ray import RemoteTrial

# What is searched unless it is fixed.
DEFAULT_SEARCH = {"lr": "1e-5:5e-4:log", "batch_size": "8,16,32"}
# What every trial gets from here.
OF_A_TRIAL = ("out_dir", "resume", "config", "threads")
# What stays of a trial that is not the best one; its checkpoints may be gigabytes.
RECORD = ("settings.toml", "config.json", "metrics.jsonl", "log.txt", "loss.png")
# Trials that Ray's machines may lose, to be tried again.
MOST_LOST = 5
# Trials that are drawn at random, before their results say where to look.
RANDOM_TRIALS = 5
# A trial is pruned where it is worse than the median of at least so many at the same validation.
PRUNE_AFTER_TRIALS = 3
POLL_S = 0.1
# What a stopped trial gets to end by itself.
GRACE_S = 10


class TuneConfig(CommandSettings):
    """Search for settings with the lowest validation loss; flags behind -- go to every trial."""

    command: Literal["train", "finetune"] = "train"
    """Whose settings to search."""
    search: list[str] = Field(default_factory=list)
    """NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=A,B,C for any setting of the command; may be given
    again for others. lr=1e-5:5e-4:log and batch_size=8,16,32 are searched unless given or fixed."""
    trials: PositiveCount = 8
    """Trials in all, those of an earlier start of this study included."""
    jobs: Annotated[int, Field(ge=1, le=4096)] = 1
    """Trials that run at the same time; they share the cores."""
    launcher: Literal["ray"] | None = None
    """ray runs trials on the machines of the cluster that RAY_ADDRESS names, or here where it names
    none; they all need to have the folders of the study and of the texts."""
    timeout: NonNegative = 0
    """Stop after so many seconds, with the best trial until then; 0 for no limit."""
    out_dir: Path = Path("runs/tune")
    """Folder of the study; one that is there already goes on."""
    seed: Count = 0
    """Fixes what is tried, as long as trials run one after the other."""


class Search(NamedTuple):
    """What somebody wants to be tried for a setting, as it was written."""

    text: str
    values: list[str]
    kind: Literal["range", "log", "list"]


class Plan(NamedTuple):
    """What all trials share.

    Attributes:
        fixed: settings that the user gave, as they are written to TOML.
        space: what is searched.
        threads: of each trial; 0 before a launcher has said what its machines have.
    """

    fixed: dict[str, Any]
    space: "dict[str, BaseDistribution]"
    threads: int


def main(arguments: list[str]) -> None:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    config = parse_tune_config(arguments[:split])
    stopped_by: list[signal.Signals] = []

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        if stopped_by:
            raise KeyboardInterrupt
        stopped_by.append(signal.Signals(number))
        say(f"{stopped_by[0].name}: stopping the running trials; Ctrl-C again stops at once")

    with errors_in_one_line(OSError, ValueError, ImportError, ProcessError), ExitStack() as stack:
        plan = make_plan(config, arguments[split + 1 :])
        if config.launcher == "ray":
            from fastllm.integrations import ray

            stack.enter_context(ray.connected())
            plan = plan._replace(threads=ray.cores_of_each(config.jobs, plan.threads))
        study = open_study(config, plan)
        say(f"search      {', '.join(plan.space)} over {config.trials} trials of {config.command}")
        say(f"jobs        {config.jobs} at a time, threads of each: {plan.threads}")
        say(f"logs        {trial_folder(config, 0).parent}/trial-*/log.txt")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, ask_to_stop)
        run_trials(study, config, plan, stopped_by)
        report(study, config, plan)
    if stopped_by:
        raise SystemExit(128 + stopped_by[0])
    if best_of(study.trials) is None:
        raise SystemExit(1)


def parse_tune_config(arguments: list[str]) -> TuneConfig:
    """Settings from the flags; exits with a message where they are wrong."""
    # Taken out first: a list of settings is split at commas, those of `batch_size=8,16` as well.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--search", action="append", default=[])
    found, others = first.parse_known_args(underscored(arguments))
    return parse_settings(TuneConfig, others, search=found.search)


def make_plan(config: TuneConfig, flags: list[str]) -> Plan:
    """What to search and what to leave alone, all of it checked by the command's own settings.

    Args:
        flags: those of the command, behind `--`.

    Raises:
        ValueError: a setting is unknown, or searched and fixed, or its range does not fit.
        ImportError: optuna is missing, or what the command needs.
    """
    module = importlib.import_module(f"fastllm.{config.command}")
    settings_class = getattr(module, f"{config.command.capitalize()}Config")
    flags = underscored(module.words_as_lists(flags) if config.command == "finetune" else flags)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    given = read_toml(file) if (file := first.parse_known_args(flags)[0].config) else {}
    names = (flag.partition("=")[0][2:] for flag in flags if flag.startswith("--"))
    fixed = {*given, *(name.removeprefix("no-") for name in names)}
    for name in ("out_dir", "resume"):
        if name in fixed:
            raise ValueError(f"{name} cannot be fixed: every trial has a folder of its own")

    texts = {name: text for name, text in DEFAULT_SEARCH.items() if name not in fixed}
    known = [name for name in settings_class.model_fields if name not in OF_A_TRIAL]
    for each in config.search:
        name, _, text = each.partition("=")
        name = name.replace("-", "_")
        if name not in known:
            raise ValueError(
                f"search: {config.command} has no setting '{name}' to search; it has "
                + ", ".join(known)
            )
        if name in fixed:
            raise ValueError(f"{name} is searched, and fixed behind -- as well; leave one out")
        texts[name] = text
    if not texts:
        raise ValueError("everything is fixed; name a setting to search with --search")
    searches = {name: read_search(name, text) for name, text in texts.items()}

    # Both ends of every range and every value of a list go through the settings, which know what
    # fits and of what type it is.
    typed: dict[str, list[Any]] = {name: [] for name in searches}
    for i in range(max(len(search.values) for search in searches.values())):
        row = {name: values[min(i, len(values) - 1)] for name, (_, values, _) in searches.items()}
        settings = parse_settings(settings_class, flags, **{**given, **row})
        dumped = settings.model_dump(mode="json")
        for name in searches:
            typed[name].append(dumped[name])
    space = {name: distribution(name, search, typed[name]) for name, search in searches.items()}
    kept = settings.model_fields_set - space.keys() - {"config"}
    share = 0 if config.launcher else max(1, available_cores() // config.jobs)
    return Plan(
        {name: value for name, value in dumped.items() if name in kept and value is not None},
        space,
        settings.threads or share,
    )


def read_search(name: str, text: str) -> Search:
    """`LOW:HIGH`, `LOW:HIGH:log` or `A,B,C`.

    Raises:
        ValueError: it is neither of them.
    """
    if "," in text:
        search = Search(text, text.split(","), "list")
    else:
        values = text.split(":")
        log = values[2:] == ["log"]
        search = Search(text, values[:2] if log else values, "log" if log else "range")
    if "" in search.values or (search.kind != "list" and len(search.values) != 2):
        raise ValueError(
            f"search: '{name}={text}' is neither a range ({name}=LOW:HIGH or "
            f"{name}=LOW:HIGH:log) nor a list ({name}=A,B,C)"
        )
    return search


def distribution(name: str, search: Search, values: list[Any]) -> "BaseDistribution":
    """The search as optuna has it.

    Args:
        values: those of the search, as the setting has them; more may follow.

    Raises:
        ValueError: there is no such range.
        ImportError: optuna is missing.
    """
    try:
        from optuna.distributions import (
            CategoricalDistribution,
            FloatDistribution,
            IntDistribution,
        )
    except ImportError as error:
        raise ImportError(f"tune needs optuna ({error}): pip install '.[tune]'") from None
    if search.kind == "list":
        return CategoricalDistribution(values[: len(search.values)])
    low, high = values[:2]
    log = search.kind == "log"
    if type(low) not in (int, float):
        raise ValueError(f"search: {name} is no number; list its values ({name}=A,B,C)")
    if low >= high or (log and low <= 0):
        begin = "above 0, and below where it ends" if log else "below where it ends"
        raise ValueError(f"search: '{name}={search.text}' must begin {begin}")
    if type(low) is int:
        return IntDistribution(low, high, log=log)
    return FloatDistribution(low, high, log=log)


def open_study(config: TuneConfig, plan: Plan) -> "optuna.Study":
    """The study in the folder, or a new one; what a killed process left running is put back.

    Raises:
        ValueError: it is a study of something else, or another process is at it.
        OSError: the folder cannot be written.
    """
    import optuna
    from optuna.trial import TrialState
    from sqlalchemy.engine import URL
    from sqlalchemy.exc import SQLAlchemyError

    folder = config.out_dir
    folder.mkdir(parents=True, exist_ok=True)
    # Held until this process ends, however it does; not on study.db, whose own locks SQLite would
    # lose. Trials do not inherit it.
    try:
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process is at the study in {folder}") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(
            storage=URL.create("sqlite", database=f"{folder}/study.db").render_as_string(),
            study_name="tune",
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(
                n_startup_trials=PRUNE_AFTER_TRIALS,
                n_warmup_steps=1,  # the first validation tells little
            ),
        )
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{folder}/study.db cannot be used for a study: {reason}") from None
    searched = {name: str(each) for name, each in plan.space.items()}
    what = {"command": config.command, **plan.fixed, **searched}
    before = study.user_attrs.get("what", what)
    for name in (*before, *what):
        old, new = before.get(name, "unset"), what.get(name, "unset")
        if old != new:
            raise ValueError(
                f"{folder} holds a study with {name} {old}; it cannot go on with {new}. Give the "
                "same again, or another out_dir"
            )
    study.set_user_attr("what", what)
    for trial in study.get_trials(states=[TrialState.RUNNING]):
        put_back(study, trial.number)
    return study


def put_back(study: "optuna.Study", number: int) -> None:
    """Ends a running trial as failed, and queues its settings to be tried again."""
    from optuna.trial import TrialState

    study.tell(number, state=TrialState.FAIL)
    study.enqueue_trial(study.trials[number].params)


def run_trials(
    study: "optuna.Study", config: TuneConfig, plan: Plan, stopped_by: Sequence[signal.Signals]
) -> None:
    """Runs trials until there are enough, the time is up, or a signal is in `stopped_by`.

    Raises:
        ValueError: trials do not validate, so that there is nothing to compare.
        ProcessError: Ray's machines lose them.
    """
    lost = 0
    deadline = time.monotonic() + config.timeout if config.timeout else math.inf
    begun = sum(state_of(trial) in ("complete", "pruned", "failed") for trial in study.trials)
    running: list[Run] = []
    try:
        while True:
            if stopped_by or time.monotonic() >= deadline:
                for run in running:
                    run.stop("interrupted")
            else:
                while begun < config.trials and len(running) < config.jobs:
                    run = Run(ask(study, config, plan), config, plan)
                    running.append(run)
                    settings = describe_settings(run.trial.params)
                    say(f"trial {run.trial.number:<4} begins       {settings}")
                    begun += 1
            if not running:
                return
            for run in list(running):
                ended = run.process.poll() is not None
                run.read_losses()
                if ended:
                    run.tell(study)
                    running.remove(run)
                    say(describe(study.trials[run.trial.number]))
                    write_results(study, config, plan)
                    if reason := run.process.lost:
                        begun -= 1
                        lost += 1
                        say(f"trial {run.trial.number:<4} was lost: {reason}")
                        if lost > MOST_LOST:
                            raise ProcessError(f"{lost} trials were lost, the last one: {reason}")
            time.sleep(POLL_S)
    finally:
        for run in running:
            run.process.kill()


def ask(study: "optuna.Study", config: TuneConfig, plan: Plan) -> "optuna.Trial":
    """The next trial. What it tries is a function of the seed, its place and the results so far."""
    import optuna

    place = sum(state_of(trial) != "interrupted" for trial in study.trials)
    with warnings.catch_warnings():  # older versions call constant_liar an experiment
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # A new one each time: a sampler that is started again would draw what it drew before.
        study.sampler = optuna.samplers.TPESampler(
            n_startup_trials=RANDOM_TRIALS,
            constant_liar=True,  # not what other trials are trying at the same time
            seed=mix(config.seed, "trial", place) % 2**32,
        )
    return study.ask(plan.space)


class TrialProcess:
    """A command of this package at work; it ends with the process that has started it.

    Attributes:
        lost: what a machine did to it; here there is nothing between it and us.
    """

    lost = ""

    def __init__(
        self, command: str, flags: list[str], threads: int, log: Path, current_folder: Path
    ) -> None:
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"fastllm.{command}", *flags, "--threads", str(threads)],
                cwd=current_folder,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the study, which stops the trials
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None before the end."""
        return self._process.poll()

    def terminate(self) -> None:
        """Asks the process to end."""
        self._process.terminate()

    def kill(self) -> None:
        """Ends the process and those that it has started, at once."""
        if self.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _end_with_parent() -> None:
    # Linux kills this process when the one that has started it dies, even by SIGKILL.
    set_parent_death_signal = 1
    _libc.prctl(set_parent_death_signal, signal.SIGKILL)


_libc = ctypes.CDLL(None)


class Run:
    """A trial that is running: the command as a process, in a folder of its own."""

    def __init__(self, trial: "optuna.Trial", config: TuneConfig, plan: Plan) -> None:
        self.trial = trial
        self.folder = trial_folder(config, trial.number)
        self.losses: list[tuple[float, int]] = []  # with the training's step
        self.ending = ""  # why this process has stopped it
        self._kill_at = math.inf
        self.folder.mkdir(exist_ok=True)
        settings = self.folder / "settings.toml"
        settings.write_text(to_toml({**plan.fixed, **trial.params}), encoding="utf-8")
        flags = ["--config", str(settings), "--out_dir", str(self.folder)]
        log = self.folder.absolute() / "log.txt"
        how = config.command, flags, plan.threads, log, Path.cwd()
        self.process: TrialProcess | RemoteTrial
        if config.launcher == "ray":
            from fastllm.integrations import ray

            self.process = ray.RemoteTrial(*how, on_gpu=plan.fixed.get("device") == "cuda")
        else:
            self.process = TrialProcess(*how)

    def read_losses(self) -> None:
        """Reports the new validation losses to the study, which may have the trial pruned."""
        # A trial that has started again repeats what came after its checkpoint.
        last = self.losses[-1][1] if self.losses else -1
        for line in read_metrics(self.folder / "metrics.jsonl", last):
            self._report(line["step"], line.get("val_loss"))
        if time.monotonic() >= self._kill_at:
            self.process.kill()

    def _report(self, step: int, loss: float | None) -> None:
        if loss is None or self.ending:
            return
        if not math.isfinite(loss):
            self.stop(f"the validation loss is {loss} at step {step}")
            return
        # By the count of validations: with an epoch between them, batch sizes differ in steps.
        self.trial.report(loss, len(self.losses))
        self.losses.append((loss, step))
        if self.trial.should_prune():
            self.stop("pruned")

    def stop(self, why: str) -> None:
        """Asks the process to end; one that does not is killed after a while."""
        if not self.ending and self.process.poll() is None:
            self.ending = why
            self._kill_at = time.monotonic() + GRACE_S
            self.process.terminate()

    def tell(self, study: "optuna.Study") -> None:
        """Records how the process ended.

        Raises:
            ValueError: it ended well, without a validation.
        """
        from optuna.trial import TrialState

        if self.ending == "interrupted" or self.process.lost:
            put_back(study, self.trial.number)
            return
        if self.losses:
            self.trial.set_user_attr("step", min(self.losses)[1])
        if self.ending == "pruned":
            study.tell(self.trial, state=TrialState.PRUNED)
        elif self.ending or self.process.poll():
            self.trial.set_user_attr("reason", self.ending or self._why())
            study.tell(self.trial, state=TrialState.FAIL)
        elif self.losses:
            study.tell(self.trial, min(self.losses)[0])
        else:
            raise ValueError(
                f"{self.folder} ended without a val_loss in metrics.jsonl, by which to compare "
                "trials; hold a part of the text out for validation"
            )

    def _why(self) -> str:
        log = (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in log.splitlines() if line.strip()]
        last = lines[-1].removeprefix("error: ") if lines else "nothing in log.txt"
        status = self.process.poll()
        assert status is not None
        if status >= 0:
            return last
        hint = ", as by a system short of memory" if status == -signal.SIGKILL else ""
        return f"killed by {signal.Signals(-status).name}{hint}, after: {last}"


def trial_folder(config: TuneConfig, number: int) -> Path:
    return config.out_dir / f"trial-{number:04d}"


def to_toml(settings: dict[str, Any]) -> str:
    """Settings as a config file. Of texts, numbers, booleans and lists, JSON is TOML as well."""
    return "".join(
        f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in settings.items()
    )


def best_of(trials: "Sequence[FrozenTrial]") -> "FrozenTrial | None":
    """The complete trial with the lowest loss, the first of equals; None before there is one."""
    return min((t for t in trials if state_of(t) == "complete"), key=loss_of, default=None)


def loss_of(trial: "FrozenTrial") -> float:
    """The lowest validation loss that it came to; not a number before the first."""
    return min(trial.intermediate_values.values(), default=math.nan)


def state_of(trial: "FrozenTrial") -> str:
    """complete, pruned, failed, interrupted; running or waiting."""
    if trial.state.name != "FAIL":
        return str(trial.state.name).lower()
    # What went wrong by itself has a reason.
    return "failed" if "reason" in trial.user_attrs else "interrupted"


def describe(trial: "FrozenTrial") -> str:
    """One line about a trial that has ended."""
    loss, step = loss_of(trial), trial.user_attrs.get("step")
    parts = [f"trial {trial.number:<4} {state_of(trial):11}"]
    parts.append("" if step is None else f"val_loss {loss:.4f} at step {step:,}")
    parts.append(describe_settings(trial.params))
    parts.append(f"{seconds(trial):,.0f} s")
    if reason := trial.user_attrs.get("reason"):
        parts.append(reason)
    return "  ".join(part for part in parts if part)


def describe_settings(settings: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {f'{value:.4g}' if isinstance(value, float) else value}"
        for name, value in settings.items()
    )


def seconds(trial: "FrozenTrial") -> float:
    return trial.duration.total_seconds() if trial.duration else 0.0


def write_results(study: "optuna.Study", config: TuneConfig, plan: Plan) -> None:
    """Brings trials.csv, best.toml and the trials' folders up to date."""
    trials = [trial for trial in study.trials if trial.state.is_finished()]
    best = best_of(trials)
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(["trial", "state", "val_loss", "step", "seconds", *plan.space, "reason"])
    for trial in trials:
        user, loss = trial.user_attrs, loss_of(trial)
        row = [trial.number, state_of(trial), "" if math.isnan(loss) else loss, user.get("step")]
        settings = [trial.params.get(name) for name in plan.space]
        writer.writerow([*row, round(seconds(trial), 1), *settings, user.get("reason")])
    with replace_file(config.out_dir / "trials.csv") as file:
        file.write(table.getvalue().encode())
    if best:
        comment = f"# {trial_folder(config, best.number)}: validation loss {loss_of(best):.4f}\n"
        with replace_file(config.out_dir / "best.toml") as file:
            file.write((comment + to_toml({**plan.fixed, **best.params})).encode())
    for trial in trials:
        folder = trial_folder(config, trial.number)
        if folder.exists() and (best is None or trial.number != best.number):
            for entry in folder.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                elif entry.name not in RECORD:
                    entry.unlink()


def report(study: "optuna.Study", config: TuneConfig, plan: Plan) -> None:
    """What the study has to say, in files and on stderr.

    Raises:
        ValueError: every trial has failed.
    """
    write_results(study, config, plan)
    trials = [trial for trial in study.trials if trial.state.is_finished()]
    states = [state_of(trial) for trial in trials]
    counts = {state: states.count(state) for state in dict.fromkeys(states)}
    tally = ", ".join(f"{count} {state}" for state, count in counts.items())
    best = best_of(trials)
    if best is None:
        failed = [trial for trial in trials if state_of(trial) == "failed"]
        if failed:
            folder = trial_folder(config, failed[-1].number)
            raise ValueError(
                f"no trial came to its end ({tally}); the last one that failed, {folder}: "
                f"{failed[-1].user_attrs['reason']}"
            )
        say("no trial has come to its end yet; the same command goes on")
        return
    plot_study(trials, plan, config.out_dir / "study.png")
    folder = trial_folder(config, best.number)
    say(f"trials      {tally}: {config.out_dir}/trials.csv, study.png")
    say(f"best        val_loss {loss_of(best):.4f} at step {best.user_attrs['step']:,}: {folder}")
    say(f"settings    {describe_settings(best.params)}")
    say(f"to train    python -m fastllm.{config.command} --config {config.out_dir}/best.toml")
    missing = config.trials - len([state for state in states if state != "interrupted"])
    if missing > 0:
        say(f"to go on    the same command again: {missing} of {config.trials} trials are missing")


def plot_study(trials: "Sequence[FrozenTrial]", plan: Plan, picture: Path) -> None:
    """Draws the losses in the order of the trials, and against each setting that was searched.

    Args:
        trials: those that have ended, at least one of them complete.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    columns = min(3, len(plan.space))
    rows = math.ceil(len(plan.space) / columns)
    figure = Figure(figsize=(10, 3.5 + 3 * rows), layout="constrained")
    grid = figure.add_gridspec(1 + rows, columns)
    history = figure.add_subplot(grid[0, :])

    numbers = [trial.number for trial in trials]
    complete = [loss_of(t) if state_of(t) == "complete" else math.inf for t in trials]
    history.step(
        numbers, list(itertools.accumulate(complete, min)), where="post", color="tab:gray",
        label="best so far",
    )  # fmt: skip
    _draw_losses(history, trials, numbers)
    history.set_xlabel("trial")
    history.xaxis.set_major_locator(MaxNLocator(integer=True))
    history.legend()

    for i, (name, searched) in enumerate(plan.space.items()):
        axes = figure.add_subplot(grid[1 + i // columns, i % columns])
        tried = [trial.params[name] for trial in trials]
        if isinstance(searched, CategoricalDistribution):
            choices = searched.choices
            tried = [choices.index(value) for value in tried]
            axes.set_xticks(range(len(choices)), [str(choice) for choice in choices])
            axes.set_xlim(-0.5, len(choices) - 0.5)
        elif isinstance(searched, FloatDistribution | IntDistribution):
            axes.set_xscale("log" if searched.log else "linear")
            axes.axvspan(searched.low, searched.high, color="tab:gray", alpha=0.08)
        _draw_losses(axes, trials, tried)
        axes.set_xlabel(name)
    figure.savefig(picture, dpi=120)


def _draw_losses(axes: "Axes", trials: "Sequence[FrozenTrial]", places: Sequence[Any]) -> None:
    """Every trial's loss at its place; one that failed has none, and is marked at the top."""
    styles: dict[str, dict[str, Any]] = {
        "complete": {"marker": "o", "color": "tab:blue", "label": "complete"},
        "pruned": {"marker": "v", "color": "tab:orange", "label": "pruned: lowest until then"},
        "failed": {"marker": "x", "color": "tab:red", "label": "failed"},
    }
    best = best_of(trials)
    for state, style in styles.items():
        points = [
            (place, 0.96 if state == "failed" else loss_of(trial))
            for place, trial in zip(places, trials, strict=True)
            if state_of(trial) == state
        ]
        if points:
            height = axes.get_xaxis_transform() if state == "failed" else axes.transData
            axes.scatter(*zip(*points, strict=True), transform=height, zorder=3, **style)
        if state == "complete" and best:
            place = places[[trial.number for trial in trials].index(best.number)]
            axes.scatter(
                place, loss_of(best), marker="*", s=250, color="tab:green", label="best", zorder=2
            )
    axes.set_ylabel("validation loss")
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    main(sys.argv[1:])
