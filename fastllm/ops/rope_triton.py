"""Rotary positions in Triton.

Roofline: each element is read and written once, 4 bytes in 16 bits, where the reference moves it
several times. The table stays in the caches: a position's angles serve all of its heads, which a
program rotates together.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllm.ops.autograd import check_first_derivative
from fastllm.ops.blocks_triton import heads_beside_each_other, rounded
from fastllm.ops.decoder import Rope

PAIRS = 1024  # of elements, per program


@triton.jit(do_not_specialize=["heads", "S"])
def rope_kernel(
    out, x, table, out_strides, x_strides, heads, N, S, D, R,
    INTERLEAVED: tl.constexpr, PARTIAL: tl.constexpr, BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rotates BLOCK of all `heads`, ordered by sequence, position and head; backward, by -angles.

    Strides are those of [B, N, S, D]; BLOCK_P holds R / 2 pairs.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pair, d = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    sequence, position, head = (at // N // S).to(tl.int64), at // N % S, at % N
    x += sequence * x_strides[0] + head * x_strides[1] + position.to(tl.int64) * x_strides[2]
    out += sequence * out_strides[0] + head * out_strides[1]
    out += position.to(tl.int64) * out_strides[2]
    inside = (at < heads)[:, None] & (pair < R // 2)[None, :]
    angles = table + position[:, None] * R + pair[None, :]
    cos = tl.load(angles, inside, other=0)
    sin = tl.load(angles + R // 2, inside, other=0)
    if BACKWARD:
        sin = -sin
    if INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, pair + R // 2
    a = tl.load(x[:, None] + first[None, :], inside, other=0).to(tl.float32)
    b = tl.load(x[:, None] + second[None, :], inside, other=0).to(tl.float32)
    turned = rounded(a * cos - b * sin, out.dtype.element_ty)
    tl.store(out[:, None] + first[None, :], turned, inside)
    turned = rounded(b * cos + a * sin, out.dtype.element_ty)
    tl.store(out[:, None] + second[None, :], turned, inside)
    if PARTIAL:
        rest = (at < heads)[:, None] & ((d >= R) & (d < D))[None, :]
        tl.store(out[:, None] + d[None, :], tl.load(x[:, None] + d[None, :], rest), rest)


def rotated(x: Tensor, rope: Rope, backward: bool) -> Tensor:
    """x [B, N, S, D] rotated by the angles, or by their negatives."""
    (B, N, S, D), R = x.shape, rope.table.size(1)
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = heads_beside_each_other(x)
    pairs = triton.next_power_of_2(R // 2)
    block = max(1, PAIRS // pairs)
    rope_kernel[(triton.cdiv(B * S * N, block),)](
        out, x, rope.table, out.stride(), x.stride(), B * S * N, N, S, D, R,
        INTERLEAVED=rope.interleaved, PARTIAL=R < D, BACKWARD=backward,
        BLOCK=block, BLOCK_P=pairs, BLOCK_D=triton.next_power_of_2(D),
    )  # fmt: skip
    return out


class RopeFunction(torch.autograd.Function):
    """Saves nothing but the table."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rope: Rope) -> Tensor:
        ctx.rope = rope
        return rotated(x, rope, backward=False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        return rotated(grad_out, ctx.rope, backward=True), None


def rope_triton(x: Tensor, rope: Rope) -> Tensor:
    """See `fastllm.ops.rope.rotate`."""
    return RopeFunction.apply(x, rope._replace(table=rope.table.contiguous()))
