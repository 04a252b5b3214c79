"""The norms, dropout and residual connection around a sublayer."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastllm.ops import extension
from fastllm.ops.decoder import Mlp, MultiHeadAttention
from fastllm.ops.dropout import dropout
from fastllm.ops.memory import address
from fastllm.ops.norm import norm


def enter(x: Tensor, sublayer: MultiHeadAttention | Mlp) -> Tensor:
    """The input of the sublayer's first linear layers."""
    return norm(x, sublayer.norm) if sublayer.norm and sublayer.norm_first else x


def leave(out: Tensor, base: Tensor, sublayer: MultiHeadAttention | Mlp) -> Tensor:
    """The output of the sublayer's last linear layer, connected to `base`, usually its input."""
    if sublayer.out_norm is not None:
        out = norm(out, sublayer.out_norm)
    out = dropout(out, *sublayer.out_dropout)
    if sublayer.norm is None and sublayer.out_norm is None:
        return out
    if sublayer.residual_scale != 1:
        out = out * sublayer.residual_scale
    if sublayer.norm is None or sublayer.norm_first:
        return base + out
    return norm(out, sublayer.norm, base)


def saved_for_backward(x: Tensor, sublayer: MultiHeadAttention | Mlp) -> list[Tensor | None]:
    """Memory for what the C++ kernels save of the connection: see `ResidualSaved` there."""
    stats = x.numel() // x.size(-1), 2
    post = sublayer.norm is not None and not sublayer.norm_first
    return [
        x.new_empty(stats) if sublayer.norm else None,
        x.new_empty(x.shape) if post else None,
        x.new_empty(stats) if sublayer.out_norm else None,
        x.new_empty(x.shape) if sublayer.out_norm else None,
    ]


NOTHING_SAVED: list[Tensor | None] = [None] * 4


def saved_to_kernel(tensors: Sequence[Tensor | None]) -> Any:
    stats, sum_, out_stats, out = map(address, tensors)
    return extension.kernels.ResidualSaved(stats=stats, sum=sum_, out_stats=out_stats, out=out)
