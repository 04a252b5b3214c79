"""Causal attention of all heads, and whole multi-head attention."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.benchmarking.shapes import CONFIGS, Letter
from fastllm.ops.attention import attention
from fastllm.ops.decoder import Dropout, Linear, MultiHeadAttention
from fastllm.ops.dropout import draw_seed
from fastllm.ops.multi_head_attention import multi_head_attention


def explicit(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """Attention written without a fused call."""
    S = q.size(2)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
    hidden = torch.ones(S, S, dtype=torch.bool).triu(1)
    return F.dropout(scores.masked_fill(hidden, -math.inf).softmax(-1), p) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)


def seed(p: float) -> int:
    return draw_seed() if p else 0


# pytest benchmarks/bench_attention.py --benchmark-only -k core
@pytest.mark.parametrize("letter", CONFIGS)
def test_core(race_operation: Callable[..., None], letter: Letter) -> None:
    c = CONFIGS[letter]
    D = c.H // c.N
    q, k, v = (torch.randn(c.B, c.N, c.S, D, requires_grad=True) for _ in range(3))
    race_operation(
        f"attention {letter}",
        lambda p: attention(q, k, v, is_causal=True, dropout_p=p, seed=seed(p)),
        {"eager": lambda p: explicit(q, k, v, p), "call": lambda p: sdpa(q, k, v, p)},
        (q, k, v),
        c.dropout,
        flops=4 * c.B * c.N * c.S * c.S * D,  # two products, not halved for causality
    )


# pytest benchmarks/bench_attention.py --benchmark-only -k whole
@pytest.mark.parametrize("letter", CONFIGS)
def test_whole(race_operation: Callable[..., None], letter: Letter) -> None:
    c = CONFIGS[letter]
    B, S, H = c.B, c.S, c.H
    x, qkv, out = torch.randn(B, S, H), torch.randn(3 * H, H), torch.randn(H, H)
    b_qkv, b_out = torch.randn(3 * H), torch.randn(H)
    inputs = [x, qkv / H**0.5, out / H**0.5, b_qkv, b_out]
    x, qkv, out, b_qkv, b_out = (t.requires_grad_() for t in inputs)

    def ours(p: float) -> Tensor:
        mha = MultiHeadAttention(
            Linear(qkv, b_qkv),
            Linear(out, b_out),
            c.N,
            causal=True,
            weights_dropout=Dropout(p, seed(p)),
            out_dropout=Dropout(p, seed(p)),
        )
        return multi_head_attention(x, mha)

    def stock(attend: Callable[..., Tensor], p: float) -> Tensor:
        parts = F.linear(x, qkv, b_qkv).view(B, S, 3, c.N, H // c.N).permute(2, 0, 3, 1, 4)
        heads = attend(*parts, p).transpose(1, 2).reshape(B, S, H)
        return F.dropout(F.linear(heads, out, b_out), p)

    race_operation(
        f"multi_head_attention {letter}",
        ours,
        {"eager": lambda p: stock(explicit, p), "call": lambda p: stock(sdpa, p)},
        (x, qkv, out, b_qkv, b_out),
        c.dropout,
        flops=2 * B * S * 4 * H * H + 4 * B * S * S * H,
    )
