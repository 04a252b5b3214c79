"""Multi-head self-attention (Vaswani et al. 2017, section 3.2.2) as a whole."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.ops import dispatch
from fastllm.ops.attention import attention, check_mask, mask_description, why_not_mask
from fastllm.ops.dropout import dropout
from fastllm.ops.layer_norm import layer_norm
from fastllm.ops.parameters import (
    Linear,
    Norm,
    address,
    addresses,
    check_first_derivative,
    contiguous,
    laid_out,
    linear_description,
    needs_grad,
    new_grad,
)


class Settings(NamedTuple):
    """What is no tensor to differentiate by.

    Attributes:
        dropout_p, seed: of the attention weights.
        out_dropout_p, out_seed: of the output projection's result.
        norm_first: `x + f(norm(x))` rather than `norm(x + f(x))`.
        starts: where each sequence begins in rows of several, and the last one ends; then there is
            no mask.
    """

    num_heads: int
    attn_mask: Tensor | None = None
    is_causal: bool = False
    dropout_p: float = 0.0
    seed: int = 0
    out_dropout_p: float = 0.0
    out_seed: int = 0
    norm_first: bool = True
    starts: tuple[int, ...] | None = None

    def sizes(self, x: Tensor) -> tuple[int, int]:
        """B and S of x, the length of the longest sequence."""
        if self.starts is None:
            return x.size(0), x.size(1)
        return len(self.starts) - 1, max(end - begin for begin, end in pairwise(self.starts))


def multi_head_attention_ref(
    x: Tensor, qkv: Linear, out: Linear, settings: Settings, norm: Norm | None
) -> Tensor:
    B, S, H = *settings.sizes(x), x.size(-1)
    N, attn_mask, is_causal, dropout_p, seed, out_dropout_p, out_seed, norm_first, starts = settings
    normed = layer_norm(x, norm) if norm and norm_first else x
    projected = F.linear(normed, *qkv)
    if starts is not None:
        filled, attn_mask = filled_rows(starts, S, x.device)
        projected = projected.new_zeros(B, S, 3 * H).masked_scatter(filled[..., None], projected)
    q, k, v = projected.view(B, S, 3, N, H // N).permute(2, 0, 3, 1, 4)
    heads = attention(q, k, v, attn_mask, is_causal, dropout_p, seed).transpose(1, 2)
    heads = heads.reshape(B, S, H) if starts is None else heads.reshape(B, S, H)[filled]
    y = dropout(F.linear(heads, *out), out_dropout_p, out_seed)
    if norm is None:
        return y
    return x + y if norm_first else layer_norm(y, norm, x)


def filled_rows(starts: Sequence[int], S: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which of [B, S] hold a row of sequences side by side, and the mask of the other keys."""
    lengths = torch.tensor([end - begin for begin, end in pairwise(starts)], device=device)
    filled = torch.arange(S, device=device) < lengths[:, None]
    return filled, ~filled[:, None, None]


