"""Whole training steps; `python -m fastllm.bench` times all configurations against more rivals.

The growth benchmarks vary one size of config B at a time: tokens/s should hardly depend on it.
"""

from collections.abc import Callable

import pytest

from fastllm.benchmarking.shapes import CONFIGS, StepShape
from fastllm.benchmarking.steps import (
    build_fastllm,
    build_stock,
    check_parity,
    fastllm_step,
    stock_step,
)

B = CONFIGS["B"]
STEPS = {
    "A": CONFIGS["A"],
    "B": B,
    **{f"B with B={batch}": B._replace(B=batch) for batch in (8, 128)},
    **{f"B with S={S}": B._replace(S=S, B=2048 // S) for S in (16, 256, 1024)},
    **{f"B with H={H}": B._replace(H=H, N=H // 32) for H in (64, 256)},
    **{f"B with L={L}": B._replace(L=L) for L in (1, 12)},
}


# pytest benchmarks/bench_step.py --benchmark-only
@pytest.mark.parametrize("name", STEPS)
def test_step(race: Callable[..., None], name: str) -> None:
    config: StepShape = STEPS[name]
    model, ids = build_fastllm(config), config.random_ids()
    stock = build_stock(config, "tuned", model)
    check_parity(model, stock, ids)
    ours, theirs = fastllm_step(model), stock_step(stock, "tuned")
    race(
        f"step {name}",
        lambda: ours(ids),
        {"call": lambda: theirs(ids)},
        flops=config.flops,
    )
