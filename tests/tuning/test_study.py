"""The trials that a study proposes, and trials that machines lose."""

import csv
from pathlib import Path
from typing import Any

import optuna
import pytest

from fastllm.command import StopRequest
from fastllm.training.distributed import ProcessError
from fastllm.tuning.study import MAX_LOST, next_trial, open_study, run_trials
from fastllm.tuning.trial import requeue
from tests.tuning.test_search import plan_of


def test_the_seed_fixes_the_trials_with_and_without_an_interruption() -> None:
    def tried(seed: int, interrupted_at: int) -> list[dict[str, Any]]:
        plan, study = plan_of(f"--search dropout=0:0.5 --seed {seed}"), optuna.create_study()
        settings = []
        while len(settings) < 8:
            trial = next_trial(study, plan)
            if trial.number == interrupted_at:
                requeue(study, trial.number)
            else:
                settings.append(trial.params)
                study.tell(trial, trial.params["lr"] + trial.params["dropout"])
        return settings

    first = tried(0, interrupted_at=-1)
    assert len({settings["lr"] for settings in first}) == 8
    assert tried(0, interrupted_at=-1) == first
    assert tried(0, interrupted_at=2) == first
    assert tried(1, interrupted_at=-1) != first


def test_an_interrupted_trial_is_tried_again_after_others_went_on() -> None:
    plan, study = plan_of(""), optuna.create_study()
    first, second = (next_trial(study, plan) for _ in range(2))
    study.tell(second, 1.0)
    requeue(study, first.number)
    again, third = (next_trial(study, plan) for _ in range(2))
    assert again.params == first.params
    assert third.params["lr"] not in (first.params["lr"], second.params["lr"])


class LostProcess:
    """A process that has been lost by the first time it is polled."""

    lost = "its machine has burnt down"

    def poll(self) -> int:
        return 1

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


def test_lost_trials_are_tried_again_a_limited_number_of_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = []

    def start(*arguments: Any) -> LostProcess:
        started.append(arguments)
        return LostProcess()

    plan = plan_of(f"--trials 2 --out_dir {tmp_path}")
    study = open_study(plan)
    with pytest.raises(ProcessError, match="6 trials were lost, the last one: its machine has bu"):
        run_trials(study, plan, start, StopRequest())
    assert len(started) == MAX_LOST + 1
    rows = list(csv.DictReader((tmp_path / "trials.csv").open(newline="")))
    assert {row["state"] for row in rows} == {"interrupted"}
    assert len({(row["lr"], row["batch_size"]) for row in rows}) == 1
    assert capsys.readouterr().err.count(" was lost: its machine has burnt down") == 6
