"""Whole training steps against stock PyTorch; `python -m fastllm.bench` takes them in turns."""

from collections.abc import Callable
from typing import Literal

import pytest
import torch

from fastllm.bench import (
    CONFIGS,
    Letter,
    build_fastllm,
    build_stock,
    check_parity,
    fastllm_step,
    stock_step,
)

BY_NAME_ONLY = ("C", "D", "E")  # together they take minutes


# pytest benchmarks/bench_step.py --benchmark-only
# pytest benchmarks/bench_step.py --benchmark-only -k "C- or D-"
@pytest.mark.parametrize("by", ["fastllm", "eager", "tuned"])
@pytest.mark.parametrize("letter", CONFIGS)
def test_step(
    request: pytest.FixtureRequest,
    time_it: Callable[..., None],
    letter: Letter,
    by: Literal["fastllm", "eager", "tuned"],
) -> None:
    by_name = request.config.getoption("keyword") or any("::" in a for a in request.config.args)
    if letter in BY_NAME_ONLY and not by_name:
        pytest.skip(f'takes long; choose it with -k "{letter}-"')
    torch.manual_seed(0)
    config = CONFIGS[letter]
    model, ids = build_fastllm(config), config.random_ids()
    stock = build_stock(config, "tuned" if by == "fastllm" else by, model)
    check_parity(model, stock, ids)
    step = fastllm_step(model) if by == "fastllm" else stock_step(stock, by)
    step(ids)  # makes the optimizer's state
    time_it(f"step {letter}", lambda: step(ids), flops=config.flops)
