"""The feed-forward network of a layer, with exact GELU."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.benchmarking.shapes import CONFIGS, Letter
from fastllm.ops.decoder import Dropout, Linear, Mlp
from fastllm.ops.dropout import draw_seed
from fastllm.ops.mlp import mlp


# pytest benchmarks/bench_mlp.py --benchmark-only
@pytest.mark.parametrize("letter", CONFIGS)
def test_mlp(race_operation: Callable[..., None], letter: Letter) -> None:
    c = CONFIGS[letter]
    H, I = c.H, 4 * c.H
    x, w1, b1 = torch.randn(c.B, c.S, H), torch.randn(I, H) / H**0.5, torch.randn(I)
    w2, b2 = torch.randn(H, I) / I**0.5, torch.randn(H)
    inputs = tuple(t.requires_grad_() for t in (x, w1, b1, w2, b2))

    def ours(p: float) -> Tensor:
        dropout = Dropout(p, draw_seed() if p else 0)
        return mlp(x, Mlp(Linear(w1, b1), Linear(w2, b2), hidden_dropout=dropout))

    def eager(p: float) -> Tensor:
        return F.linear(F.dropout(F.gelu(F.linear(x, w1, b1)), p), w2, b2)

    flops = 2 * c.B * c.S * 2 * H * I
    race_operation(f"mlp {letter}", ours, {"eager": eager}, inputs, c.dropout, flops=flops)
