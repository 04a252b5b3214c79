"""Rotary positions (Su et al. 2021) of queries and keys."""

import torch
from torch import Tensor

from fastllm.ops import dispatch
from fastllm.ops.decoder import Rope


def rope_ref(x: Tensor, rope: Rope) -> Tensor:
    R = rope.table.size(1)
    cos, sin = rope.table.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    turned, rest = x[..., :R], x[..., R:]
    if rope.interleaved:
        a, b = turned.unflatten(-1, (R // 2, 2)).unbind(-1)
    else:
        a, b = turned.chunk(2, -1)
    pair = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack(pair, -1).flatten(-2) if rope.interleaved else torch.cat(pair, -1)
    return torch.cat((turned.to(x.dtype), rest), -1) if x.size(-1) > R else turned.to(x.dtype)


def why_not_triton(x: Tensor, rope: Rope) -> str | None:
    table = rope.table
    if x.ndim != 4 or x.numel() == 0:
        return "x is empty or not [B, N, S, D]"
    if len(table) != x.size(2) or table.size(1) > x.size(3):
        return (
            f"the table is {list(table.shape)} for {x.size(2)} positions and heads of {x.size(3)}"
        )
    if table.dtype is not torch.float32 or table.device != x.device:
        return f"the table is {table.dtype} on {table.device}"
    return dispatch.why_not_triton(x)


# On a CPU the kernel of the whole attention rotates.
IMPLEMENTATIONS = [
    dispatch.triton("rope", why_not_triton),
    dispatch.reference(rope_ref),
]


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """x [B, N, S, D], each position's pairs of elements rotated by its angles, in fp32 at least.

    Args:
        rope: with a table for S positions.
    """
    return dispatch.choose("rope", IMPLEMENTATIONS, x, rope).run(x, rope)
