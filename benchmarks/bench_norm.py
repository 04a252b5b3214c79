"""Layer norm of a sum."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from fastllm.benchmarking.shapes import CONFIGS, Letter
from fastllm.ops.decoder import Norm
from fastllm.ops.norm import norm


# pytest benchmarks/bench_norm.py --benchmark-only
@pytest.mark.parametrize("letter", CONFIGS)
def test_norm(race_operation: Callable[..., None], letter: Letter) -> None:
    c = CONFIGS[letter]
    x, residual, weight, bias = (
        torch.randn(shape, requires_grad=True)
        for shape in ((c.B, c.S, c.H), (c.B, c.S, c.H), (c.H,), (c.H,))
    )
    race_operation(
        f"norm {letter}",
        lambda p: norm(x, Norm(weight, bias, 1e-5), residual),
        {"eager": lambda p: F.layer_norm(x + residual, (c.H,), weight, bias)},
        (x, residual, weight, bias),
        bytes_moved=3 * x.nbytes,  # two arrays are read and one written
    )
