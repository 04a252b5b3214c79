"""Ray: training on two machines, which continues after a worker dies, and a study."""

import csv
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from pydoc_data.topics import topics

import psutil
import pytest
import torch
from safetensors.torch import load_file

from fastllm import tune
from fastllm.threads import available_cores
from fastllm.train import main
from tests.conftest import REPOSITORY, MakeTrainer
from tests.training.test_distributed import SMALL, losses

pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")
pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(available_cores() < 2, reason="two processes need two cores"),
]

STEPS = 120


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of a cluster that appears to Ray as two machines of one core each."""
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


def named(name: str, parent: psutil.Process) -> list[psutil.Process]:
    """Descendants of the process with this name, which Ray gives to its workers."""
    found = []
    for child in parent.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if name in child.name():
                found.append(child)
    return found


def test_a_run_survives_a_worker(cluster: str, text: Path, tmp_path: Path) -> None:
    """A worker is killed after the first checkpoint; the weights are still those of one process."""
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
            workers = named("TrainWorke", psutil.Process())
            time.sleep(0.05)
        machines = {worker.ppid() for worker in workers}
        workers[-1].kill()
        _, said = run.communicate(timeout=100)
    finally:
        run.kill()
    assert run.returncode == 0, said
    assert "has failed" in said and "restarting from the last checkpoint" in said
    assert len(machines) == 2
    expected, found = losses(one), losses(two)
    assert len(found) == STEPS
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    weights = load_file(two / "model.safetensors")
    for name, tensor in load_file(one / "model.safetensors").items():
        # A key bias has a gradient of rounding errors alone, from which Adam makes full steps.
        if not name.endswith("qkv_proj.bias"):
            assert (weights[name] - tensor).norm() <= 1e-3 * tensor.norm(), name
    assert not (two / ".ray").exists()


def test_a_study(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two trials at a time on a local cluster give the same losses as without Ray.

    One of them is lost and tried again.
    """
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.chdir(tmp_path)
    flags = f"--file_path {text.name} {SMALL} --max_steps 300 --eval_interval 50".split()
    search = "--search lr=1e-4:1e-2:log --trials 2 --seed 1".split()

    def rows(folder: str) -> list[dict[str, str]]:
        return list(csv.DictReader((tmp_path / folder / "trials.csv").open(newline="")))

    tune.main([*search, "--out_dir", "here", "--", *flags])
    expected = rows("here")
    command = [sys.executable, "-m", "fastllm.tune", *search, "--launcher", "ray", "--jobs", "2"]
    study = subprocess.Popen(
        [*command, "--out_dir", "there", "--", *flags], stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        trials: list[psutil.Process] = []
        while len(trials) < 2:
            assert study.poll() is None and time.monotonic() < deadline
            actors = named("TrialProcess", psutil.Process(study.pid))
            trials = [trial for actor in actors for trial in actor.children()]
            time.sleep(0.05)
        actors[0].kill()
        psutil.wait_procs(trials[:1], timeout=5)
        orphaned = trials[0].is_running()
        ray_processes = psutil.Process(study.pid).children(recursive=True)
        _, said = study.communicate(timeout=100)
    finally:
        study.kill()
    assert study.returncode == 0, said
    assert not orphaned
    assert " was lost: " in said
    found = rows("there")
    assert sorted(trial["state"] for trial in found) == ["complete", "complete", "interrupted"]
    results = [
        {trial["lr"]: trial["val_loss"] for trial in trials if trial["state"] == "complete"}
        for trials in (found, expected)
    ]
    assert results[0] == results[1] and len(results[0]) == 2
    _, alive = psutil.wait_procs(ray_processes, timeout=20)
    assert not alive


def test_the_first_worker_stops_for_the_command(make_trainer: MakeTrainer) -> None:
    """By its deadline, which leaves the settings alone, and by its signals."""
    from fastllm.integrations.ray import STOP, _prepare_to_stop

    trainer = make_trainer("run", "--epochs", "100000", "--max_minutes", "10")
    _prepare_to_stop(trainer, deadline=time.time() + 60)
    assert 0.9 < trainer.max_minutes <= 1
    assert trainer.config.max_minutes == 10
    (trainer.run_dir / STOP).write_text(str(int(signal.SIGTERM)))
    trainer.train()
    assert trainer.stopped_by == signal.SIGTERM


def refused(command: str, text: Path, folder: Path) -> str:
    """The error message of a command that must fail before it begins."""
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


def test_too_few_cores(text: Path, tmp_path: Path) -> None:
    cores = available_cores()
    said = refused(
        f"train --launcher ray --num_workers {cores + 1} --batch_size 4096", text, tmp_path
    )
    assert f"error: Ray's machines have too few cores ({cores}) for {cores + 1} processes" in said
    said = refused(f"tune --launcher ray --jobs 2 -- --threads {cores}", text, tmp_path)
    assert f"error: Ray's machines have too few cores ({cores}) for 2 processes ({cores} " in said
    assert not (tmp_path / "run").exists()


def test_waiting_for_cores_can_be_stopped(cluster: str, text: Path, tmp_path: Path) -> None:
    """A trial and a command that wait for cores end at once when they are stopped."""
    import ray

    from fastllm.integrations.ray import RemoteTrial

    class Holder:
        def hold(self) -> None: ...

    ray.init(cluster, log_to_driver=False, logging_level=logging.ERROR)
    try:
        holders = [ray.remote(Holder).options(num_cpus=1).remote() for _ in range(2)]
        ray.get([holder.hold.remote() for holder in holders])
        trial = RemoteTrial("train", [], 1, tmp_path / "log.txt", tmp_path, on_gpu=False)
        assert trial.poll() is None
        trial.terminate()
        assert trial.poll() == -signal.SIGTERM
        flags = f"--launcher ray --num_workers 2 --file_path {text} --out_dir {tmp_path / 'run'}"
        run = subprocess.Popen(
            [sys.executable, "-m", "fastllm.train", *flags.split()],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "RAY_ADDRESS": cluster},
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert run.stderr is not None
            assert "they take a while to start" in run.stderr.readline()
            time.sleep(1)
            run.terminate()
            assert run.wait(60) == 128 + signal.SIGTERM
        finally:
            run.kill()
    finally:
        ray.shutdown()
    assert {file.name for file in (tmp_path / "run").iterdir()} == {"ray.log"}


def test_no_cluster(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    said = refused("train --launcher ray --num_workers 2", text, tmp_path)
    assert said.startswith("error: no Ray cluster at RAY_ADDRESS=127.0.0.1:9")
