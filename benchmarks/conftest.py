"""Shared by the benchmarks: contestants timed in turns, and the table of their times.

The machine's speed drifts, so the rivals run between the rounds of fastllm's own timing, and ratios
compare the same seconds. `pytest benchmarks --benchmark-only` ends with the table.
"""

from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any, NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from fastllm.benchmarking.machine import measure_bandwidth, measure_peak
from fastllm.benchmarking.timing import time_call
from fastllm.ops import extension
from fastllm.threads import set_threads

SECONDS = 0.6  # for all contestants of one line of the table
RIVALS = ("eager", "call", "compile")


class Result(NamedTuple):
    """A line of the table; a ratio is a rival's time over fastllm's."""

    name: str
    milliseconds: float
    limit: float | None  # fraction of the machine's peak or bandwidth
    ratios: dict[str, float]


RESULTS: list[Result] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--compile", action="store_true", help="also time torch.compile: a minute for each shape"
    )


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not RESULTS:
        return
    write = terminalreporter.write_line
    write("")
    write(
        "Medians of fastllm, its fraction of the limit (FMA peak, or bandwidth if bytes are given),"
        " and how many times as long PyTorch takes: operation by operation (eager), by its fused "
        "call, and compiled."
    )
    write("")
    write(f"| {'operation':44} |       ms | limit |" + "".join(f" {r:>7} |" for r in RIVALS))
    write(f"| {'---':44} |     ---: |  ---: |" + "    ---: |" * len(RIVALS))
    for name, milliseconds, limit, ratios in RESULTS:
        cells = "".join(f" {ratios[r]:7.2f} |" if r in ratios else f" {'':7} |" for r in RIVALS)
        percent = "" if limit is None else f"{100 * limit:.0f} %"
        write(f"| {name:44} | {milliseconds:8.3f} | {percent:>5} |{cells}")


@pytest.fixture(scope="session")
def threads() -> int:
    return set_threads()


@pytest.fixture
def race(benchmark: BenchmarkFixture, threads: int) -> Callable[..., None]:
    """Times fastllm, and the rivals between its rounds.

    The work is given as `flops`, or as `bytes_moved` between processor and memory; the limit is
    then the bandwidth of updating an array that moves as many bytes.
    """

    def race(
        name: str,
        ours: Callable[[], Any],
        rivals: dict[str, Callable[[], Any]],
        flops: int | None = None,
        bytes_moved: int | None = None,
    ) -> None:
        times: dict[str, list[float]] = {rival: [] for rival in rivals}

        def run_rivals() -> None:
            for rival, run in rivals.items():
                times[rival].append(time_call(run))

        once = time_call(ours) + sum(time_call(run) for run in rivals.values())
        benchmark.group = name.split()[0]
        rounds = min(max(int(SECONDS / once), 5), 1000)
        benchmark.pedantic(ours, setup=run_rivals, rounds=rounds, warmup_rounds=2)
        if benchmark.stats is None:  # --benchmark-disable called ours() once, untimed
            return
        seconds = benchmark.stats["median"]
        limit = None
        if extension.kernels and flops:
            limit = flops / seconds / measure_peak(threads) / 1e9
        elif extension.kernels and bytes_moved:
            bandwidth = measure_bandwidth(threads, update=True, size=bytes_moved // 8)
            limit = bytes_moved / seconds / bandwidth / 1e9
        ratios = {rival: median(each) / seconds for rival, each in times.items()}
        RESULTS.append(Result(name, 1000 * seconds, limit, ratios))
        benchmark.extra_info.update(threads=threads, limit=limit, **ratios)

    return race


Operation = Callable[[float], Tensor]


@pytest.fixture(params=["forward", "backward"])
def race_operation(
    request: pytest.FixtureRequest, race: Callable[..., None]
) -> Callable[..., None]:
    """Times an operation, with or without its backward, against PyTorch's for the same work.

    Each contestant takes the dropout probability. Outputs and gradients without dropout must agree
    before anything is timed.
    """
    backward = request.param == "backward"

    def race_operation(
        name: str,
        ours: Operation,
        rivals: dict[str, Operation],
        inputs: Sequence[Tensor],
        p: float = 0.0,
        flops: int | None = None,
        bytes_moved: int | None = None,
    ) -> None:
        if request.config.getoption("--compile"):
            rivals = {**rivals, "compile": torch.compile(list(rivals.values())[-1], dynamic=False)}
        grad = torch.randn_like(ours(0.0))

        def results(run: Operation) -> list[Tensor]:
            out = run(0.0)
            return [out, *torch.autograd.grad(out, inputs, grad)]

        for rival, run in rivals.items():
            for actual, expected in zip(results(ours), results(run), strict=True):
                error = (actual - expected).norm() / expected.norm()
                assert error <= 1e-5, f"{name}: fastllm and {rival} differ by {error:.1e}"

        def timed(run: Operation) -> Callable[[], Any]:
            if backward:
                return lambda: torch.autograd.grad(run(p), inputs, grad)
            return torch.no_grad()(lambda: run(p))

        # A backward counts as two forwards.
        times = 3 if backward else 1
        race(
            f"{name} {'forward + backward' if backward else 'forward'}",
            timed(ours),
            {rival: timed(run) for rival, run in rivals.items()},
            flops and times * flops,
            bytes_moved and times * bytes_moved,
        )

    return race_operation


@pytest.fixture(autouse=True)
def fixed_seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
