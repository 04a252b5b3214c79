"""The head and the loss."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastllm.benchmarking.shapes import CONFIGS, Letter
from fastllm.ops.decoder import Linear
from fastllm.ops.linear_cross_entropy import linear_cross_entropy


# pytest benchmarks/bench_linear_cross_entropy.py --benchmark-only
@pytest.mark.parametrize("letter", CONFIGS)
def test_linear_cross_entropy(race_operation: Callable[..., None], letter: Letter) -> None:
    c = CONFIGS[letter]
    x = torch.randn(c.B * c.S, c.H, requires_grad=True)
    weight = (torch.randn(c.V, c.H) / c.H**0.5).requires_grad_()
    targets = c.random_ids().flatten()

    def eager(p: float) -> Tensor:
        return F.cross_entropy(F.linear(x, weight), targets)

    rivals = {"eager": eager}
    if hasattr(nn, "LinearCrossEntropyOptions"):  # PyTorch 2.13
        options = nn.LinearCrossEntropyOptions()  # without them it is the same as eager
        rivals["call"] = lambda p: F.linear_cross_entropy(x, weight, targets, options=options)
    race_operation(
        f"linear_cross_entropy {letter}",
        lambda p: linear_cross_entropy(x, Linear(weight, None), targets),
        rivals,
        (x, weight),
        flops=2 * c.B * c.S * c.H * c.V,
    )
