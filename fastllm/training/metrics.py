"""The record of a run: metrics.jsonl, and the curves in loss.png."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from fastllm.files import replace_file

# `read_metrics` bisects for a step until this many bytes are left, and reads those.
BISECTED_BYTES = 2**16


class MetricsLog:
    """metrics.jsonl: one JSON object a line, appended as the run goes.

    Args:
        path: the file.
        first_step: drop the lines of this and later steps, which a resumed run writes again.
    """

    def __init__(self, path: Path, first_step: int = 0) -> None:
        kept = [line for line in read_metrics(path) if line["step"] < first_step]
        with replace_file(path) as file:
            file.writelines(json.dumps(line).encode() + b"\n" for line in kept)
        # Unbuffered: every line is in the file, however the run ends.
        self._file = path.open("ab", buffering=0)

    def write(self, **values: Any) -> None:
        try:
            self._file.write(json.dumps(values).encode() + b"\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from error

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path, after: int = -1) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl, up to a truncated one; no lines if the file does not exist.

    Args:
        after: skip the lines up to this step, by bisection.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        begin, end = 0, path.stat().st_size
        while after >= 0 and end - begin > BISECTED_BYTES:
            middle = (begin + end) // 2
            file.seek(middle)
            file.readline()
            line = _parse_line(file.readline())
            if line is None or line["step"] > after:
                end = middle
            else:
                begin = middle
        file.seek(begin)
        if begin:
            file.readline()
        while line := _parse_line(file.readline()):
            if line["step"] > after:
                yield line


def _parse_line(line: bytes) -> dict[str, Any] | None:
    try:
        values: dict[str, Any] = json.loads(line)
        values["step"] + 0
    except (ValueError, TypeError, KeyError):
        return None
    return values


def tokens_per_second(tokens: int, training_s: float) -> float:
    """The speed of training: over its steps, without validating, sampling and saving."""
    return tokens / training_s


def format_duration(seconds: float) -> str:
    """A time such as 1 min 10 s: to 5 s from a minute on, and to a minute from ten minutes on."""
    precision = 1 if seconds < 60 else 5 if seconds < 600 else 60
    total = max(1, round(seconds / precision) * precision)
    counts = {"h": total // 3600, "min": total // 60 % 60, "s": total % 60}
    return " ".join(f"{count} {unit}" for unit, count in counts.items() if count)


def resident_mb() -> float:
    """Resident memory of this process, in MiB."""
    return float(psutil.Process().memory_info().rss / 2**20)


def plot_losses(metrics: Path, picture: Path) -> None:
    """Plots the training and validation loss of metrics.jsonl by step."""
    # Imported here: it takes half a second, and most commands plot nothing.
    from matplotlib.figure import Figure

    lines = list(read_metrics(metrics))
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for key, label in (("loss", "training"), ("val_loss", "validation")):
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        if points:
            marker = "o" if key == "val_loss" else ""
            axes.plot(*zip(*points, strict=True), label=label, marker=marker)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    if lines:
        axes.legend()
    figure.savefig(picture, dpi=120)


def plot_runs(runs: Mapping[str, Sequence[Mapping[str, Any]]], picture: Path) -> None:
    """Plots the validation losses of runs by step, and their training losses beside them.

    Args:
        runs: names, and the lines of each run's metrics.jsonl.
        picture: the file to write; its suffix is the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    sides = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, key, title in zip(
        sides, ("loss", "val_loss"), ("training", "validation"), strict=True
    ):
        for name, lines in runs.items():
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            # Also without points: a run has the same colour on both sides.
            steps, losses = zip(*points, strict=True) if points else ((), ())
            axes.plot(steps, losses, label=name, marker="o" if key == "val_loss" else "", ms=3)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    sides[0].set_ylabel("loss (nats per token)")
    sides[1].legend()
    figure.savefig(picture, dpi=120)
