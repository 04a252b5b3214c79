"""Under Ray: training on two machines, which goes on when a worker has died, and a study."""

import csv
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import psutil
import pytest
import torch
from safetensors.torch import load_file

from fastllm import tune
from fastllm.threads import available_cores
from fastllm.train import main
from tests.conftest import REPOSITORY
from tests.training.test_processes import SMALL, losses

pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")
pytestmark = pytest.mark.skipif(available_cores() < 2, reason="two processes need two cores")

STEPS = 120


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of two machines of one core each, as far as Ray can tell."""
    from ray.cluster_utils import Cluster

    machine = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=machine)
    try:
        cluster.add_node(**machine)
        yield cluster.address
    finally:
        cluster.shutdown()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(topics.values())[:6000], "utf-8")
    return text


def test_a_run_survives_a_worker(cluster: str, text: Path, tmp_path: Path) -> None:
    """Killed after the first checkpoint, the run ends with the weights of one process."""
    one, two = tmp_path / "one", tmp_path / "two"
    flags = f"{SMALL} --max_steps {STEPS} --save_interval 10 --file_path"
    main([*flags.split(), str(text), "--out_dir", str(one)])
    command = [sys.executable, "-m", "fastllm.train", *flags.split(), os.path.relpath(text)]
    launched = ["--launcher", "ray", "--num_workers", "2", "--out_dir", os.path.relpath(two)]
    run = subprocess.Popen(
        [*command, *launched],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "RAY_ADDRESS": cluster},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        workers: list[psutil.Process] = []
        deadline = time.monotonic() + 100
        while not (workers and any(two.glob("checkpoints/step-*"))):
            assert run.poll() is None and time.monotonic() < deadline
            of_ray = psutil.Process().children(recursive=True)
            workers = [child for child in of_ray if "TrainWorke" in child.name()]
            time.sleep(0.05)
        machines = {worker.ppid() for worker in workers}
        workers[-1].kill()
        _, said = run.communicate(timeout=100)
    finally:
        run.kill()
    assert run.returncode == 0, said
    assert "has failed" in said and "starting again, from the last checkpoint" in said
    assert len(machines) == 2
    expected, found = losses(one), losses(two)
    assert len(found) == STEPS
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    weights = load_file(two / "model.safetensors")
    for name, tensor in load_file(one / "model.safetensors").items():
        # The gradient of a key's bias is zero but for rounding, which Adam makes steps of.
        if not name.endswith("qkv_proj.bias"):
            assert (weights[name] - tensor).norm() <= 1e-3 * tensor.norm(), name
    assert not (two / ".ray").exists()


def test_a_study(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a Ray of its own, two trials at a time, one of which is lost, come to what others do."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.chdir(tmp_path)
    flags = f"--file_path {text.name} {SMALL} --max_steps 300 --eval_interval 50".split()
    search = "--search lr=1e-4:1e-2:log --trials 3 --seed 1".split()

    def rows(folder: str) -> list[dict[str, str]]:
        return list(csv.DictReader((tmp_path / folder / "trials.csv").open(newline="")))

    tune.main([*search, "--out_dir", "here", "--", *flags])
    expected = rows("here")
    command = [sys.executable, "-m", "fastllm.tune", *search, "--launcher", "ray", "--jobs", "2"]
    study = subprocess.Popen(
        [*command, "--out_dir", "there", "--", *flags], stderr=subprocess.PIPE, text=True
    )
    of_ray: list[psutil.Process] = []
    try:
        actors: list[psutil.Process] = []
        deadline = time.monotonic() + 60
        while len(actors) < 2:
            assert study.poll() is None and time.monotonic() < deadline
            of_ray = psutil.Process(study.pid).children(recursive=True)
            actors = [child for child in of_ray if "TrialProcess" in child.name()]
            time.sleep(0.05)
        actors[0].kill()
        _, said = study.communicate(timeout=100)
    finally:
        study.kill()
    assert study.returncode == 0, said
    found = rows("there")
    lost = [trial["trial"] for trial in found if trial["state"] == "failed"]
    assert len(lost) == 1
    assert "lost on its machine" in found[int(lost[0])]["reason"]
    for trial, same in zip(found, expected, strict=True):
        if trial["trial"] not in lost:
            assert {**trial, "seconds": ""} == {**same, "seconds": ""}
    _, alive = psutil.wait_procs(of_ray, timeout=20)
    assert not alive


def refused(command: str, text: Path, folder: Path) -> str:
    """What the command says, which ends before it has begun."""
    name, *flags = command.split()
    if name == "train":
        flags = [*flags, "--file_path", str(text), "--out_dir", str(folder / "run")]
    else:
        flags = ["--out_dir", str(folder / "study"), *flags, "--file_path", str(text)]
    result = subprocess.run(
        [sys.executable, "-m", f"fastllm.{name}", *flags],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.PIPE,
        text=True,
        timeout=100,
    )
    assert result.returncode == 1
    return result.stderr


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train --launcher ray --num_workers 9", "9 processes of 1 cores each do not fit on Ray's"),
        ("tune --launcher ray --jobs 2 -- --threads 9", "2 processes of 9 cores each do not fit"),
    ],
)
def test_too_many(command: str, message: str, text: Path, tmp_path: Path) -> None:
    assert message in refused(command, text, tmp_path)
    assert not (tmp_path / "run").exists()


def test_no_cluster(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    said = refused("train --launcher ray --num_workers 2", text, tmp_path)
    assert said.startswith("error: there is no Ray at RAY_ADDRESS=127.0.0.1:9")
