"""Dropout, forward and backward, against PyTorch's."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.ops.dropout import draw_seed, dropout, dropout_ref

P = 0.1
SHAPES = {  # the activations between an MLP's two products: [B, S, 4 H]
    "B16-S32-H64": (16, 32, 256),
    "B32-S64-H128": (32, 64, 512),
    "B8-S256-H384": (8, 256, 1536),
}


def check_parity(x: Tensor, grad: Tensor) -> None:
    """fastllm's mask, forward and backward, is the reference's, and drops as much as PyTorch's."""
    ours, reference = dropout(x, P, seed=7), dropout_ref(x, P, seed=7, stream=0)
    assert torch.allclose(ours, reference)
    (our_grad,) = torch.autograd.grad(ours, x, grad)
    (reference_grad,) = torch.autograd.grad(reference, x, grad)
    assert torch.allclose(our_grad, reference_grad)
    for out in (ours, F.dropout(x, P)):
        dropped = (out == 0).float().mean().item()
        assert abs(dropped - P) < 5 * (P * (1 - P) / x.numel()) ** 0.5


# pytest benchmarks/bench_dropout.py --benchmark-only
@pytest.mark.parametrize("by", ["fastllm", "torch"])
@pytest.mark.parametrize("shape", SHAPES)
def test_dropout(time_it: Callable[..., None], shape: str, by: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(SHAPES[shape], requires_grad=True)
    grad = torch.randn_like(x)
    check_parity(x, grad)

    def run() -> None:
        # A fresh mask every time, as in training.
        out = dropout(x, P, draw_seed()) if by == "fastllm" else F.dropout(x, P)
        torch.autograd.grad(out, x, grad)

    # Forward and backward each read one array and write another.
    time_it(f"dropout {shape}", run, bytes_moved=4 * x.nbytes)
