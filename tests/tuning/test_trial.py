"""The process of a trial."""

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from fastllm.tuning.trial import TrialProcess

# Starts a trial from a thread that ends before the trial does, and waits to be killed.
PARENT = """
import sys, threading
from pathlib import Path
from fastllm.tuning.trial import TrialProcess

def start():
    trials.append(TrialProcess("train", sys.argv[1:], 1, Path("log.txt"), Path.cwd()))

trials = []
thread = threading.Thread(target=start)
thread.start()
thread.join()
threading.Event().wait()
"""
ENDLESS = (
    "--max_seq_len 16 --hidden_size 16 --num_layers 1 --max_steps 100000000 --log_interval 1 "
    "--num_workers 1 --out_dir run --file_path"
)


@pytest.mark.kill
def test_a_trial_ends_with_its_parent(tmp_path: Path, text: Path) -> None:
    """SIGKILL of the parent ends the trial and its data workers; the end of a thread does not."""
    command = [sys.executable, "-c", PARENT, *ENDLESS.split(), str(text)]
    with subprocess.Popen(command, cwd=tmp_path) as parent:
        try:
            deadline = time.monotonic() + 60
            processes: list[psutil.Process] = []
            while len(processes) < 2 or not (tmp_path / "run/metrics.jsonl").exists():
                assert parent.poll() is None and time.monotonic() < deadline
                processes = psutil.Process(parent.pid).children(recursive=True)
                time.sleep(0.05)
        finally:
            parent.kill()
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive


def test_no_code_of_ours_runs_between_fork_and_exec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among threads it may wait for a lock that a thread held at the fork."""
    options: list[dict[str, Any]] = []

    class Popen(subprocess.Popen[bytes]):
        def __init__(self, arguments: Any, **keywords: Any) -> None:
            options.append(keywords)
            super().__init__(arguments, **keywords)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    trial = TrialProcess("train", ["--file_path", "missing"], 1, tmp_path / "log.txt", tmp_path)
    trial.kill()
    assert options and options[0].get("preexec_fn") is None


def test_a_trial_keeps_the_exit_status_of_its_command(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    trial = TrialProcess("train", ["--file_path", "missing"], 1, log, tmp_path)
    while (status := trial.poll()) is None:
        threading.Event().wait(0.05)
    assert status == 1
    assert log.read_text().strip() == "error: text file missing does not exist"
