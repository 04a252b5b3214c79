"""The results of a study: its best trial, trials.csv, best.toml and study.png."""

import csv
import io
import itertools
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastllm.files import replace_file
from fastllm.tuning.search import Plan

if TYPE_CHECKING:
    import optuna
    from matplotlib.axes import Axes
    from optuna.trial import FrozenTrial

# Files kept of a trial that is not the best; its checkpoints may take gigabytes.
RECORD = ("settings.toml", "config.json", "metrics.jsonl", "log.txt", "loss.png")


def finished_trials(study: "optuna.Study") -> "list[FrozenTrial]":
    return [trial for trial in study.trials if trial.state.is_finished()]


def best_trial(trials: "Sequence[FrozenTrial]") -> "FrozenTrial | None":
    """The complete trial with the lowest loss, the first of equals; None if none is complete."""
    complete = (trial for trial in trials if state_of(trial) == "complete")
    return min(complete, key=lowest_loss, default=None)


def lowest_loss(trial: "FrozenTrial") -> float:
    """The trial's lowest validation loss; NaN before its first validation."""
    return min(trial.intermediate_values.values(), default=math.nan)


def state_of(trial: "FrozenTrial") -> str:
    """complete, pruned, failed, interrupted, running or waiting."""
    if trial.state.name != "FAIL":
        return str(trial.state.name).lower()
    # Only trials that failed on their own have a reason.
    return "failed" if "reason" in trial.user_attrs else "interrupted"


def describe_trial(trial: "FrozenTrial") -> str:
    """One line about a finished trial."""
    loss, step = lowest_loss(trial), trial.user_attrs.get("step")
    parts = [
        f"trial {trial.number:<4} {state_of(trial):11}",
        "" if step is None else f"val_loss {loss:.4f} at step {step:,}",
        describe_settings(trial.params),
        f"{_seconds(trial):,.0f} s",
        trial.user_attrs.get("reason", ""),
    ]
    return "  ".join(part for part in parts if part)


def describe_settings(settings: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {f'{value:.4g}' if isinstance(value, float) else value}"
        for name, value in settings.items()
    )


def _seconds(trial: "FrozenTrial") -> float:
    return trial.duration.total_seconds() if trial.duration else 0.0


def to_toml(settings: dict[str, Any]) -> str:
    """Settings as a config file; JSON strings, numbers, booleans and lists are valid TOML."""
    return "".join(
        f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in settings.items()
    )


def write_results(study: "optuna.Study", plan: Plan) -> None:
    """Brings trials.csv and best.toml up to date, and cleans the folders of the other trials."""
    trials = finished_trials(study)
    best = best_trial(trials)
    folder = plan.config.out_dir
    with replace_file(folder / "trials.csv") as file:
        file.write(_table(trials, plan).encode())
    if best:
        comment = f"# {plan.trial_folder(best.number)}: validation loss {lowest_loss(best):.4f}\n"
        with replace_file(folder / "best.toml") as file:
            file.write((comment + to_toml({**plan.fixed, **best.params})).encode())
    for trial in trials:
        if best is None or trial.number != best.number:
            _remove_all_but_record(plan.trial_folder(trial.number))


def _table(trials: "Sequence[FrozenTrial]", plan: Plan) -> str:
    """One row of CSV for each trial."""
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(["trial", "state", "val_loss", "step", "seconds", *plan.space, "reason"])
    for trial in trials:
        loss, step = lowest_loss(trial), trial.user_attrs.get("step")
        row = [trial.number, state_of(trial), "" if math.isnan(loss) else loss, step]
        settings = [trial.params.get(name) for name in plan.space]
        reason = trial.user_attrs.get("reason")
        writer.writerow([*row, round(_seconds(trial), 1), *settings, reason])
    return table.getvalue()


def _remove_all_but_record(trial_folder: Path) -> None:
    if not trial_folder.exists():
        return
    for entry in trial_folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name not in RECORD:
            entry.unlink()


