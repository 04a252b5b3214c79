"""What the benchmarks share: timing against the machine's measured limits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastllm.bench import measure_bandwidth, measure_peak
from fastllm.ops import dispatch
from fastllm.threads import set_threads


@pytest.fixture(scope="session")
def threads() -> int:
    return set_threads()


# The limits are measured anew for every test: the machine's speed drifts.
@pytest.fixture
def peak(threads: int) -> float | None:
    """FLOP/s of fp32 multiply-adds, or None where no extension can measure it."""
    return measure_peak(threads) * 1e9 if dispatch.kernels else None


@pytest.fixture
def bandwidth(threads: int) -> float | None:
    """Bytes a second that memory can be read and written back at, or None likewise."""
    return measure_bandwidth(threads, update=True) * 1e9 if dispatch.kernels else None


@pytest.fixture
def time_it(
    benchmark: BenchmarkFixture, peak: float | None, bandwidth: float | None
) -> Callable[..., None]:
    """Times `run()` within `group`, and notes the work that it does and its part of the limit.

    The work is given as `flops`, or as `bytes_moved` between memory and the processor.
    """

    def time_it(
        group: str, run: Callable[[], Any], flops: int | None = None, bytes_moved: int | None = None
    ) -> None:
        benchmark.group = group
        benchmark.extra_info.update(threads=torch.get_num_threads())
        benchmark(run)
        if benchmark.stats is None:  # --benchmark-disable: run() was called once, untimed
            return
        seconds = benchmark.stats["median"]
        if flops is not None:
            benchmark.extra_info["flops"] = flops
            benchmark.extra_info["fraction_of_peak"] = peak and flops / seconds / peak
        if bytes_moved is not None:
            benchmark.extra_info["bytes"] = bytes_moved
            benchmark.extra_info["fraction_of_bandwidth"] = (
                bandwidth and bytes_moved / seconds / bandwidth
            )

    return time_it
