"""Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1) over heads."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastllm.ops import dispatch, extension
from fastllm.ops.autograd import check_first_derivative
from fastllm.ops.decoder import NO_DROPOUT, Dropout, mask_to_kernel
from fastllm.ops.dropout import DROPOUT_RANGE, dropout


class AttentionOptions(NamedTuple):
    """The arguments besides q, k and v; see `attention`."""

    mask: Tensor | None = None
    causal: bool = False
    dropout: Dropout = NO_DROPOUT
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None

    def scale_of(self, q: Tensor) -> float:
        return q.size(-1) ** -0.5 if self.scale is None else self.scale


def attention_ref(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
    S, T, shared = q.size(-2), k.size(-2), q.size(1) // k.size(1)
    if shared > 1:
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    scores = q @ k.transpose(-2, -1) * options.scale_of(q)
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    masked = options.mask
    if options.causal:
        # Aligned at the end: with a cache, the S queries are the last of T positions.
        hidden = torch.ones(S, T, dtype=torch.bool, device=q.device)
        ahead = hidden.triu(T - S + 1)
        if options.window is not None:
            ahead = ahead | hidden.tril(T - S - options.window)
        masked = ahead if masked is None else masked | ahead
    if masked is None:
        weights = scores.softmax(-1)
    else:
        weights = scores.masked_fill(masked, -torch.inf).softmax(-1)
        # The softmax of a fully masked row is 0 / 0; make its weights 0.
        weights = weights.masked_fill(masked.all(-1, keepdim=True), 0)
    if options.dropout.p:
        # Every row starts a new group of random numbers.
        padded = torch.nn.functional.pad(weights, (0, -T % 64))
        weights = dropout(padded, *options.dropout)[..., :T]
    return weights @ v


class AttentionFunction(torch.autograd.Function):
    """The C++ kernel; saves only its inputs."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        out = q.new_empty(q.shape)
        extension.kernels.attention_fwd(
            out=out.data_ptr(),
            attention=attention_to_kernel(q, k, v, options),
            threads=torch.get_num_threads(),
        )
        ctx.options = options._replace(mask=None)
        # Saving the mask lets autograd detect a change to it before the backward.
        ctx.save_for_backward(options.mask, q, k, v)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        mask, q, k, v = ctx.saved_tensors
        grad_out = grad_out.contiguous()
        grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
        extension.kernels.attention_bwd(
            grad_q=grad_q.data_ptr(),
            grad_k=grad_k.data_ptr(),
            grad_v=grad_v.data_ptr(),
            grad_out=grad_out.data_ptr(),
            attention=attention_to_kernel(q, k, v, ctx.options._replace(mask=mask)),
            threads=torch.get_num_threads(),
        )
        return grad_q, grad_k, grad_v, None


def attention_to_kernel(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Any:
    """`Attention` of csrc/kernels.h."""
    (B, N, S, D), T = q.shape, k.size(2)
    rows = [extension.kernels.Rows(data=x.data_ptr(), strides=x.stride()[:3]) for x in (q, k, v)]
    return extension.kernels.Attention(
        B=B,
        N=N,
        K=k.size(1),
        S=S,
        T=T,
        D=D,
        q=rows[0],
        k=rows[1],
        v=rows[2],
        mask=mask_to_kernel(options.mask, B, N, S, T),
        causal=options.causal,
        window=options.window or 0,
        scale=options.scale_of(q),
        softcap=options.softcap or 0.0,
        dropout=options.dropout.to_kernel(),
    )


def attention_cpu(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return AttentionFunction.apply(q, k, v, options)


def why_not(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> str | None:
    """Why no kernel can take these arguments, or None."""
    if not q.ndim == k.ndim == v.ndim == 4 or k.shape != v.shape or q.size(0) != k.size(0):
        return "q, k and v are not [B, N, S, D] and twice [B, K, T, D]"
    if q.numel() == 0 or k.numel() == 0:
        return "q or k is empty"
    if not 0 <= options.dropout.p < 1:
        return DROPOUT_RANGE
    return why_not_mask(options.mask, q.device)


def why_not_mask(mask: Tensor | None, device: torch.device) -> str | None:
    if mask is not None and (type(mask) is not Tensor or mask.device != device):
        return f"the mask is a {type(mask).__name__} on {mask.device}"
    return None


def why_not_cpu(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> str | None:
    return why_not(q, k, v, options) or dispatch.why_not_cpu_fused(q, k, v)


def why_not_triton(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> str | None:
    if (reason := why_not(q, k, v, options) or dispatch.why_not_triton(q, k, v)) is not None:
        return reason
    autocast = torch.is_autocast_enabled(q.device.type)
    dtype = torch.get_autocast_dtype(q.device.type) if autocast else q.dtype
    if q.size(-1) > (widest := widest_triton_head(dtype)):
        return f"the heads are wider than {widest}, which does not fit into registers in {dtype}"
    if q.size(0) * q.size(1) > 65535:  # CUDA's limit on the second dimension of a grid
        return "there are more than 65,535 heads in the batch"
    return None


def widest_triton_head(dtype: torch.dtype) -> int:
    """The largest D whose tiles fit into registers."""
    return 64 if dtype is torch.float32 else 256


IMPLEMENTATIONS = [
    dispatch.cpu(attention_cpu, why_not_cpu),
    dispatch.triton("attention", why_not_triton),
    dispatch.reference(attention_ref),
]


def check_mask(attn_mask: Tensor | None) -> None:
    """Raises a `TypeError` if a mask is not boolean."""
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        raise TypeError(
            f"attn_mask must be boolean, True where masked, got {attn_mask.dtype}; "
            "convert an additive mask with `mask < 0`"
        )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    seed: int = 0,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`softmax(q k^T * scale) v` with masks and dropout on the weights.

    Args:
        q: [B, N, S, D].
        k, v: [B, K, T, D]; the S queries are the last S of the T positions. Each head of k and v
            serves N / K heads of q in turn.
        attn_mask: boolean, broadcastable to [B, N, S, T]; **True means masked**, the opposite of
            `torch.nn.functional.scaled_dot_product_attention`. It is combined with the causal mask
            by "or".
        is_causal: hide the positions after the query's own.
        dropout_p: probability of dropping a weight.
        seed: selects the dropout mask; see `dropout`. The T weights of a row are numbered as if
            padded to a multiple of 64.
        window: with `is_causal`, a query sees this many keys at most, its own included.
        scale: 1 / sqrt(D) unless given.
        softcap: scores become `softcap * tanh(scores / softcap)`.

    Returns:
        [B, N, S, D]; zeros for a fully masked query.

    Raises:
        TypeError: the mask is not boolean.
        ValueError: N is not a multiple of K, or there is a window without `is_causal`.
    """
    check_mask(attn_mask)
    if q.ndim == k.ndim == 4 and q.size(1) % k.size(1):
        raise ValueError(f"{q.size(1)} heads of queries cannot share {k.size(1)} heads of keys")
    if window is not None and (window < 1 or not is_causal):
        raise ValueError("a window must be positive, and the attention causal")
    dropout = Dropout(dropout_p, seed)
    options = AttentionOptions(attn_mask, is_causal, dropout, window, scale, softcap)
    arguments = (q, k, v, options)
    return dispatch.choose("attention", IMPLEMENTATIONS, *arguments).run(*arguments)