def summarize(study: "optuna.Study", plan: Plan) -> list[str]:
    """Lines about the study: how its trials ended, the best one, and how to use it.

    Raises:
        ValueError: every trial failed.
    """
    trials = finished_trials(study)
    states = [state_of(trial) for trial in trials]
    tally = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    config, best = plan.config, best_trial(trials)
    if best is None:
        failed = [trial for trial in trials if state_of(trial) == "failed"]
        if failed:
            raise ValueError(
                f"no trial completed ({tally}); the last one that failed, "
                f"{plan.trial_folder(failed[-1].number)}: {failed[-1].user_attrs['reason']}"
            )
        return ["no trial has completed yet; the same command continues the study"]
    loss, step = lowest_loss(best), best.user_attrs["step"]
    lines = [
        f"trials      {tally}: {config.out_dir}/trials.csv, study.png",
        f"best        val_loss {loss:.4f} at step {step:,}: {plan.trial_folder(best.number)}",
        f"settings    {describe_settings(best.params)}",
        f"to train    fastllm {config.command} --config {config.out_dir}/best.toml",
    ]
    missing = config.trials - (len(states) - states.count("interrupted"))
    if missing > 0:
        lines.append(
            f"to continue the same command again: {missing} of {config.trials} trials are missing"
        )
    return lines


def plot_study(trials: "Sequence[FrozenTrial]", plan: Plan, picture: Path) -> None:
    """Plots the losses in the order of the trials, and against each setting that was searched.

    Args:
        trials: finished trials, at least one of them complete.
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
    complete = [lowest_loss(t) if state_of(t) == "complete" else math.inf for t in trials]
    history.step(
        numbers,
        list(itertools.accumulate(complete, min)),
        where="post",
        color="tab:gray",
        label="best so far",
    )
    _plot_losses(history, trials, numbers)
    history.set_xlabel("trial")
    history.xaxis.set_major_locator(MaxNLocator(integer=True))
    history.legend()

    for i, (name, distribution) in enumerate(plan.space.items()):
        axes = figure.add_subplot(grid[1 + i // columns, i % columns])
        values = [trial.params[name] for trial in trials]
        if isinstance(distribution, CategoricalDistribution):
            choices = distribution.choices
            values = [choices.index(value) for value in values]
            axes.set_xticks(range(len(choices)), [str(choice) for choice in choices])
            axes.set_xlim(-0.5, len(choices) - 0.5)
        elif isinstance(distribution, FloatDistribution | IntDistribution):
            axes.set_xscale("log" if distribution.log else "linear")
            axes.axvspan(distribution.low, distribution.high, color="tab:gray", alpha=0.08)
        _plot_losses(axes, trials, values)
        axes.set_xlabel(name)
    figure.savefig(picture, dpi=120)


def _plot_losses(axes: "Axes", trials: "Sequence[FrozenTrial]", x: Sequence[Any]) -> None:
    """Plots the loss of every trial at its x; failed trials are marked at the top."""
    styles: dict[str, dict[str, Any]] = {
        "complete": {"marker": "o", "color": "tab:blue", "label": "complete"},
        "pruned": {"marker": "v", "color": "tab:orange", "label": "pruned: lowest until then"},
        "failed": {"marker": "x", "color": "tab:red", "label": "failed"},
    }
    best = best_trial(trials)
    for state, style in styles.items():
        failed = state == "failed"
        points = [
            (at, 0.96 if failed else lowest_loss(trial))
            for at, trial in zip(x, trials, strict=True)
            if state_of(trial) == state
        ]
        if points:
            # Failed trials have no loss: their y is a fraction of the height.
            transform = axes.get_xaxis_transform() if failed else axes.transData
            axes.scatter(*zip(*points, strict=True), transform=transform, zorder=3, **style)
        if state == "complete" and best:
            at = x[[trial.number for trial in trials].index(best.number)]
            axes.scatter(
                at, lowest_loss(best), marker="*", s=250, color="tab:green", label="best", zorder=2
            )
    axes.set_ylabel("validation loss")
    axes.grid(alpha=0.3)
