"""Training under Ray, and what it is for: a run that goes on when a worker has died."""

import os
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import psutil
import pytest
import torch
from safetensors.torch import load_file

from fastllm.threads import available_cores
from fastllm.train import main
from tests.conftest import REPOSITORY
from tests.training.test_processes import SMALL, losses

pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")

STEPS = 120


@pytest.mark.skipif(available_cores() < 2, reason="two workers need two cores")
def test_a_run_survives_a_worker(tmp_path: Path) -> None:
    """Killed after the first checkpoint, the run ends with the weights of one process."""
    text, one, two = (tmp_path / name for name in ("text.txt", "one", "two"))
    text.write_text("\n".join(topics.values())[:6000], "utf-8")
    flags = f"{SMALL} --max_steps {STEPS} --save_interval 10 --file_path"
    main([*flags.split(), str(text), "--out_dir", str(one)])
    command = [sys.executable, "-m", "fastllm.train", *flags.split(), os.path.relpath(text)]
    launched = ["--launcher", "ray", "--num_workers", "2", "--out_dir", os.path.relpath(two)]
    run = subprocess.Popen(
        [*command, *launched],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.PIPE,
        text=True,
    )
    of_ray: list[psutil.Process] = []
    try:
        workers: list[psutil.Process] = []
        deadline = time.monotonic() + 100
        while not (workers and any(two.glob("checkpoints/step-*"))):
            assert run.poll() is None and time.monotonic() < deadline
            of_ray = psutil.Process(run.pid).children(recursive=True)
            workers = [child for child in of_ray if "TrainWorke" in child.name()]
            time.sleep(0.05)
        workers[-1].kill()
        _, said = run.communicate(timeout=100)
    finally:
        run.kill()
    assert run.returncode == 0, said
    assert "has failed" in said and "starting again, from the last checkpoint" in said
    expected, found = losses(one), losses(two)
    assert len(found) == STEPS
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    weights = load_file(two / "model.safetensors")
    for name, tensor in load_file(one / "model.safetensors").items():
        # The gradient of a key's bias is zero but for rounding, which Adam makes steps of.
        if not name.endswith("qkv_proj.bias"):
            assert (weights[name] - tensor).norm() <= 1e-3 * tensor.norm(), name
    _, alive = psutil.wait_procs(of_ray, timeout=20)
    assert not alive
    assert not (two / ".ray").exists()
