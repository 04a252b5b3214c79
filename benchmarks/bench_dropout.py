"""Dropout, forward and backward, with a new mask in every call."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from fastllm.benchmarking.shapes import CONFIGS, Letter
from fastllm.ops.dropout import draw_seed, dropout


# pytest benchmarks/bench_dropout.py --benchmark-only
@pytest.mark.parametrize("letter", ["A", "B", "D"])
def test_dropout(race_operation: Callable[..., None], letter: Letter) -> None:
    c = CONFIGS[letter]
    # As large as the activations between an MLP's two products.
    x = torch.randn(c.B, c.S, 4 * c.H, requires_grad=True)
    for out in (dropout(x, c.dropout, draw_seed()), F.dropout(x, c.dropout)):
        dropped = (out == 0).float().mean().item()
        assert abs(dropped - c.dropout) < 5 * (c.dropout * (1 - c.dropout) / x.numel()) ** 0.5
    race_operation(
        f"dropout {letter}",
        # With p=0 dropout returns x itself; x * 1 gives the comparison an output of its own.
        lambda p: dropout(x, p, draw_seed()) if p else x * 1,
        {"eager": lambda p: F.dropout(x, p) if p else x * 1},
        (x,),
        c.dropout,
        bytes_moved=2 * x.nbytes,
    )
