"""Rotary positions (Su et al. 2021) of queries and keys."""

import torch
from torch import Tensor

from fastllm.ops.decoder import Rope


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """x [B, N, S, D], each position's pairs of elements rotated by its angles, in fp32 at least."""
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
