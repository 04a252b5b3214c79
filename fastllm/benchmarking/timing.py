"""Timing calls that take turns.

Other work on the machine can double any time, but it slows contestants that take turns alike:
ratios hold where milliseconds do not.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

TURN_SECONDS = 0.05  # how long one contestant runs before the next has its turn


def time_call(run: Callable[..., Any], *arguments: Any) -> float:
    """Seconds that a call takes, including what it launches on a GPU."""
    wait_for_gpu()
    start = time.perf_counter()
    run(*arguments)
    wait_for_gpu()
    return time.perf_counter() - start


def wait_for_gpu() -> None:
    """Waits until everything launched on the GPU, if it is in use, is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def time_in_turns(
    runs: dict[str, Callable[[Any], Any]], seconds: float, make_argument: Callable[[], Any]
) -> dict[str, float]:
    """Median milliseconds of each run; every round makes a new argument for all of them.

    Args:
        seconds: time for all runs together; at least three rounds are made.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    deadline = time.perf_counter() + seconds
    while any(len(each) < 3 for each in times.values()) or time.perf_counter() < deadline:
        argument = make_argument()
        for name, run in runs.items():
            # Several calls in a row, as in training: the first one finds the caches full of the
            # other contestants' data.
            end = time.perf_counter() + TURN_SECONDS
            times[name].append(time_call(run, argument))
            while time.perf_counter() < end:
                times[name].append(time_call(run, argument))
    return {name: 1000 * median(each) for name, each in times.items()}