class MultiHeadAttentionFunction(torch.autograd.Function):
    """The C++ kernel; keeps the projections and the heads' outputs."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, settings: Settings, eps: float, keep: bool, *parameters: Tensor | None
    ) -> Tensor:
        B, S = settings.sizes(x)
        N, H = settings.num_heads, x.size(-1)
        rows = x.numel() // H
        normed = parameters[4] is not None
        out, qkv, heads = torch.empty_like(x), x.new_empty(rows, 3 * H), torch.empty_like(x)
        stats = x.new_empty(rows, 2) if keep and normed else None
        total = torch.empty_like(x) if keep and normed and not settings.norm_first else None
        ctx.settings, ctx.eps, ctx.sizes = settings, eps, (B, S, N, H // N)
        ctx.precision = dispatch.precision()
        # A tensor, for its memory: the kernel reads it in both directions.
        starts = settings.starts
        ctx.starts = starts and torch.tensor(starts, dtype=torch.int64, device="cpu")
        dispatch.kernels.multi_head_attention_fwd(
            address(out),
            addresses(stats, qkv, heads, total),
            address(x),
            MultiHeadAttentionFunction.description(ctx, parameters),
            torch.get_num_threads(),
        )
        if keep:
            # The mask as well, so that a change to it before the backward is noticed.
            ctx.save_for_backward(settings.attn_mask, x, stats, qkv, heads, total, *parameters)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        _, x, stats, qkv, heads, total, *parameters = ctx.saved_tensors
        wanted, wanted_parameters = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        wanted_norm = any(wanted_parameters[4:])  # the kernel gives both gradients or neither
        grad_x = new_grad(x, wanted)
        grads = [
            new_grad(p, need) for p, need in zip(parameters[:4], wanted_parameters[:4], strict=True)
        ]
        grads += [new_grad(p, wanted_norm) for p in parameters[4:]]
        grad_out = grad_out.contiguous()
        qkv_weight, qkv_bias, out_weight, out_bias, norm_weight, norm_bias = addresses(*grads)
        dispatch.kernels.multi_head_attention_bwd(
            address(grad_x),
            [(norm_weight, norm_bias), (qkv_weight, qkv_bias), (out_weight, out_bias)],
            address(grad_out),
            addresses(stats, qkv, heads, total),
            address(x),
            MultiHeadAttentionFunction.description(ctx, parameters),
            torch.get_num_threads(),
        )
        return grad_x, None, None, None, *grads

    @staticmethod
    def description(ctx: Any, parameters: Any) -> tuple[Any, ...]:
        """`MultiHeadAttention` of csrc/kernels.h."""
        B, S, N, _ = ctx.sizes
        norm_weight, norm_bias = addresses(*parameters[4:])
        settings = ctx.settings
        return (
            ctx.sizes,
            address(ctx.starts),
            (norm_weight, norm_bias, ctx.eps),
            settings.norm_first,
            linear_description(*parameters[:2]),
            linear_description(*parameters[2:4]),
            mask_description(settings.attn_mask, B, N, S, S),
            settings.is_causal,
            (settings.dropout_p, settings.seed),
            (settings.out_dropout_p, settings.out_seed),
            ctx.precision,
        )


def multi_head_attention_cpu(
    x: Tensor, qkv: Linear, out: Linear, settings: Settings, norm: Norm | None
) -> Tensor:
    weight, bias, eps = norm or (None, None, 0.0)
    x, parameters = x.contiguous(), [*laid_out(qkv), *laid_out(out), *contiguous(weight, bias)]
    keep = needs_grad(x, *parameters)
    return MultiHeadAttentionFunction.apply(x, settings, eps, keep, *parameters)


def why_not_cpu(
    x: Tensor | None = None,
    qkv: Linear | None = None,
    out: Linear | None = None,
    settings: Settings | None = None,
    norm: Norm | None = None,
) -> str | None:
    if x is None or qkv is None or out is None or settings is None:
        return dispatch.why_not_cpu()
    if x.numel() == 0:
        return "there are no elements"
    if not (0 <= settings.dropout_p < 1 and 0 <= settings.out_dropout_p < 1):
        return "everything is dropped, or the probability is none"
    H = x.size(-1)
    if not (qkv.fits(3 * H, H) and out.fits(H, H) and (norm is None or norm.fits(H))):
        return "a bias or a norm does not fit the weights"
    return why_not_mask(settings.attn_mask) or dispatch.why_not_fused(
        x, *qkv, *out, *(norm[:2] if norm else ())
    )


def why_not_triton(x: Tensor | None = None, *others: Any) -> str | None:
    return dispatch.why_not_triton(x)


IMPLEMENTATIONS: list[dispatch.Implementation] = [
    dispatch.Implementation("cpu", multi_head_attention_cpu, why_not_cpu),
    # Its parts by their own implementations, between products that cuBLAS does best.
    dispatch.Implementation("triton", multi_head_attention_ref, why_not_triton),
    dispatch.Implementation("ref", multi_head_attention_ref),
]


def check_starts(starts: Sequence[int], rows: int, attn_mask: Tensor | None) -> None:
    """Raises a `ValueError` where sequences side by side are not described well."""
    if attn_mask is not None:
        raise ValueError("starts and attn_mask exclude each other")
    if len(starts) < 2 or starts[0] != 0 or starts[-1] != rows or list(starts) != sorted(starts):
        raise ValueError(f"starts must rise from 0 to the number of rows {rows}, got {starts}")


def multi_head_attention(
    x: Tensor, qkv: Linear, out: Linear, settings: Settings, norm: Norm | None = None
) -> Tensor:
    """Self-attention over N heads: `dropout(out(attention(qkv(x))))`.

    Args:
        x: [B, S, H]; or [rows, H], sequences side by side, with `settings.starts`.
        qkv: weight [3 H, H], rows ordered q, k, v, each by head.
        out: weight [H, H].
        settings: see `Settings`; `attn_mask` is boolean, broadcastable to [B, N, S, S], **True
            means masked**.
        norm: a layer norm; it brings the residual connection.

    Returns:
        Of x's shape.

    Raises:
        TypeError: the mask is not boolean.
        ValueError: sizes do not fit each other.
    """
    check_mask(settings.attn_mask)
    H, starts = x.size(-1), settings.starts
    fits = qkv.weight.shape == (3 * H, H) and out.weight.shape == (H, H)
    if x.ndim != (3 if starts is None else 2) or not fits:
        raise ValueError(
            f"x {list(x.shape)}, qkv {list(qkv.weight.shape)} and out {list(out.weight.shape)} do "
            "not fit: [B, S, H], [3 H, H] and [H, H] are needed"
        )
    if starts is not None:
        check_starts(starts, x.size(0), settings.attn_mask)
    if H % settings.num_heads:
        raise ValueError(f"the width {H} must be divisible by num_heads ({settings.num_heads})")
    arguments = (dispatch.autocast_input(x, qkv.weight), qkv, out, settings, norm)
    return dispatch.choose("multi_head_attention", IMPLEMENTATIONS, *arguments).run(*arguments)
