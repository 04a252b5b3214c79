"""Training with two processes of one thread each, compared with one process of two threads.

    pip install '.[ray,deepspeed]'
    python benchmarks/distributed.py --file_path book.txt

The model and the cores are the same, so the difference is the cost of dividing a step. Every
contestant is `python -m fastllm.train` with the same flags; they take turns, `--rounds` times each.
Speeds are medians over the logged steps except the first two, losses those of the last step.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

from pydantic import Field

from fastllm.command import CommandSettings, parse_settings
from fastllm.training.metrics import read_metrics

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
TRAIN = ("-m", "fastllm.train")
# How each contestant is started, and its flags.
CONTESTANTS: dict[str, tuple[Sequence[str], str]] = {
    "one process": (TRAIN, "--threads 2"),
    "ddp": ((*TORCHRUN, *TRAIN), "--threads 1"),
    "fsdp": ((*TORCHRUN, *TRAIN), "--threads 1 --parallel fsdp"),
    "pipeline": ((*TORCHRUN, *TRAIN), "--threads 1 --parallel pipeline"),
    "ray": (TRAIN, "--threads 1 --launcher ray --num_workers 2"),
    "deepspeed 1": (TRAIN, "--threads 1 --launcher deepspeed --num_workers 2 --zero_stage 1"),
    "deepspeed 2": (TRAIN, "--threads 1 --launcher deepspeed --num_workers 2 --zero_stage 2"),
    "deepspeed 3": (TRAIN, "--threads 1 --launcher deepspeed --num_workers 2 --zero_stage 3"),
}
# As in `python -m fastllm.bench`, but without dropout, so that all compute the same.
SHAPES = {
    "B": "--hidden_size 128 --num_layers 3 --num_heads 4 --max_seq_len 64 --batch_size 32",
    "D": "--hidden_size 384 --num_layers 6 --num_heads 6 --max_seq_len 256 --batch_size 8",
}
STEPS = {"B": (120, 10), "D": (12, 1)}  # steps, and steps between two lines of metrics.jsonl


class DistributedConfig(CommandSettings):
    """Measure training with two processes, divided in every way, against one process."""

    file_path: Path
    """UTF-8 text to train on."""
    config: Literal["B", "D"] | None = None
    """Measure only this shape."""
    only: str = ""
    """Measure only the contestants whose names contain this."""
    rounds: Annotated[int, Field(ge=1, le=99)] = 3
    """Runs of each contestant."""


def run(name: str, shape: str, file_path: Path) -> tuple[float, float]:
    """Tokens per second, and the loss of the last step."""
    start, flags = CONTESTANTS[name]
    steps, interval = STEPS[shape]
    with TemporaryDirectory() as folder:
        out_dir = Path(folder) / "run"
        command = [
            *(sys.executable, *start, "--file_path", str(file_path), "--out_dir", str(out_dir)),
            *SHAPES[shape].split(),
            *("--dropout", "0", "--max_steps", str(steps), "--log_interval", str(interval)),
            *("--val_fraction", "0", "--quiet", *flags.split()),
        ]
        ended = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if ended.returncode:
            raise SystemExit(f"error: {name} ended with {ended.returncode}:\n{ended.stderr}")
        lines = list(read_metrics(out_dir / "metrics.jsonl"))
    return median(line["tokens_per_second"] for line in lines[2:]), lines[-1]["loss"]


def main(arguments: list[str]) -> None:
    config = parse_settings(DistributedConfig, arguments)
    names = [name for name in CONTESTANTS if config.only in name]
    for shape in [config.config] if config.config else SHAPES:
        speeds: dict[str, list[float]] = {name: [] for name in names}
        losses: dict[str, float] = {}
        for _ in range(config.rounds):
            for name in names:
                speed, losses[name] = run(name, shape, config.file_path)
                speeds[name].append(speed)
        print(
            f"\n{shape:14}{'tokens/s':>10}{'of the first':>14}{'loss':>14}{'rel. difference':>18}"
        )
        first = names[0]
        for name in names:
            speed = median(speeds[name])
            share = speed / median(speeds[first])
            difference = abs(losses[name] / losses[first] - 1)
            print(f"{name:14}{speed:10,.0f}{share:14.2f}{losses[name]:14.6f}{difference:18.1e}")


if __name__ == "__main__":
    main(sys.argv[1:])
