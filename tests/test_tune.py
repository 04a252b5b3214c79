"""The tune command: searches over short trainings of a tiny model, two at a time."""

import csv
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from fastllm.training.metrics import read_metrics
from fastllm.tune import main
from tests.commands import run_command

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SMALL = "--max_seq_len 16 --hidden_size 16 --num_layers 1"


def command(*flags: str, small: str, text: Path) -> list[str]:
    flags = ("--out_dir", "study", *flags, "--", "--file_path", str(text), *SMALL.split())
    return [sys.executable, "-m", "fastllm.tune", *flags, *small.split()]


def tune(folder: Path, arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    """The process of the tests keeps the study to itself until it ends."""
    return run_command("tune", *arguments[3:], folder=folder)


def tune_in_a_process(folder: Path, arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=100)


def rows(folder: Path) -> list[dict[str, str]]:
    """trials.csv, in the order of the trials."""
    return list(csv.DictReader((folder / "study/trials.csv").open(newline="")))


@contextmanager
def started(folder: Path, arguments: list[str]) -> Iterator["subprocess.Popen[str]"]:
    """The running command; it is killed at the end of the block, even if the test fails."""
    with subprocess.Popen(arguments, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.subprocess
def test_a_study(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # With this seed, four trials with the good learning rate precede the one with the hopeless one.
    search = "--search lr=1e-2,1e-9 --trials 5 --jobs 2 --seed 5".split()
    training = "--batch_size 4 --max_steps 1200 --eval_interval 200"
    arguments = command(*search, small=training, text=text)
    result = tune_in_a_process(tmp_path, arguments)
    assert result.returncode == 0, result.stderr
    study = tmp_path / "study"

    trials = rows(tmp_path)
    assert [trial["state"] for trial in trials] == [*["complete"] * 4, "pruned"]
    assert [float(trial["lr"]) for trial in trials] == [1e-2] * 4 + [1e-9]
    # The pruned trial was really stopped.
    steps = [line["step"] for line in read_metrics(study / "trial-0004/metrics.jsonl")]
    assert 400 <= steps[-1] < 1200
    losses = [line["val_loss"] for line in read_metrics(study / "trial-0000/metrics.jsonl")]
    best = min(loss for loss in losses if loss is not None)
    assert float(trials[0]["val_loss"]) == best
    assert all(float(trial["val_loss"]) >= best for trial in trials)
    assert (study / "study.png").read_bytes().startswith(b"\x89PNG")
    cores = psutil.cpu_count(logical=False) or 1
    threads = (study / "trial-0001/log.txt").read_text().split("threads     ")[1].split()[0]
    assert int(threads) <= max(1, cores // 2)

    # The best trial keeps its model, the others only the record; the first of equals is the best.
    assert (study / "trial-0000/model.safetensors").exists()
    left = {path.name for path in (study / "trial-0001").iterdir()}
    assert left == {"settings.toml", "config.json", "metrics.jsonl", "log.txt", "loss.png"}

    for expected in (
        "trial 4    pruned       val_loss ",
        "trials      4 complete, 1 pruned: study/trials.csv, study.png",
        f"best        val_loss {best:.4f} at step ",
        "settings    lr 0.01",
        "to train    fastllm train --config study/best.toml",
    ):
        assert expected in result.stderr

    # Training with best.toml, which has all fixed settings, gives the same losses.
    settings = tomllib.loads((study / "best.toml").read_text())
    assert settings["lr"] == 1e-2 and settings["batch_size"] == 4 and settings["hidden_size"] == 16
    again = "-m fastllm.train --config study/best.toml --out_dir run --quiet --threads 1"
    subprocess.run([sys.executable, *again.split()], cwd=tmp_path, check=True, timeout=100)
    same = [line["val_loss"] for line in read_metrics(tmp_path / "run/metrics.jsonl")]
    assert same == losses

    # The same command has nothing left to do; other settings need another folder.
    result = tune_in_a_process(tmp_path, arguments)
    assert result.returncode == 0 and "\ntrial " not in result.stderr
    assert rows(tmp_path) == trials
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="study holds a study with dropout unset; it cannot"):
        main([*arguments[3:], "--dropout", "0"])


@pytest.mark.kill
def test_a_killed_study_continues(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = "--max_steps 1500 --eval_interval 500"
    arguments = command("--trials", "2", "--jobs", "2", small=training, text=text)
    monkeypatch.chdir(tmp_path)
    with started(tmp_path, arguments) as process:
        while len(list(tmp_path.glob("study/trial-*/metrics.jsonl"))) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        trials = psutil.Process(process.pid).children()
        with pytest.raises(SystemExit, match="error: another process uses the study in study"):
            main(arguments[3:])
    assert len(trials) == 2
    _, alive = psutil.wait_procs(trials, timeout=10)
    assert not alive
    for log in tmp_path.glob("study/trial-*/metrics.jsonl"):
        assert all(line["step"] < 1500 for line in read_metrics(log))  # ended before their end

    result = tune(tmp_path, arguments)
    assert result.returncode == 0, result.stderr
    *killed, third, fourth = rows(tmp_path)
    assert [trial["state"] for trial in killed] == ["interrupted"] * 2
    assert third["state"] == fourth["state"] == "complete"
    # The trials that were killed were tried again.
    tried = [(trial["lr"], trial["batch_size"]) for trial in (*killed, third, fourth)]
    assert tried[:2] == tried[2:] and tried[0] != tried[1]


@pytest.mark.kill
def test_a_signal_stops_the_study_with_the_best_trial_so_far(tmp_path: Path, text: Path) -> None:
    # With this seed, the first trial is short and the second endless.
    search = "--search max_steps=10,100000000 --jobs 2 --trials 2 --seed 10".split()
    arguments = command(*search, small="--batch_size 4 --lr 1e-3", text=text)
    with started(tmp_path, arguments) as process:
        assert process.stderr is not None
        said = ""
        while not said.startswith("trial 0    complete"):
            said = process.stderr.readline()
            assert said, "the study ended on its own"
        trials = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGINT)
        stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "trial 1    interrupted" in stderr and "best        val_loss " in stderr
    assert [trial["state"] for trial in rows(tmp_path)] == ["complete", "interrupted"]
    assert tomllib.loads((tmp_path / "study/best.toml").read_text())["max_steps"] == 10
    assert len(trials) == 1 and not trials[0].is_running()


@pytest.mark.subprocess
def test_timeout(tmp_path: Path, text: Path) -> None:
    training = "--max_steps 100000000 --eval_interval 100"
    start = time.monotonic()
    result = tune(tmp_path, command("--timeout", "4", small=training, text=text))
    assert result.returncode == 1
    assert 4 < time.monotonic() - start < 30
    assert "no trial has completed yet; the same command continues" in result.stderr
    assert [trial["state"] for trial in rows(tmp_path)] == ["interrupted"]


@pytest.mark.subprocess
def test_failing_trials(tmp_path: Path, text: Path) -> None:
    # With this seed, the first learning rate is absurd.
    search = "--search lr=1e-3,1e30 --trials 2 --jobs 2 --seed 2".split()
    result = tune(tmp_path, command(*search, small="--batch_size 4 --max_steps 30", text=text))
    assert result.returncode == 0, result.stderr
    failed, complete = rows(tmp_path)
    assert failed["state"] == "failed" and complete["state"] == "complete"
    assert "is nan at step" in failed["reason"] and "Traceback" not in failed["reason"]
    assert "1 complete" in result.stderr and "1 failed" in result.stderr

    result = tune(
        tmp_path, command("--out_dir", "none", "--trials", "1", small="", text=Path("no"))
    )
    assert result.returncode == 1
    assert (
        "error: no trial completed (1 failed); the last one that failed, none/trial-0000: "
        "text file no does not exist"
    ) in result.stderr
    assert "Traceback" not in result.stderr


def test_without_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna.distributions", None)
    with pytest.raises(SystemExit, match=r"error: tune needs optuna .*: pip install '.\[tune\]'"):
        main([])
