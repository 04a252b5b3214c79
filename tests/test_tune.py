"""The tune command: searches over short trainings of a tiny model, two at a time."""

import csv
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest

from fastllm.training.metrics import read_metrics
from fastllm.tune import (
    MOST_LOST,
    TuneConfig,
    ask,
    main,
    make_plan,
    parse_tune_config,
    put_back,
    to_toml,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SMALL = "--max_seq_len 16 --hidden_size 16 --num_layers 1"


def command(*flags: str, small: str, text: Path) -> list[str]:
    flags = ("--out_dir", "study", *flags, "--", "--file_path", str(text), *SMALL.split())
    return [sys.executable, "-m", "fastllm.tune", *flags, *small.split()]


def tune(folder: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=100)


def rows(folder: Path) -> list[dict[str, str]]:
    """trials.csv, in the order of the trials."""
    return list(csv.DictReader((folder / "study/trials.csv").open(newline="")))


@contextmanager
def started(folder: Path, arguments: list[str]) -> Iterator["subprocess.Popen[str]"]:
    """The command at work; it ends with the block, whatever becomes of the test."""
    with subprocess.Popen(arguments, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_study(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # By this seed four trials have the good rate before the hopeless one comes.
    search = "--search lr=1e-2,1e-9 --trials 5 --jobs 2 --seed 5".split()
    training = "--batch_size 4 --max_steps 1200 --eval_interval 200"
    arguments = command(*search, small=training, text=text)
    result = tune(tmp_path, arguments)
    assert result.returncode == 0, result.stderr
    study = tmp_path / "study"

    trials = rows(tmp_path)
    assert [trial["state"] for trial in trials] == [*["complete"] * 4, "pruned"]
    assert [float(trial["lr"]) for trial in trials] == [1e-2] * 4 + [1e-9]
    # What was pruned was stopped, not merely called so.
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

    # The best trial's model stays, of the others the record: equal ones are the first one's equals.
    assert (study / "trial-0000/model.safetensors").exists()
    left = {path.name for path in (study / "trial-0001").iterdir()}
    assert left == {"settings.toml", "config.json", "metrics.jsonl", "log.txt", "loss.png"}

    for expected in (
        "trial 4    pruned       val_loss ",
        "trials      4 complete, 1 pruned: study/trials.csv, study.png",
        f"best        val_loss {best:.4f} at step ",
        "settings    lr 0.01",
        "to train    python -m fastllm.train --config study/best.toml",
    ):
        assert expected in result.stderr

    # The same trained with best.toml, which has all that was fixed.
    settings = tomllib.loads((study / "best.toml").read_text())
    assert settings["lr"] == 1e-2 and settings["batch_size"] == 4 and settings["hidden_size"] == 16
    again = "-m fastllm.train --config study/best.toml --out_dir run --quiet --threads 1"
    subprocess.run([sys.executable, *again.split()], cwd=tmp_path, check=True, timeout=100)
    same = [line["val_loss"] for line in read_metrics(tmp_path / "run/metrics.jsonl")]
    assert same == losses

    # All there: the same command has nothing to do; another study wants another folder.
    result = tune(tmp_path, arguments)
    assert result.returncode == 0 and "\ntrial " not in result.stderr
    assert rows(tmp_path) == trials
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="study holds a study with dropout unset; it cannot go on"):
        main([*arguments[3:], "--dropout", "0"])


def test_killed_and_started_again(
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
        with pytest.raises(SystemExit, match="error: another process is at the study in study"):
            main(arguments[3:])
    assert len(trials) == 2
    if sys.platform == "linux":
        _, alive = psutil.wait_procs(trials, timeout=10)
        assert not alive
        for log in tmp_path.glob("study/trial-*/metrics.jsonl"):
            assert all(line["step"] < 1500 for line in read_metrics(log))  # nor at their end

    result = tune(tmp_path, arguments)
    assert result.returncode == 0, result.stderr
    *killed, third, fourth = rows(tmp_path)
    assert [trial["state"] for trial in killed] == ["interrupted"] * 2
    assert third["state"] == fourth["state"] == "complete"
    # The very trials that were killed, done again.
    tried = [(trial["lr"], trial["batch_size"]) for trial in (*killed, third, fourth)]
    assert tried[:2] == tried[2:] and tried[0] != tried[1]


def test_a_signal_stops_with_the_best_until_then(tmp_path: Path, text: Path) -> None:
    # By this seed the first trial is short and the second without end.
    search = "--search max_steps=10,100000000 --jobs 2 --trials 2 --seed 10".split()
    arguments = command(*search, small="--batch_size 4 --lr 1e-3", text=text)
    with started(tmp_path, arguments) as process:
        assert process.stderr is not None
        said = ""
        while not said.startswith("trial 0    complete"):
            said = process.stderr.readline()
            assert said, "it ended by itself"
        trials = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGINT)
        stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "trial 1    interrupted" in stderr and "best        val_loss " in stderr
    assert [trial["state"] for trial in rows(tmp_path)] == ["complete", "interrupted"]
    assert tomllib.loads((tmp_path / "study/best.toml").read_text())["max_steps"] == 10
    assert len(trials) == 1 and not trials[0].is_running()


def test_timeout(tmp_path: Path, text: Path) -> None:
    training = "--max_steps 100000000 --eval_interval 100"
    start = time.monotonic()
    result = tune(tmp_path, command("--timeout", "4", small=training, text=text))
    assert result.returncode == 1
    assert 4 < time.monotonic() - start < 30
    assert "no trial has come to its end yet; the same command goes on" in result.stderr
    assert [trial["state"] for trial in rows(tmp_path)] == ["interrupted"]


def test_failing_trials(tmp_path: Path, text: Path) -> None:
    # By this seed the first rate is absurd.
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
        "error: no trial came to its end (1 failed); the last one that failed, none/trial-0000: "
        "text file no does not exist"
    ) in result.stderr
    assert "Traceback" not in result.stderr


def plan_of(search: str, flags: str = "") -> Any:
    return make_plan(parse_tune_config(search.split()), flags.split())


@pytest.mark.parametrize(
    ("search", "flags", "message"),
    [
        ("--search lrr=1:2", "", "train has no setting 'lrr' to search; it has file_path, max_se"),
        ("--search out_dir=a,b", "", "train has no setting 'out_dir' to search"),
        ("--search lr=1e-3", "", "'lr=1e-3' is neither a range (lr=LOW:HIGH or lr=LOW:HIGH:log)"),
        ("--search lr", "", "'lr=' is neither a range"),
        ("--search lr=1:2:lin", "", "'lr=1:2:lin' is neither a range"),
        ("--search lr=1,,2", "", "'lr=1,,2' is neither a range"),
        ("--search lr=2:1", "", "'lr=2:1' must begin below where it ends"),
        ("--search dropout=0:0.5:log", "", "must begin above 0, and below where it ends"),
        ("--search lr=0:1", "", "lr: Input should be greater than 0 (got '0')"),
        ("--search lr=a:b", "", "lr: Input should be a valid number"),
        ("--search batch_size=1.5:4", "", "batch_size: Input should be a valid integer"),
        ("--search batch_size=8,x,4", "", "batch_size: Input should be a valid integer"),
        ("--search norm_first=0:1", "", "norm_first is no number; list its values"),
        ("--search activation=gelu,tanh", "", "activation: Input should be 'gelu', "),
        ("--search num_heads=2,3", "", "hidden_size (64) must be divisible by num_heads (3)"),
        ("--search lr=1:2", "--lr 1", "lr is searched, and fixed behind -- as well"),
        ("--search norm_first=0,1", "--post-norm", "norm_first is searched, and fixed"),
        ("", "--lr 1 --batch_size 8", "everything is fixed; name a setting"),
        ("", "--out-dir here", "out_dir cannot be fixed"),
        ("", "--config no.toml", "cannot read the config file no.toml"),
        ("--trials 0", "", "trials: Input should be greater than or equal to 1"),
    ],
)
def test_bad_searches(search: str, flags: str, message: str) -> None:
    with pytest.raises((ValueError, SystemExit)) as caught:
        plan_of(search, flags)
    assert message in str(caught.value)


def test_what_is_searched(tmp_path: Path) -> None:
    assert list(plan_of("").space) == ["lr", "batch_size"]
    (tmp_path / "run.toml").write_text('lr = 0.5\nactivation = "relu"\n')
    plan = plan_of(
        "--search dropout=0:1e-1 --search num-layers=1:8:log --search norm_first=true,false",
        f"--config {tmp_path}/run.toml --file-path a.txt --no-dedup_lines --threads=3",
    )
    distributions = optuna.distributions
    assert plan.space == {
        "batch_size": distributions.CategoricalDistribution([8, 16, 32]),
        "dropout": distributions.FloatDistribution(0, 0.1),
        "num_layers": distributions.IntDistribution(1, 8, log=True),
        "norm_first": distributions.CategoricalDistribution([True, False]),
    }
    fixed = {"lr": 0.5, "activation": "relu", "file_path": "a.txt", "dedup_lines": False}
    assert plan.fixed == {**fixed, "threads": 3}
    assert plan.threads == 3


class LostProcess:
    """A trial that is gone as soon as somebody looks."""

    lost = "its machine has burnt down"
    begun = 0

    def __init__(self, *how: Any) -> None:
        LostProcess.begun += 1

    def poll(self) -> int:
        return 1


def test_trials_that_machines_lose_are_tried_again_but_not_for_ever(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastllm.tune.TrialProcess", LostProcess)
    arguments = command("--trials", "2", small="", text=text)[3:]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="6 trials were lost, the last one: its machine has burnt"):
        main(arguments)
    assert LostProcess.begun == MOST_LOST + 1
    tried = rows(tmp_path)
    assert {trial["state"] for trial in tried} == {"interrupted"}
    assert len({(trial["lr"], trial["batch_size"]) for trial in tried}) == 1
    assert capsys.readouterr().err.count(" was lost: its machine has burnt down") == 6


def test_the_seed_fixes_what_is_tried_with_and_without_an_interruption() -> None:
    plan = plan_of("--search dropout=0:0.5")

    def tried(seed: int, interrupted_at: int) -> list[dict[str, Any]]:
        study = optuna.create_study()
        settings = []
        while len(settings) < 8:
            trial = ask(study, TuneConfig(seed=seed), plan)
            if trial.number == interrupted_at:
                put_back(study, trial.number)
            else:
                settings.append(trial.params)
                study.tell(trial, trial.params["lr"] + trial.params["dropout"])
        return settings

    first = tried(0, interrupted_at=-1)
    assert len({settings["lr"] for settings in first}) == 8
    assert tried(0, interrupted_at=-1) == first
    assert tried(0, interrupted_at=2) == first
    assert tried(1, interrupted_at=-1) != first


def test_what_was_interrupted_is_tried_again_while_others_went_on() -> None:
    plan, study = plan_of(""), optuna.create_study()
    first, second = (ask(study, TuneConfig(), plan) for _ in range(2))
    study.tell(second, 1.0)
    put_back(study, first.number)
    again, third = (ask(study, TuneConfig(), plan) for _ in range(2))
    assert again.params == first.params
    assert third.params["lr"] not in (first.params["lr"], second.params["lr"])


def test_toml() -> None:
    settings = {"path": 'a "b"\\c\t\u00e9\U0001f600', "lr": 1e-05, "n": 8, "yes": True, "l": ["a"]}
    assert tomllib.loads(to_toml(settings)) == settings


def test_without_optuna(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "optuna.distributions", None)
    with pytest.raises(SystemExit, match=r"error: tune needs optuna .*: pip install '.\[tune\]'"):
        main([])
