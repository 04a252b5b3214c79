"""The study: optuna proposes settings, and trials run until there are enough.

The study is in study.db, so that a search that was killed can continue.
"""

import fcntl
import math
import os
import time
import warnings
from typing import TYPE_CHECKING

from fastllm.command import StopRequest, first_line, log
from fastllm.training.distributed import ProcessError
from fastllm.training.loop import derive_seed
from fastllm.tuning.results import describe_settings, describe_trial, state_of, write_results
from fastllm.tuning.search import Plan
from fastllm.tuning.trial import RunningTrial, StartProcess, requeue

if TYPE_CHECKING:
    import optuna

# Lost trials after which the study gives up instead of trying them again.
MAX_LOST = 5
# Trials that are drawn at random, before the results guide the search.
RANDOM_TRIALS = 5
# Validations are compared with the median of at least this many trials.
PRUNE_AFTER_TRIALS = 3
POLL_S = 0.1


def open_study(plan: Plan) -> "optuna.Study":
    """Opens the study in the folder, or a new one; requeues trials that a killed search left.

    Raises:
        ValueError: the folder holds another study, or another process uses it.
        OSError: the folder cannot be written.
    """
    import optuna
    from optuna.trial import TrialState
    from sqlalchemy.engine import URL
    from sqlalchemy.exc import SQLAlchemyError

    folder = plan.config.out_dir
    folder.mkdir(parents=True, exist_ok=True)
    # Locked until this process ends. Not study.db itself: SQLite would release the lock with its
    # own. Trials do not inherit the descriptor.
    try:
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process uses the study in {folder}") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(
            storage=URL.create("sqlite", database=f"{folder}/study.db").render_as_string(),
            study_name="tune",
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(
                n_startup_trials=PRUNE_AFTER_TRIALS,
                n_warmup_steps=1,  # the first validation says little
            ),
        )
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        reason = first_line(error)
        raise ValueError(f"{folder}/study.db cannot be used for a study: {reason}") from None
    _check_same_search(study, plan)
    for trial in study.get_trials(states=[TrialState.RUNNING]):
        requeue(study, trial.number)
    return study


def _check_same_search(study: "optuna.Study", plan: Plan) -> None:
    """Records the search in a new study; raises a `ValueError` if an old one had another search."""
    distributions = {name: str(each) for name, each in plan.space.items()}
    search = {"command": plan.config.command, **plan.fixed, **distributions}
    before = study.user_attrs.get("what", search)
    for name in (*before, *search):
        old, new = before.get(name, "unset"), search.get(name, "unset")
        if old != new:
            raise ValueError(
                f"{plan.config.out_dir} holds a study with {name} {old}; it cannot continue with "
                f"{new}. Give the same settings again, or another out_dir"
            )
    study.set_user_attr("what", search)


def next_trial(study: "optuna.Study", plan: Plan) -> "optuna.Trial":
    """The next trial; its settings depend only on the seed, its index and the results so far."""
    import optuna

    index = sum(state_of(trial) != "interrupted" for trial in study.trials)
    with warnings.catch_warnings():  # older versions call constant_liar experimental
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # A new sampler for each trial: a continued study would repeat the draws of an old one.
        study.sampler = optuna.samplers.TPESampler(
            n_startup_trials=RANDOM_TRIALS,
            constant_liar=True,  # stay away from settings that other trials are trying
            seed=derive_seed(plan.config.seed, "trial", index) % 2**32,
        )
    return study.ask(plan.space)


def run_trials(study: "optuna.Study", plan: Plan, start: StartProcess, stop: StopRequest) -> None:
    """Runs trials until there are enough, time is up, or a signal asks to stop.

    Raises:
        ValueError: trials do not validate, and cannot be compared.
        ProcessError: machines keep losing trials.
    """
    config = plan.config
    lost = 0
    deadline = time.monotonic() + config.timeout if config.timeout else math.inf
    begun = sum(state_of(trial) in ("complete", "pruned", "failed") for trial in study.trials)
    running: list[RunningTrial] = []
    try:
        while True:
            if stop.poll() or time.monotonic() >= deadline:
                for each in running:
                    each.stop("interrupted")
            else:
                while begun < config.trials and len(running) < config.jobs:
                    each = RunningTrial(next_trial(study, plan), plan, start)
                    running.append(each)
                    settings = describe_settings(each.trial.params)
                    log(f"trial {each.trial.number:<4} begins       {settings}")
                    begun += 1
            if not running:
                return
            for each in list(running):
                ended = each.process.poll() is not None
                each.read_losses()  # after poll(), so that an ended trial's losses are complete
                if not ended:
                    continue
                number = each.trial.number
                each.record(study)
                running.remove(each)
                log(describe_trial(study.trials[number]))
                write_results(study, plan)
                if reason := each.process.lost:
                    begun -= 1
                    lost += 1
                    log(f"trial {number:<4} was lost: {reason}")
                    if lost > MAX_LOST:
                        raise ProcessError(f"{lost} trials were lost, the last one: {reason}")
            time.sleep(POLL_S)
    finally:
        for each in running:
            each.process.kill()
