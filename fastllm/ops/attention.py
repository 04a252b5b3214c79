"""Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1) over heads."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastllm.ops import dispatch
from fastllm.ops.dropout import dropout
from fastllm.ops.parameters import address, addresses, check_first_derivative


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    seed: int,
) -> Tensor:
    S, T = q.size(-2), k.size(-2)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
    masked = attn_mask
    if is_causal:
        # Aligned at the end: with a cache, the S queries are the last of T positions.
        ahead = torch.ones(S, T, dtype=torch.bool, device=q.device).triu(T - S + 1)
        masked = ahead if masked is None else masked | ahead
    if masked is None:
        weights = scores.softmax(-1)
    else:
        weights = scores.masked_fill(masked, -math.inf).softmax(-1)
        # The softmax of a row with nothing left is 0 / 0; such a row attends to nothing.
        weights = weights.masked_fill(masked.all(-1, keepdim=True), 0)
    if dropout_p:
        # Every row begins with a group of random numbers of its own.
        padded = torch.nn.functional.pad(weights, (0, -T % 64))
        weights = dropout(padded, dropout_p, seed)[..., :T]
    return weights @ v


class Settings(NamedTuple):
    """What is no tensor to differentiate by."""

    attn_mask: Tensor | None
    is_causal: bool
    dropout_p: float
    seed: int


def mask_description(attn_mask: Tensor | None, *sizes: int) -> tuple[int, tuple[int, ...]]:
    """`Mask` of csrc/kernels.h: the address of a mask broadcast to `sizes`, and its strides."""
    if attn_mask is None:
        return 0, (0, 0, 0, 0)
    return attn_mask.data_ptr(), attn_mask.expand(*sizes).stride()


class AttentionFunction(torch.autograd.Function):
    """The C++ kernel; keeps its inputs alone."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, settings: Settings) -> Tensor:
        B, N, S, D = q.shape
        ctx.settings, ctx.sizes = settings, (B, N, S, k.size(2), D)
        out = q.new_empty(B, N, S, D)
        dispatch.kernels.attention_fwd(
            address(out),
            AttentionFunction.description(ctx, q, k, v),
            torch.get_num_threads(),
        )
        # The mask as well, so that a change to it before the backward is noticed.
        ctx.save_for_backward(settings.attn_mask, q, k, v)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        _, q, k, v = ctx.saved_tensors
        grad_out = grad_out.contiguous()
        grads = [x.new_empty(x.shape) for x in (q, k, v)]
        dispatch.kernels.attention_bwd(
            addresses(*grads),
            address(grad_out),
            AttentionFunction.description(ctx, q, k, v),
            torch.get_num_threads(),
        )
        return *grads, None

    @staticmethod
    def description(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
        """`Attention` of csrc/kernels.h."""
        B, N, S, T, _ = ctx.sizes
        mask, is_causal, dropout_p, seed = ctx.settings
        return (
            ctx.sizes,
            [(x.data_ptr(), x.stride()[:3]) for x in (q, k, v)],
            mask_description(mask, B, N, S, T),
            is_causal,
            (dropout_p, seed),
        )


def attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    seed: int,
) -> Tensor:
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    settings = Settings(attn_mask, is_causal, dropout_p, seed)
    return AttentionFunction.apply(q, k, v, settings)


def why_not_cpu(
    q: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> str | None:
    if q is None or k is None or v is None:
        return dispatch.why_not_cpu()
    reason = why_not_qkv(q, k, v, dropout_p)
    return reason or why_not_mask(attn_mask) or dispatch.why_not_fused(q, k, v)


def why_not_qkv(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> str | None:
    if not q.ndim == k.ndim == v.ndim == 4 or q.shape[:2] != k.shape[:2] or k.shape != v.shape:
        return "q, k and v are not [B, N, S, D] and twice [B, N, T, D]"
    if q.numel() == 0 or k.numel() == 0:
        return "there are no elements"
    if not 0 <= dropout_p < 1:
        return "everything is dropped, or the probability is none"
    return None


def why_not_mask(attn_mask: Tensor | None) -> str | None:
    if attn_mask is not None and (type(attn_mask) is not Tensor or not attn_mask.is_cpu):
        return f"attn_mask is a {type(attn_mask).__name__} on {attn_mask.device}"
    return None


def why_not_triton(
    q: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> str | None:
    if q is None or k is None or v is None:
        return dispatch.why_not_triton()
    if (reason := why_not_qkv(q, k, v, dropout_p)) is not None:
        return reason
    if not q.dtype == k.dtype == v.dtype:
        return "q, k and v differ in type"
    if q.size(-1) > (widest := widest_triton_head(q.dtype)):
        return f"the heads are wider than {widest}, which does not fit into registers in {q.dtype}"
    if attn_mask is not None and (type(attn_mask) is not Tensor or attn_mask.device != q.device):
        return f"attn_mask is a {type(attn_mask).__name__} on {attn_mask.device}"
    if q.size(0) * q.size(1) > 65535:  # of what CUDA counts in the second direction of a grid
        return "there are more than 65,535 heads in the batch"
    return dispatch.why_not_triton(q, k, v)


def widest_triton_head(dtype: torch.dtype) -> int:
    """The largest D whose tiles fit into registers."""
    return 64 if dtype is torch.float32 else 128


IMPLEMENTATIONS: list[dispatch.Implementation] = [
    dispatch.Implementation("cpu", attention_cpu, why_not_cpu),
    dispatch.Implementation("triton", dispatch.run_triton("attention"), why_not_triton),
    dispatch.Implementation("ref", attention_ref),
]


def check_mask(attn_mask: Tensor | None) -> None:
    """Raises a `TypeError` where a mask is not boolean."""
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        raise TypeError(
            f"attn_mask must be boolean, True where masked, got {attn_mask.dtype}; "
            "turn an additive mask into one with `mask < 0`"
        )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """`softmax(q k^T / sqrt(D)) v` with masks and dropout on the weights.

    Args:
        q: [B, N, S, D].
        k, v: [B, N, T, D]; the S queries are the last S of the T positions.
        attn_mask: boolean, broadcastable to [B, N, S, T]; **True means masked**, the opposite of
            `torch.nn.functional.scaled_dot_product_attention`. Combined with causality by "or".
        is_causal: hide the positions after the query's own.
        dropout_p: probability of dropping a weight.
        seed: names the dropout mask; see `dropout`. A row's T weights are numbered as if they were
            filled up to a multiple of 64.

    Returns:
        [B, N, S, D]; zeros where a query may attend to nothing.

    Raises:
        TypeError: the mask is not boolean.
    """
    check_mask(attn_mask)
    arguments = (q, k, v, attn_mask, is_causal, dropout_p, seed)
    return dispatch.choose("attention", IMPLEMENTATIONS, *arguments).run(*arguments)
