"""Embedding in Triton: lookup, scale, position and dropout in one pass.

PyTorch computes the table's gradient: it sorts the ids and sums each id's rows without atomics,
and a kernel of our own would do the same.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllm.ops.autograd import check_first_derivative
from fastllm.ops.blocks_triton import ELEMENTS, elements, keep_mask, rounded
from fastllm.ops.decoder import Embedding
from fastllm.ops.dropout import dropout, dropped_of_65536
from fastllm.ops.memory import contiguous


@triton.jit(do_not_specialize=["seed", "dropped"])
def embedding_fwd(
    out, ids, weight, positions, size, S, H, scale, seed, dropped, factor,
    DROPOUT: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    first, at, inside = elements(size, ELEMENTS)
    row, h = at // H, at % H
    token = tl.load(ids + row, inside, other=0).to(tl.int64)
    x = tl.load(weight + token * H + h, inside, other=0).to(tl.float32) * scale
    if positions is not None:
        x += tl.load(positions + row % S * H + h, inside, other=0).to(tl.float32)
    if DROPOUT:
        x *= tl.where(keep_mask(first, seed, 0, dropped, ELEMENTS // 64, 64), factor, 0.0)
    tl.store(out + at, rounded(x, out.dtype.element_ty), inside)


class EmbeddingFunction(torch.autograd.Function):
    """Saves only the ids."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, embedding: Embedding, weight: Tensor, positions: Tensor | None
    ) -> Tensor:
        (B, S), H = ids.shape, weight.size(1)
        out = weight.new_empty(B, S, H)
        p, seed = embedding.dropout
        dropped = dropped_of_65536(p)
        embedding_fwd[(triton.cdiv(out.numel(), ELEMENTS),)](
            out, ids, weight, positions, out.numel(), S, H, embedding.scale, seed, dropped,
            65536 / (65536 - dropped), DROPOUT=p > 0, ELEMENTS=ELEMENTS,
        )  # fmt: skip
        ctx.save_for_backward(ids)
        ctx.embedding, ctx.V = embedding.with_parameters(iter((None, None))), weight.size(0)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        (ids,) = ctx.saved_tensors
        _, _, weight_needed, positions_needed = ctx.needs_input_grad
        grad = dropout(grad_out, *ctx.embedding.dropout)
        grad_weight = None
        if weight_needed:
            grad_weight = torch.ops.aten.embedding_dense_backward(
                grad * ctx.embedding.scale, ids, ctx.V, ctx.embedding.row_without_grad, False
            )
        return None, None, grad_weight, grad.sum(0) if positions_needed else None


def embedding_triton(ids: Tensor, embedding: Embedding) -> Tensor:
    """See `fastllm.ops.embedding.embedding`."""
    tables = contiguous(*embedding.parameters())
    return EmbeddingFunction.apply(ids.long().contiguous(), embedding, *tables)
