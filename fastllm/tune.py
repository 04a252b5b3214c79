"""Search for the best hyperparameters: `fastllm tune -- book.txt`."""

import sys
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from fastllm.command import (
    StopRequest,
    command,
    errors_in_one_line,
    log,
    parse_settings,
    stop_on_signals,
)
from fastllm.training.config import RunSettings, TrainConfig
from fastllm.tuning.config import TuneConfig

if TYPE_CHECKING:
    from fastllm.tuning.trial import StartProcess


@command
def main(arguments: list[str]) -> None:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    config = parse_settings(TuneConfig, arguments[:split])
    # After the flags: help and their errors need not wait for PyTorch.
    from fastllm.training.distributed import ProcessError
    from fastllm.tuning.results import (
        best_trial,
        finished_trials,
        plot_study,
        summarize,
        write_results,
    )
    from fastllm.tuning.search import make_plan
    from fastllm.tuning.study import open_study, run_trials
    from fastllm.tuning.trial import TrialProcess

    request = StopRequest()
    with errors_in_one_line(OSError, ValueError, ImportError, ProcessError), ExitStack() as stack:
        plan = make_plan(config, settings_of(config.command), arguments[split + 1 :])
        start: StartProcess = TrialProcess
        if config.launcher == "ray":
            from fastllm.integrations import ray

            stack.enter_context(ray.connected())
            plan = plan._replace(threads=ray.cores_per_process(config.jobs, plan.threads))
            start = partial(ray.RemoteTrial, on_gpu=plan.fixed.get("device") == "cuda")
        study = open_study(plan)
        log(f"search      {', '.join(plan.space)} over {config.trials} trials of {config.command}")
        log(f"jobs        {config.jobs} at a time, threads of each: {plan.threads}")
        log(f"logs        {config.out_dir}/trial-*/log.txt")
        with stop_on_signals(request):
            run_trials(study, plan, start, request)
        write_results(study, plan)
        trials = finished_trials(study)
        if best := best_trial(trials):
            plot_study(trials, plan, config.out_dir / "study.png")
        for line in summarize(study, plan):
            log(line)
    if request.stopped_by:
        raise SystemExit(128 + request.stopped_by)
    if best is None:
        raise SystemExit(1)


def settings_of(command: str) -> type[RunSettings]:
    """The settings class of the command whose settings are searched."""
    if command == "train":
        return TrainConfig
    from fastllm.finetuning.config import FinetuneConfig

    return FinetuneConfig


if __name__ == "__main__":
    main(sys.argv[1:])
