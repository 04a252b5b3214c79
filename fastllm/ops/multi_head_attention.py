"""Multi-head self-attention (Vaswani et al. 2017, section 3.2.2) as a whole."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.ops import dispatch, extension
from fastllm.ops.attention import attention, check_mask, why_not_mask
from fastllm.ops.autograd import check_first_derivative, needs_grad
from fastllm.ops.decoder import MultiHeadAttention
from fastllm.ops.dropout import DROPOUT_RANGE, dropout
from fastllm.ops.memory import address, kernel_layout, new_grad
from fastllm.ops.norm import norm
from fastllm.ops.precision import autocast_input, product_precision


def multi_head_attention_ref(x: Tensor, mha: MultiHeadAttention) -> Tensor:
    B, S, H, N = *mha.sizes(x), x.size(-1), mha.heads
    qkv = F.linear(norm(x, mha.norm) if mha.norm and mha.norm_first else x, *mha.qkv)
    mask, rows = mha.mask, None
    if mha.starts is not None:
        rows, mask = unpacked_rows(mha.starts, S, x.device)
        qkv = qkv.new_zeros(B, S, 3 * H).masked_scatter(rows[..., None], qkv)
    q, k, v = qkv.view(B, S, 3, N, H // N).permute(2, 0, 3, 1, 4)
    heads = attention(q, k, v, mask, mha.causal, *mha.weights_dropout)
    heads = heads.transpose(1, 2).reshape(B, S, H)
    out = dropout(F.linear(heads if rows is None else heads[rows], *mha.out), *mha.out_dropout)
    if mha.norm is None:
        return out
    return x + out if mha.norm_first else norm(out, mha.norm, x)


def unpacked_rows(starts: Sequence[int], S: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which of [B, S] hold a row of the packed sequences, and a mask that hides the other keys."""
    lengths = torch.tensor([end - begin for begin, end in pairwise(starts)], device=device)
    rows = torch.arange(S, device=device) < lengths[:, None]
    return rows, ~rows[:, None, None]


