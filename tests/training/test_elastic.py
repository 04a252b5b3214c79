"""torchrun restarts the processes of a run when one of them dies."""

import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from fastllm.training.metrics import read_metrics

pytestmark = [pytest.mark.processes, pytest.mark.kill]

FLAGS = (
    "--max_seq_len 16 --batch_size 4 --hidden_size 16 --num_layers 1 --val_fraction 0 --quiet "
    "--log_interval 1 --save_interval 5 --threads 1"
)
ONE_MACHINE = ("--standalone", "--nproc_per_node=2")


def torchrun(text: Path, run_dir: Path, steps: int, *flags: str) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", *flags),
        *("-m", "fastllm.train", *FLAGS.split(), "--max_steps", str(steps)),
        *("--file_path", str(text), "--out_dir", str(run_dir)),
    ]


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "timed out"
        time.sleep(0.005)


def test_a_restart_does_not_take_over_another_run(tmp_path: Path, text: Path) -> None:
    """A command that is refused at first is refused after the restart too."""
    for flags, status in ((), 0), (("--max_restarts=1",), 1):
        ended = subprocess.run(
            torchrun(text, tmp_path / "run", 3, *ONE_MACHINE, *flags),
            stderr=subprocess.PIPE,
            text=True,
        )
        assert ended.returncode == status, ended.stderr
    assert ended.stderr.count("holds a run already; --resume continues it") == 2
    assert ended.stderr.count("rank 0 failed") == 2


def test_twenty_kills_change_nothing(tmp_path: Path, text: Path) -> None:
    """A process dies at random instants; the weights are those of an undisturbed run.

    Two torchruns represent two machines, each of which counts the restarts on its own.
    """
    steps, rng = 400, random.Random(1)
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    undisturbed_run = torchrun(text, undisturbed, steps, *ONE_MACHINE)
    subprocess.run(undisturbed_run, check=True)  # what it prints tells why it failed
    metrics = disturbed / "metrics.jsonl"

    def logged() -> int:
        return metrics.stat().st_size if metrics.exists() else 0

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = f"--rdzv_endpoint=127.0.0.1:{free.getsockname()[1]}"
    one_of_two = ("--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", meeting)
    command = torchrun(text, disturbed, steps, *one_of_two, "--max_restarts=20")
    agents = [psutil.Popen(command, stderr=subprocess.DEVNULL) for _ in range(2)]

    def processes() -> set[psutil.Process]:
        return {process for agent in agents for process in agent.children()}

    try:
        before: set[psutil.Process] = set()
        for kill in range(20):
            wait_for(lambda: len(processes() - before) == 2)  # noqa: B023
            at_start = logged()
            if kill % 5:  # the others may die before their first step
                wait_for(lambda: logged() != at_start)  # noqa: B023
            time.sleep(rng.uniform(0, 0.2))
            victim, before = rng.choice(agents).children(), processes()
            for process in victim:
                process.kill()
        assert [agent.wait(120) for agent in agents] == [0, 0]
    finally:
        for agent in agents:
            if agent.is_running():
                for process in [*agent.children(recursive=True), agent]:
                    process.kill()
                agent.wait()
    assert [line["step"] for line in read_metrics(metrics)] == list(range(1, steps + 1))
    for file in ("model.safetensors", "training_state/optimizer.safetensors"):
        ours, theirs = load_file(disturbed / file), load_file(undisturbed / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
