"""Causal attention, forward and backward, against PyTorch's `scaled_dot_product_attention`."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.bench import CONFIGS
from fastllm.ops.attention import attention, attention_ref
from fastllm.ops.dropout import draw_seed

SHAPES = {  # [B, N, S, D] of the configurations
    f"B{c.B}-N{c.N}-S{c.S}-D{c.H // c.N}": (c.B, c.N, c.S, c.H // c.N) for c in CONFIGS.values()
}


def run_fastllm(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    return attention(q, k, v, is_causal=True, dropout_p=p, seed=draw_seed() if p else 0)


def run_sdpa(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)


def check_parity(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, p: float) -> None:
    """Outputs and gradients agree with PyTorch's; with dropout, under one mask, the reference's."""
    ours = attention(q, k, v, is_causal=True, dropout_p=p, seed=7)
    expected = attention_ref(q, k, v, None, True, p, 7) if p else run_sdpa(q, k, v, p)
    our_grads = torch.autograd.grad(ours, (q, k, v), grad)
    grads = torch.autograd.grad(expected, (q, k, v), grad)
    pairs = zip((ours, *our_grads), (expected, *grads), strict=True)
    for actual, wanted in pairs:
        assert (actual - wanted).norm() <= 1e-5 * wanted.norm()


# pytest benchmarks/bench_attention.py --benchmark-only
@pytest.mark.parametrize("by", ["fastllm", "sdpa"])
@pytest.mark.parametrize("p", [0.0, 0.1], ids=["p0", "p0.1"])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(time_it: Callable[..., None], shape: str, p: float, by: str) -> None:
    torch.manual_seed(0)
    B, N, S, D = SHAPES[shape]
    q, k, v = (torch.randn(B, N, S, D, requires_grad=True) for _ in range(3))
    grad = torch.randn(B, N, S, D)
    check_parity(q, k, v, grad, p)
    forward = run_fastllm if by == "fastllm" else run_sdpa

    def run() -> None:
        torch.autograd.grad(forward(q, k, v, p), (q, k, v), grad)

    # Two products, not halved for causality; the backward counts as two forwards.
    time_it(f"attention {shape} p={p}", run, flops=3 * 4 * B * N * S * S * D)
