"""Norms over the last dimension, optionally of a sum.

A layer norm (Ba, Kiros and Hinton 2016), or an RMS norm (Zhang and Sennrich 2019).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.ops import dispatch, extension
from fastllm.ops.autograd import check_first_derivative
from fastllm.ops.decoder import Norm
from fastllm.ops.memory import address, contiguous, new_grad


def norm_ref(x: Tensor, norm: Norm, residual: Tensor | None) -> Tensor:
    if residual is not None:
        x = x + residual
    weight, bias, eps, kind, offset = norm
    if weight is not None and offset:
        weight = weight + offset
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    out = F.rms_norm(x, x.shape[-1:], weight, eps)
    return out if bias is None else out + bias


class NormFunction(torch.autograd.Function):
    """The C++ kernel; saves the sum, and the mean and 1 / standard deviation of each row."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm: Norm,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        H = x.size(-1)
        rows = x.numel() // H
        out, stats = torch.empty_like(x), x.new_empty(rows, 2)
        total = x if residual is None else torch.empty_like(x)
        extension.kernels.norm_fwd(
            out=out.data_ptr(),
            stats=stats.data_ptr(),
            sum=0 if residual is None else total.data_ptr(),
            x=x.data_ptr(),
            residual=address(residual),
            rows=rows,
            H=H,
            norm=norm.to_kernel(),
            threads=torch.get_num_threads(),
        )
        ctx.norm = norm._replace(weight=None, bias=None)
        ctx.save_for_backward(total, stats, weight, bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        total, stats, weight, bias = ctx.saved_tensors
        x_needed, _, weight_needed, bias_needed, residual_needed = ctx.needs_input_grad
        grad_out = grad_out.contiguous()
        grad_x = new_grad(total, x_needed or residual_needed)
        grad_weight, grad_bias = new_grad(weight, weight_needed), new_grad(bias, bias_needed)
        extension.kernels.norm_bwd(
            grad_x=address(grad_x),
            grad=extension.kernels.NormGrad(weight=address(grad_weight), bias=address(grad_bias)),
            grad_out=grad_out.data_ptr(),
            sum=total.data_ptr(),
            stats=stats.data_ptr(),
            rows=len(stats),
            H=total.size(-1),
            norm=ctx.norm._replace(weight=weight, bias=bias).to_kernel(),
            threads=torch.get_num_threads(),
        )
        return grad_x, None, grad_weight, grad_bias, grad_x if residual_needed else None


def norm_cpu(x: Tensor, norm: Norm, residual: Tensor | None) -> Tensor:
    weight, bias, residual = contiguous(norm.weight, norm.bias, residual)
    norm = norm._replace(weight=weight, bias=bias)
    return NormFunction.apply(x.contiguous(), norm, weight, bias, residual)


def why_not(x: Tensor, norm: Norm, residual: Tensor | None) -> str | None:
    """Why no kernel can take these arguments, or None."""
    if residual is not None and residual.shape != x.shape:
        return "the residual is broadcast"
    if x.numel() == 0:
        return "x is empty"
    if not norm.fits(x.size(-1)):
        return "the norm is not over the last dimension"
    return None


def why_not_cpu(x: Tensor, norm: Norm, residual: Tensor | None) -> str | None:
    reason = why_not(x, norm, residual)
    return reason or dispatch.why_not_cpu_fused(x, norm.weight, norm.bias, residual)


def why_not_triton(x: Tensor, norm: Norm, residual: Tensor | None) -> str | None:
    if (reason := why_not(x, norm, residual)) is not None:
        return reason
    H = x.size(-1)
    if H > LONGEST_TRITON:
        return f"a row of {H} elements does not fit into registers"
    # PyTorch's RMS norm is one kernel only if all types are equal, which autocast prevents.
    one_kernel = norm.kind == "layer" or norm.weight is None or norm.weight.dtype is x.dtype
    if H <= NARROWEST_TRITON and one_kernel and dispatch.requested() != "triton":
        return f"PyTorch's own kernel is faster up to a width of {NARROWEST_TRITON}"
    return dispatch.why_not_triton(x, norm.weight, norm.bias, residual)


# Up to this width PyTorch's kernel is faster than a Triton kernel, according to published
# measurements; `fastllm bench --device cuda` measures it on your GPU. Requested by name,
# the kernel runs at smaller widths as well.
NARROWEST_TRITON = 2048
LONGEST_TRITON = 8192

IMPLEMENTATIONS = [
    dispatch.cpu(norm_cpu, why_not_cpu),
    dispatch.triton("norm", why_not_triton),
    dispatch.reference(norm_ref),
]


def norm(x: Tensor, norm: Norm, residual: Tensor | None = None) -> Tensor:
    """`(y - mean) / sqrt(mean((y - mean)²) + eps) * (weight + offset) + bias`, y = x + residual.

    The mean is that of y for a layer norm, and 0 for an RMS norm.

    Args:
        x: [..., H].
        residual: [..., H], added first; or None.
    """
    arguments = (x, norm, residual)
    return dispatch.choose("norm", IMPLEMENTATIONS, *arguments).run(*arguments)