class MultiHeadAttentionFunction(torch.autograd.Function):
    """The C++ kernel; saves the projections and the heads' outputs."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mha: MultiHeadAttention, keep: bool, *parameters: Tensor | None
    ) -> Tensor:
        B, S, H = *mha.sizes(x), x.size(-1)
        rows = x.numel() // H
        out, qkv, attn_out = torch.empty_like(x), x.new_empty(rows, 3 * H), torch.empty_like(x)
        stats = x.new_empty(rows, 2) if keep and mha.norm else None
        post_norm = mha.norm is not None and not mha.norm_first
        residual = torch.empty_like(x) if keep and post_norm else None
        ctx.precision, ctx.sizes = product_precision(), (B, S)
        # A tensor, because the kernels read it from memory in both directions.
        ctx.starts = mha.starts and torch.tensor(mha.starts, dtype=torch.int64, device="cpu")
        extension.kernels.multi_head_attention_fwd(
            out=out.data_ptr(),
            saved=saved_to_kernel(stats, qkv, attn_out, residual),
            x=x.data_ptr(),
            attention=mha.to_kernel(B, S, ctx.starts, ctx.precision),
            threads=torch.get_num_threads(),
        )
        if keep:
            ctx.mha = mha.with_parameters(iter([None] * len(parameters)))._replace(mask=None)
            # Saving the mask lets autograd detect a change to it before the backward.
            ctx.save_for_backward(mha.mask, x, stats, qkv, attn_out, residual, *parameters)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        mask, x, stats, qkv, attn_out, residual, *parameters = ctx.saved_tensors
        x_needed, _, _, *needed = ctx.needs_input_grad
        grad_x = new_grad(x, x_needed)
        grads = [new_grad(p, need) for p, need in zip(parameters, needed, strict=True)]
        grad_out = grad_out.contiguous()
        mha = ctx.mha.with_parameters(iter(parameters))._replace(mask=mask)
        B, S = ctx.sizes
        extension.kernels.multi_head_attention_bwd(
            grad_x=address(grad_x),
            grad=ctx.mha.with_parameters(iter(grads)).to_kernel_grad(),
            grad_out=grad_out.data_ptr(),
            saved=saved_to_kernel(stats, qkv, attn_out, residual),
            x=x.data_ptr(),
            attention=mha.to_kernel(B, S, ctx.starts, ctx.precision),
            threads=torch.get_num_threads(),
        )
        return grad_x, None, None, *grads


def saved_to_kernel(
    stats: Tensor | None, qkv: Tensor, attn_out: Tensor, residual: Tensor | None
) -> Any:
    return extension.kernels.MultiHeadAttentionSaved(
        stats=address(stats),
        qkv=qkv.data_ptr(),
        attn_out=attn_out.data_ptr(),
        residual=address(residual),
    )


def multi_head_attention_cpu(x: Tensor, mha: MultiHeadAttention) -> Tensor:
    x = x.contiguous()
    mha = mha.with_parameters(iter(map(kernel_layout, mha.parameters())))
    parameters = mha.parameters()
    return MultiHeadAttentionFunction.apply(x, mha, needs_grad(x, *parameters), *parameters)


def why_not_cpu(x: Tensor, mha: MultiHeadAttention) -> str | None:
    if x.numel() == 0:
        return "x is empty"
    if not 0 <= mha.weights_dropout.p < 1 or not 0 <= mha.out_dropout.p < 1:
        return DROPOUT_RANGE
    reason = mha.why_not_sizes(x.size(-1)) or why_not_mask(mha.mask, x.device)
    return reason or dispatch.why_not_cpu_fused(x, *mha.parameters())


def why_not_triton(x: Tensor, mha: MultiHeadAttention) -> str | None:
    return dispatch.why_not_triton(x)


IMPLEMENTATIONS = [
    dispatch.cpu(multi_head_attention_cpu, why_not_cpu),
    # Each part has its own implementation, between products for which cuBLAS is best.
    dispatch.Implementation(
        "triton", multi_head_attention_ref, dispatch.why_not_triton_here, why_not_triton
    ),
    dispatch.reference(multi_head_attention_ref),
]


def check_starts(starts: Sequence[int], rows: int, mask: Tensor | None) -> None:
    """Raises a `ValueError` if `starts` does not describe sequences packed into `rows` rows."""
    if mask is not None:
        raise ValueError("starts and mask are mutually exclusive")
    if len(starts) < 2 or starts[0] != 0 or starts[-1] != rows or list(starts) != sorted(starts):
        raise ValueError(f"starts must rise from 0 to the number of rows {rows}, got {starts}")


def multi_head_attention(x: Tensor, mha: MultiHeadAttention) -> Tensor:
    """Self-attention: `dropout(out(attention(qkv(x))))`, with layer norm and residual if there is a
    norm.

    Args:
        x: [B, S, H]; or packed sequences [rows, H], with `starts`.
        mha: see `MultiHeadAttention`.

    Returns:
        A tensor of x's shape.

    Raises:
        TypeError: the mask is not boolean.
        ValueError: sizes do not match.
    """
    check_mask(mha.mask)
    H = x.size(-1)
    qkv, out = mha.qkv.weight, mha.out.weight
    fits = qkv.shape == (3 * H, H) and out.shape == (H, H)
    if x.ndim != (3 if mha.starts is None else 2) or not fits:
        raise ValueError(
            f"the shapes of x {list(x.shape)}, qkv {list(qkv.shape)} and out {list(out.shape)} "
            "do not match: [B, S, H], [3 H, H] and [H, H] are needed"
        )
    if mha.starts is not None:
        check_starts(mha.starts, x.size(0), mha.mask)
    if H % mha.heads:
        raise ValueError(f"the width {H} must be divisible by the number of heads ({mha.heads})")
    arguments = (autocast_input(x, qkv), mha)
    return dispatch.choose("multi_head_attention", IMPLEMENTATIONS, *arguments).run(*arguments)
