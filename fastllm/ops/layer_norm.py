"""Layer norm over the last dimension (Ba, Kiros and Hinton 2016), of a sum if wanted."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.ops import dispatch
from fastllm.ops.parameters import Norm, address, addresses, check_first_derivative, new_grad


def layer_norm_ref(x: Tensor, norm: Norm, residual: Tensor | None) -> Tensor:
    if residual is not None:
        x = x + residual
    return F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps)


class LayerNormFunction(torch.autograd.Function):
    """The C++ kernel; keeps the sum, and the mean and 1 / standard deviation of each row."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None
    ) -> Tensor:
        H = x.size(-1)
        rows = x.numel() // H
        out, stats = torch.empty_like(x), x.new_empty(rows, 2)
        total = x if residual is None else torch.empty_like(x)
        ctx.eps, ctx.rows, ctx.H = eps, rows, H
        dispatch.kernels.layer_norm_fwd(
            address(out),
            address(stats),
            0 if residual is None else address(total),
            address(x),
            address(residual),
            rows,
            H,
            (*addresses(weight, bias), eps),
            torch.get_num_threads(),
        )
        ctx.save_for_backward(total, stats, weight, bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        total, stats, weight, bias = ctx.saved_tensors
        for_x, for_weight, for_bias, _, for_residual = ctx.needs_input_grad
        grad_out = grad_out.contiguous()
        grad_x = new_grad(total, for_x or for_residual)
        # The kernel gives both or neither.
        grad_weight = new_grad(weight, for_weight or for_bias)
        grad_bias = new_grad(bias, for_weight or for_bias)
        dispatch.kernels.layer_norm_bwd(
            address(grad_x),
            addresses(grad_weight, grad_bias),
            address(grad_out),
            address(total),
            address(stats),
            ctx.rows,
            ctx.H,
            (*addresses(weight, bias), ctx.eps),
            torch.get_num_threads(),
        )
        return grad_x, grad_weight, grad_bias, None, grad_x if for_residual else None


def layer_norm_cpu(x: Tensor, norm: Norm, residual: Tensor | None) -> Tensor:
    residual = None if residual is None else residual.contiguous()
    weight, bias = norm.weight.contiguous(), norm.bias.contiguous()
    return LayerNormFunction.apply(x.contiguous(), weight, bias, norm.eps, residual)


def why_not_cpu(
    x: Tensor | None = None, norm: Norm | None = None, residual: Tensor | None = None
) -> str | None:
    if x is None or norm is None:
        return dispatch.why_not_cpu()
    reason = why_not_rows(x, norm, residual)
    return reason or dispatch.why_not_fused(x, norm.weight, norm.bias, residual)


def why_not_triton(
    x: Tensor | None = None, norm: Norm | None = None, residual: Tensor | None = None
) -> str | None:
    if x is None or norm is None:
        return dispatch.why_not_triton()
    if (reason := why_not_rows(x, norm, residual)) is not None:
        return reason
    H = x.size(-1)
    if H > LONGEST_TRITON:
        return f"a row of {H} elements does not fit into registers"
    if H <= NARROWEST_TRITON and dispatch.requested() != "triton":
        return f"PyTorch's own kernel is faster up to a width of {NARROWEST_TRITON}"
    return dispatch.why_not_triton(x, norm.weight, norm.bias, residual)


def why_not_rows(x: Tensor, norm: Norm, residual: Tensor | None) -> str | None:
    if residual is not None and residual.shape != x.shape:
        return "the residual is broadcast"
    if x.numel() == 0:
        return "there are no elements"
    if not norm.fits(x.size(-1)):
        return "the norm is not one over the last dimension"
    return None


# Widths beyond which a kernel in Triton is faster than PyTorch's, by measurements that others have
# published; `python -m fastllm.bench --device cuda` shows what holds on a GPU at hand. Asked for by
# name, the kernel runs at any width.
NARROWEST_TRITON = 2048
LONGEST_TRITON = 8192

IMPLEMENTATIONS: list[dispatch.Implementation] = [
    dispatch.Implementation("cpu", layer_norm_cpu, why_not_cpu),
    dispatch.Implementation("triton", dispatch.run_triton("layer_norm"), why_not_triton),
    dispatch.Implementation("ref", layer_norm_ref),
]


def layer_norm(x: Tensor, norm: Norm, residual: Tensor | None = None) -> Tensor:
    """`(y - mean(y)) / sqrt(var(y) + eps) * weight + bias` with `y = x + residual`.

    Args:
        x: [..., H].
        residual: [..., H], added first; or None.
    """
    arguments = (x, norm, residual)
    return dispatch.choose("layer_norm", IMPLEMENTATIONS, *arguments).run(*arguments)
