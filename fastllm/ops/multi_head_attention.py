"""Multi-head self-attention (Vaswani et al. 2017, section 3.2.2) as a whole."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.ops import dispatch, extension, residual
from fastllm.ops.attention import attention, check_mask, why_not_mask
from fastllm.ops.autograd import check_first_derivative, needs_grad
from fastllm.ops.decoder import MultiHeadAttention
from fastllm.ops.dropout import DROPOUT_RANGE
from fastllm.ops.memory import address, kernel_layout, new_grad
from fastllm.ops.norm import norm
from fastllm.ops.precision import autocast_input, product_precision
from fastllm.ops.rope import rotate


def multi_head_attention_ref(x: Tensor, mha: MultiHeadAttention) -> Tensor:
    B, S = mha.sizes(x)
    normed = residual.enter(x, mha)
    qkv = torch.cat([F.linear(normed, *linear) for linear in mha.projections], -1)
    mask, rows = mha.mask, None
    if mha.starts is not None:
        rows, mask = unpacked_rows(mha.starts, S, x.device)
        qkv = qkv.new_zeros(B, S, qkv.size(-1)).masked_scatter(rows[..., None], qkv)
    q, k, v = split_heads(qkv, mha)
    q, k = position_heads(q, k, mha)
    settings = *mha.weights_dropout, mha.window, mha.scale, mha.softcap
    heads = attention(q, k, v, mask, mha.causal, *settings)
    heads = heads.transpose(1, 2).flatten(2)
    out = F.linear(heads if rows is None else heads[rows], *mha.out)
    return residual.leave(out, x, mha)


def split_heads(qkv: Tensor, mha: MultiHeadAttention) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, N, S, D], keys and values [B, K, S, D] from all of them side by side."""
    q, k, v = (part.unflatten(-1, (-1, mha.head_dim)) for part in qkv.split(mha.widths, -1))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def position_heads(q: Tensor, k: Tensor, mha: MultiHeadAttention) -> tuple[Tensor, Tensor]:
    """q [B, N, S, D] and k [B, K, S, D], normalized and rotated as the record says."""
    if mha.q_norm is not None:
        q = norm(q, mha.q_norm)
    if mha.k_norm is not None:
        k = norm(k, mha.k_norm)
    if mha.rope is not None:
        rope = mha.rope._replace(table=mha.rope.table[: q.size(2)])
        q, k = rotate(q, rope), rotate(k, rope)
    return q, k


def unpacked_rows(starts: Sequence[int], S: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which of [B, S] hold a row of the packed sequences, and a mask that hides the other keys."""
    lengths = torch.tensor([end - begin for begin, end in pairwise(starts)], device=device)
    rows = torch.arange(S, device=device) < lengths[:, None]
    return rows, ~rows[:, None, None]


def run_kernel(
    x: Tensor, mha: MultiHeadAttention, saved: Sequence[Tensor | None], starts: Tensor | None
) -> Tensor:
    """The output of the C++ kernel, which fills `saved`."""
    out = torch.empty_like(x)
    extension.kernels.multi_head_attention_fwd(
        out=out.data_ptr(),
        saved=saved_to_kernel(saved),
        x=x.data_ptr(),
        attention=mha.to_kernel(*mha.sizes(x), starts, product_precision()),
        threads=torch.get_num_threads(),
    )
    return out


class MultiHeadAttentionFunction(torch.autograd.Function):
    """The C++ kernel; saves the projections and the heads' outputs."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mha: MultiHeadAttention, keep: bool, *parameters: Tensor | None
    ) -> Tensor:
        saved = saved_for_backward(x, mha, keep)
        ctx.precision, ctx.sizes = product_precision(), mha.sizes(x)
        # A tensor, because the kernels read it from memory in both directions.
        ctx.starts = mha.starts and torch.tensor(mha.starts, dtype=torch.int64, device="cpu")
        out = run_kernel(x, mha, saved, ctx.starts)
        if keep:
            ctx.mha = mha.with_parameters(iter([None] * len(parameters)))._replace(mask=None)
            # Saving the mask lets autograd detect a change to it before the backward.
            ctx.save_for_backward(mha.mask, x, *saved, *parameters)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        mask, x, *tensors = ctx.saved_tensors
        saved, parameters = tensors[:SAVED], tensors[SAVED:]
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
            saved=saved_to_kernel(saved),
            x=x.data_ptr(),
            attention=mha.to_kernel(B, S, ctx.starts, ctx.precision),
            threads=torch.get_num_threads(),
        )
        return grad_x, None, None, *grads


