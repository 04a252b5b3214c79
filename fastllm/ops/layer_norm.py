"""Layer norm over the last dimension (Ba, Kiros and Hinton 2016), optionally of a sum."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.ops import dispatch, extension
from fastllm.ops.autograd import check_first_derivative
from fastllm.ops.decoder import Norm
from fastllm.ops.memory import address, new_grad


def layer_norm_ref(x: Tensor, norm: Norm, residual: Tensor | None) -> Tensor:
    if residual is not None:
        x = x + residual
    return F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps)


class LayerNormFunction(torch.autograd.Function):
    """The C++ kernel; saves the sum, and the mean and 1 / standard deviation of each row."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None
    ) -> Tensor:
        H = x.size(-1)
        rows = x.numel() // H
        out, stats = torch.empty_like(x), x.new_empty(rows, 2)
        total = x if residual is None else torch.empty_like(x)
        ctx.eps = eps
        extension.kernels.layer_norm_fwd(
            out=out.data_ptr(),
            stats=stats.data_ptr(),
            sum=0 if residual is None else total.data_ptr(),
            x=x.data_ptr(),
            residual=address(residual),
            rows=rows,
            H=H,
            norm=Norm(weight, bias, eps).to_kernel(),
            threads=torch.get_num_threads(),
        )
        ctx.save_for_backward(total, stats, weight, bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        total, stats, weight, bias = ctx.saved_tensors
        x_needed, weight_needed, bias_needed, _, residual_needed = ctx.needs_input_grad
        grad_out = grad_out.contiguous()
        grad_x = new_grad(total, x_needed or residual_needed)
        grad_weight, grad_bias = new_grad(weight, weight_needed), new_grad(bias, bias_needed)
        extension.kernels.layer_norm_bwd(
            grad_x=address(grad_x),
            grad=extension.kernels.NormGrad(weight=address(grad_weight), bias=address(grad_bias)),
            grad_out=grad_out.data_ptr(),
            sum=total.data_ptr(),
            stats=stats.data_ptr(),
            rows=len(stats),
            H=weight.numel(),
            norm=Norm(weight, bias, ctx.eps).to_kernel(),
            threads=torch.get_num_threads(),
        )
        return grad_x, grad_weight, grad_bias, None, grad_x if residual_needed else None


def layer_norm_cpu(x: Tensor, norm: Norm, residual: Tensor | None) -> Tensor:
    residual = None if residual is None else residual.contiguous()
    weight, bias = norm.weight.contiguous(), norm.bias.contiguous()
    return LayerNormFunction.apply(x.contiguous(), weight, bias, norm.eps, residual)


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
    if H <= NARROWEST_TRITON and dispatch.requested() != "triton":
        return f"PyTorch's own kernel is faster up to a width of {NARROWEST_TRITON}"
    return dispatch.why_not_triton(x, norm.weight, norm.bias, residual)


# Up to this width PyTorch's kernel is faster than a Triton kernel, according to published
# measurements; `python -m fastllm.bench --device cuda` measures it on your GPU. Requested by name,
# the kernel runs at smaller widths as well.
NARROWEST_TRITON = 2048
LONGEST_TRITON = 8192

IMPLEMENTATIONS = [
    dispatch.cpu(layer_norm_cpu, why_not_cpu),
    dispatch.triton("layer_norm", why_not_triton),
    dispatch.reference(layer_norm_ref),
]


def layer_norm(x: Tensor, norm: Norm, residual: Tensor | None = None) -> Tensor:
    """`(y - mean(y)) / sqrt(var(y) + eps) * weight + bias` with `y = x + residual`.

    Args:
        x: [..., H].
        residual: [..., H], added first; or None.
    """
    arguments = (x, norm, residual)
    return dispatch.choose("layer_norm", IMPLEMENTATIONS, *arguments).run(*arguments)
