"""The curves of several runs in one picture, and a table: `fastllm compare RUN...`."""

import json
import math
import sys
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator

from fastllm.command import command, errors_in_one_line, log, parse_settings
from fastllm.flags import CommandSettings

# What no two runs share, and what says nothing about the model.
NOT_COMPARED = {"fastllm_version", "threads", "num_workers"}


class CompareConfig(CommandSettings):
    """Draw the losses of several runs of train or finetune in one picture, with a table."""

    positional: ClassVar = "runs"
    examples: ClassVar = """
fastllm compare runs/book runs/book-2
fastllm compare runs/* --out curves.svg
"""

    runs: list[Path] = Field(min_length=1)
    """Folders of runs, finished or not."""
    out: Path = Path("compare.png")
    """Picture to write: .png, .svg or .pdf."""

    @field_validator("out")
    @classmethod
    def _check_out(cls, out: Path) -> Path:
        if out.suffix not in (".png", ".svg", ".pdf"):
            raise ValueError("must end in .png, .svg or .pdf")
        return out


@command
def main(arguments: list[str]) -> None:
    config = parse_settings(CompareConfig, arguments)
    # After the flags: help and their errors need not wait for matplotlib and numpy.
    from fastllm.training.metrics import plot_runs, read_metrics

    with errors_in_one_line(OSError, ValueError):
        runs = dict(zip(names_of(config.runs), config.runs, strict=True))
        lines = {name: list(read_metrics(run / "metrics.jsonl")) for name, run in runs.items()}
        for name, run in runs.items():
            if not lines[name]:
                problem = "holds no metrics.jsonl" if run.exists() else "does not exist"
                raise ValueError(f"{run} {problem}; give the folders of runs")
        settings = differences({name: settings_of(run) for name, run in runs.items()})
        plot_runs(lines, config.out)
        rows = [{"run": name, **summary(lines[name]), **settings[name]} for name in runs]
        for line in table(rows):
            print(line)
    if {"tokenizer", "vocab_size"} & settings[rows[0]["run"]].keys():
        log(
            "note: the runs have different tokenizers, so their losses per token do not compare; "
            "the bits per character that `fastllm evaluate` shows do"
        )
    log(f"picture     {config.out}")


def names_of(runs: list[Path]) -> list[str]:
    """The folders' own names, or their paths if two are called the same.

    Raises:
        ValueError: a folder is given twice.
    """
    folders = [run.resolve() for run in runs]
    if len({*folders}) < len(folders):
        raise ValueError("a run is given twice")
    names = [folder.name for folder in folders]
    return names if len({*names}) == len(names) else [str(run) for run in runs]


def settings_of(run: Path) -> dict[str, Any]:
    """The settings in a run's config.json.

    Raises:
        ValueError: there are none; the message names the file.
    """
    file = run / "config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not a run's config.json: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{file} is not a run's config.json: expected a JSON object")
    return settings


def differences(settings: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each run, the settings in which the runs differ."""
    names = dict.fromkeys(name for each in settings.values() for name in each)
    differing = [
        name
        for name in names
        if name not in NOT_COMPARED
        and len({json.dumps(each.get(name)) for each in settings.values()}) > 1
    ]
    return {run: {name: each.get(name) for name in differing} for run, each in settings.items()}


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """A run's steps and losses; None where nothing was measured."""
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    validations = [
        (line["val_loss"], line["step"]) for line in lines if line.get("val_loss") is not None
    ]
    finite = [each for each in validations if math.isfinite(each[0])]
    best, step = min(finite, default=(None, None))
    return {
        "steps": lines[-1]["step"],
        "seconds": round(lines[-1].get("elapsed_s") or 0),
        "loss": losses[-1] if losses else None,
        "val_loss": validations[-1][0] if validations else None,
        "best": best,
        "at step": step,
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines with a heading; columns are as wide as their widest cell."""
    cells = [list(rows[0]), *([cell_text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]


def cell_text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float) and value >= 0.1:
        return f"{value:.4f}".removesuffix(".0000")
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    main(sys.argv[1:])
