"""DeepSpeed trains as one process does, whatever ZeRO shards."""

import json
import os
import signal
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

from fastllm.train import main
from tests.conftest import REPOSITORY
from tests.training.test_distributed import SMALL, losses, spawn, train_together

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install '.[deepspeed]'")
pytestmark = pytest.mark.deepspeed

ODD = "--file_path {short} --max_seq_len 9 --val_fraction 0.03 --batch_size 5 --max_steps 12"
DEEPSPEED = "--launcher deepspeed"
# Flags of runs that have the same results in one process and, with further flags, under DeepSpeed.
RUNS = {
    "stage-1": ("--max_steps 20", "--zero_stage 1"),
    "stage-2": ("--max_steps 20", "--zero_stage 2"),
    "stage-3": ("--max_steps 20", "--zero_stage 3"),
    "offload-2": ("--max_steps 20", "--zero_stage 2 --offload cpu"),
    "offload-3": ("--max_steps 20", "--zero_stage 3 --offload cpu"),
    # 5 sequences for 2 ranks; the last batch of an epoch has one, for rank 1 alone.
    "odd-2": (ODD, "--zero_stage 2"),
    "odd-3": (ODD, "--zero_stage 3"),
    "accumulated-1": ("--max_steps 9 --grad_accum 3 --lr_schedule cosine", "--zero_stage 1"),
    "accumulated-2": ("--max_steps 9 --grad_accum 3 --lr_schedule cosine", "--zero_stage 2"),
    "accumulated-3": ("--max_steps 9 --grad_accum 3 --lr_schedule cosine", "--zero_stage 3"),
    "tied-3": ("--max_steps 9 --tie_word_embeddings --weight_decay 0.1", "--zero_stage 3"),
    "adamw-1": ("--max_steps 9 --optimizer adamw --weight_decay 0.1 --max_grad_norm 0.3", ""),
    # Resumed at step 10 of a run of one process or of another stage.
    "resumed-1": ("--max_steps 20 --resume", "--zero_stage 1"),
    "resumed-2": ("--max_steps 20 --resume", "--deepspeed_config {folder}/stage-2.json"),
    "resumed-3": ("--max_steps 20 --resume", ""),  # the stage is in deepspeed.json
}
# Flags that two processes refuse with a message.
REFUSED = {
    "--batch_size 1": "a batch of 1 cannot be sharded over 2 processes; start fewer",
    "--deepspeed_config {folder}/nothing.json": "nothing.json",
    "--deepspeed_config {folder}/stage-2.json --zero_stage 3": "zero_stage 2, not 3; leave the",
    "--deepspeed_config {folder}/typo.json": "typo.json: stagee: there is no such setting",
    "--deepspeed_config {folder}/own-lr.json": "sets optimizer, which --optimizer determines",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with every run: of one process in `one`, of two under DeepSpeed in `two`."""
    folder = tmp_path_factory.mktemp("deepspeed")
    documentation = "\n".join(topics.values())
    long, short = folder / "long.txt", folder / "short.txt"
    long.write_text(documentation[:6000], "utf-8")
    short.write_text(documentation[:473], "utf-8")  # 51 training sequences of 9
    (folder / "stage-2.json").write_text('{"zero_optimization": {"stage": 2}}')
    (folder / "typo.json").write_text('{"zero_optimization": {"stage": 2, "stagee": 3}}')
    (folder / "own-lr.json").write_text('{"optimizer": {}, "zero_optimization": {"stage": 2}}')
    common = [*SMALL.split(), "--file_path", str(long)]

    def flags(where: str, name: str, text: str) -> list[str]:
        text = text.format(short=short, folder=folder)
        return [*common, *text.split(), "--out_dir", str(folder / where / name)]

    done = []
    for name, (both, _) in RUNS.items():
        if both not in done and "resumed" not in name:
            main(flags("one", both, both))
            done.append(both)
    main(flags("two", "resumed-1", "--max_steps 10"))
    two = {
        # Runs of stage 3, for stage 2 and stage 3 to resume.
        "begun-2": flags("two", "resumed-2", f"--max_steps 10 {DEEPSPEED} --zero_stage 3"),
        "begun-3": flags("two", "resumed-3", f"--max_steps 10 {DEEPSPEED} --zero_stage 3"),
        **{
            name: flags("two", name, f"{both} {DEEPSPEED} {zero}")
            for name, (both, zero) in RUNS.items()
        },
        **{
            text.replace("/", "-"): flags("two", "refused", f"{text} {DEEPSPEED}")
            for text in REFUSED
        },
    }
    spawn(2, train_together, folder, two)
    yield folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(folder: Path, name: str) -> None:
    """Their losses agree to 1e-6 at every step, and so do their checkpoints."""
    both, keys = RUNS[name][0], "loss val_loss lr tokens"
    if "resumed" in name:  # which also validated at step 10
        both, keys = "--max_steps 20", "loss lr tokens"
    one, two = folder / "one" / both, folder / "two" / name
    expected, found = losses(one, keys), losses(two, keys)
    assert expected.shape == found.shape and len(expected) >= 9
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for file in ("model.safetensors", "training_state/optimizer.safetensors"):
        ours, theirs = load_file(two / file), load_file(one / file)
        assert {k: t.shape for k, t in ours.items()} == {k: t.shape for k, t in theirs.items()}
        for key, tensor in ours.items():
            # The gradient of a key's bias is only rounding, which Adam amplifies to full steps.
            if not key.endswith("qkv_proj.bias"):
                assert (tensor - theirs[key]).norm() <= 1e-4 * theirs[key].norm(), key


@pytest.mark.parametrize("flags", REFUSED)
def test_refused(folder: Path, flags: str) -> None:
    for rank in (0, 1):
        printed = (folder / f"{flags.replace('/', '-')}.{rank}.txt").read_text()
        assert REFUSED[flags] in printed
        assert printed.count("\n") == 0


def test_settings_are_taken_from_the_run(folder: Path) -> None:
    """Resuming without --zero_stage keeps the stage in the run's deepspeed.json."""
    settings = json.loads((folder / "two/resumed-3/deepspeed.json").read_text())
    assert settings["zero_optimization"]["stage"] == 3


def test_the_command_stops_at_a_signal(folder: Path) -> None:
    """Its processes save and stop, and none is left."""
    run_dir = folder / "stopped"
    flags = f"{SMALL} --max_steps 100000 --save_interval 2 --num_workers 2 {DEEPSPEED}"
    run = subprocess.Popen(
        [sys.executable, "-m", "fastllm.train", *flags.split(), "--out_dir", str(run_dir)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.PIPE,
        text=True,
    )
    children: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 60
        while not any(run_dir.glob("checkpoints/step-*")):
            assert run.poll() is None and time.monotonic() < deadline
            children = psutil.Process(run.pid).children(recursive=True)
            time.sleep(0.05)
        run.terminate()
        _, printed = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM at step" in printed
    assert len(children) == 2 and not psutil.wait_procs(children, timeout=10)[1]
