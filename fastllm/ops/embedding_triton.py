"""Embedding in Triton: lookup, scale, position and dropout in one pass.

The gradient by the table stays PyTorch's: it sorts the ids and sums the rows of each, without
atomics, which is what a kernel of our own would do.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllm.ops.blocks_triton import ELEMENTS, elements, keep_mask, rounded
from fastllm.ops.dropout import dropout, dropped_of_65536
from fastllm.ops.embedding import Settings
from fastllm.ops.parameters import check_first_derivative


@triton.jit(do_not_specialize=["seed", "dropped"])
def embedding_fwd(
    out, ids, weight, positions, size, S, H, scale, seed, dropped, factor,
    DROPOUT: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    first, at, inside = elements(size, ELEMENTS)
    row, h = at // H, at % H
    token = tl.load(ids + row, inside, other=0).to(tl.int64)
    x = tl.load(weight + token * H + h, inside, other=0).to(tl.float32) * scale
    x += tl.load(positions + row % S * H + h, inside, other=0).to(tl.float32)
    if DROPOUT:
        x *= tl.where(keep_mask(first, seed, 0, dropped, ELEMENTS // 64, 64), factor, 0.0)
    tl.store(out + at, rounded(x, out.dtype.element_ty), inside)


class EmbeddingFunction(torch.autograd.Function):
    """Keeps the ids alone."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: Tensor, positions: Tensor, settings: Settings
    ) -> Tensor:
        (B, S), H = ids.shape, weight.size(1)
        out = weight.new_empty(B, S, H)
        scale, _, dropout_p, seed = ctx.settings = settings
        dropped = dropped_of_65536(dropout_p)
        embedding_fwd[(triton.cdiv(out.numel(), ELEMENTS),)](
            out, ids, weight, positions, out.numel(), S, H, scale, seed, dropped,
            65536 / (65536 - dropped), DROPOUT=dropout_p > 0, ELEMENTS=ELEMENTS,
        )  # fmt: skip
        ctx.save_for_backward(ids)
        ctx.V = weight.size(0)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        (ids,) = ctx.saved_tensors
        scale, padding_idx, dropout_p, seed = ctx.settings
        _, for_weight, for_positions, _ = ctx.needs_input_grad
        grad = dropout(grad_out, dropout_p, seed)
        padding_idx = -1 if padding_idx is None else padding_idx
        grad_weight = None
        if for_weight:
            grad_weight = torch.ops.aten.embedding_dense_backward(
                grad * scale, ids, ctx.V, padding_idx, False
            )
        return None, grad_weight, grad.sum(0) if for_positions else None, None


def embedding_triton(ids: Tensor, weight: Tensor, positions: Tensor, settings: Settings) -> Tensor:
    """See `fastllm.ops.embedding.embedding`."""
    ids, weight, positions = ids.long().contiguous(), weight.contiguous(), positions.contiguous()
    return EmbeddingFunction.apply(ids, weight, positions, settings)
