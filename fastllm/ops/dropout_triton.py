"""Dropout in Triton: reads and writes each element once, and stores no random bits."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllm.ops.blocks_triton import ELEMENTS, elements, keep_mask, rounded
from fastllm.ops.dropout import dropout, dropped_of_65536


@triton.jit(do_not_specialize=["seed", "stream", "dropped"])
def dropout_kernel(out, x, size, seed, stream, dropped, factor, ELEMENTS: tl.constexpr):
    first, at, inside = elements(size, ELEMENTS)
    kept = keep_mask(first, seed, stream, dropped, ELEMENTS // 64, 64)
    # Multiplying by 0, rather than selecting 0, keeps NaN in dropped elements.
    y = tl.load(x + at, inside, other=0).to(tl.float32) * tl.where(kept, factor, 0.0)
    tl.store(out + at, rounded(y, out.dtype.element_ty), inside)


class DropoutFunction(torch.autograd.Function):
    """Dropout is linear, so the backward is the forward on the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int, stream: int) -> Tensor:
        ctx.settings = p, seed, stream
        x = x.contiguous()
        out = torch.empty_like(x)
        dropped = dropped_of_65536(p)
        factor = 65536 / (65536 - dropped)
        dropout_kernel[(triton.cdiv(x.numel(), ELEMENTS),)](
            out, x, x.numel(), seed, stream, dropped, factor, ELEMENTS=ELEMENTS
        )
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None, None]:
        return dropout(grad_out, *ctx.settings), None, None, None


def dropout_triton(x: Tensor, p: float, seed: int, stream: int) -> Tensor:
    """See `fastllm.ops.dropout.dropout`."""
    return DropoutFunction.apply(x, p, seed, stream)