# The number of tensors that `saved_for_backward` returns.
SAVED = 10


def saved_for_backward(x: Tensor, mha: MultiHeadAttention, keep: bool) -> list[Tensor | None]:
    """Memory for `MultiHeadAttentionSaved` of csrc/kernels.h; all of it only if `keep`."""
    rows, (queries, keys, _) = x.numel() // x.size(-1), mha.widths
    saved = residual.saved_for_backward(x, mha) if keep else residual.NOTHING_SAVED
    saved = [*saved, x.new_empty(rows, queries + 2 * keys), x.new_empty(rows, queries)]
    for head_norm, width in ((mha.q_norm, queries), (mha.k_norm, keys)):
        heads = rows * width // mha.head_dim
        needed = keep and head_norm is not None
        saved += [x.new_empty(heads, 2), x.new_empty(rows, width)] if needed else [None, None]
    return saved


def saved_to_kernel(tensors: Sequence[Tensor | None]) -> Any:
    *around, qkv, attn_out, q_stats, q_input, k_stats, k_input = tensors
    head_norm = extension.kernels.HeadNormSaved
    return extension.kernels.MultiHeadAttentionSaved(
        residual=residual.saved_to_kernel(around),
        qkv=address(qkv),
        attn_out=address(attn_out),
        q=head_norm(stats=address(q_stats), input=address(q_input)),
        k=head_norm(stats=address(k_stats), input=address(k_input)),
    )


def multi_head_attention_and_cache(
    x: Tensor, mha: MultiHeadAttention
) -> tuple[Tensor, Tensor, Tensor]:
    """By the C++ kernel, without gradients: the result, and what a cache keeps.

    Args:
        x: [B, S, H].
        mha: without `starts`; `why_not_cpu` must have returned None.

    Returns:
        The output [B, S, H]; keys and values, each [B, K, S, D], normalized and rotated.
    """
    x, mha = in_kernel_layout(x, mha)
    saved = saved_for_backward(x, mha, keep=False)
    qkv = saved[len(residual.NOTHING_SAVED)]
    assert qkv is not None
    out = run_kernel(x, mha, saved, None)
    _, keys, values = split_heads(qkv.view(*x.shape[:2], -1), mha)
    return out, keys, values


def in_kernel_layout(x: Tensor, mha: MultiHeadAttention) -> tuple[Tensor, MultiHeadAttention]:
    return x.contiguous(), mha.with_parameters(iter(map(kernel_layout, mha.parameters())))


def multi_head_attention_cpu(x: Tensor, mha: MultiHeadAttention) -> Tensor:
    x, mha = in_kernel_layout(x, mha)
    parameters = mha.parameters()
    return MultiHeadAttentionFunction.apply(x, mha, needs_grad(x, *parameters), *parameters)


def why_not_cpu(x: Tensor, mha: MultiHeadAttention) -> str | None:
    if x.numel() == 0:
        return "x is empty"
    if not 0 <= mha.weights_dropout.p < 1 or not 0 <= mha.out_dropout.p < 1:
        return DROPOUT_RANGE
    reason = why_not_mask(mha.mask, x.device)
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
    """Self-attention: `dropout(out(attention(qkv(x))))`, with norms and residual if wanted.

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
    if x.ndim != (3 if mha.starts is None else 2):
        raise ValueError(f"x must be [B, S, H], or [rows, H] with starts, got {list(x.shape)}")
    if mha.starts is not None:
        check_starts(mha.starts, x.size(0), mha.mask)
    if (reason := mha.why_not_sizes(mha.sizes(x)[1], x.size(-1))) is not None:
        raise ValueError(f"the attention does not fit: {reason}")
    arguments = (autocast_input(x, mha.out.weight), mha)
    return dispatch.choose("multi_head_attention", IMPLEMENTATIONS, *arguments).run(*arguments)
