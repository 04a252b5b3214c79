"""Norms in Triton: a row stays in registers from the sum to the result."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllm.ops.autograd import check_first_derivative
from fastllm.ops.blocks_triton import power_of_2, rounded
from fastllm.ops.decoder import Norm
from fastllm.ops.memory import contiguous

# Programs that sum the gradients of weight and bias over their own rows: enough to occupy every
# multiprocessor of current GPUs, and few enough that adding up the partial sums is cheap.
PROGRAMS = 256


@triton.jit
def scale_at(weight, h, inside, offset):
    """The factors of the normalized values; the weight may be None."""
    if weight is None:
        return tl.full(h.shape, 1.0, tl.float32)
    return tl.load(weight + h, inside, other=0).to(tl.float32) + offset


@triton.jit
def norm_fwd(
    out, total, stats, x, residual, weight, bias, H, eps, offset,
    RMS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Normalises one row; `stats` are its mean and 1 / standard deviation."""
    row, h = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_H)
    inside = h < H
    y = tl.load(x + row * H + h, inside, other=0).to(tl.float32)
    if residual is not None:
        y += tl.load(residual + row * H + h, inside, other=0).to(tl.float32)
        y = rounded(y, total.dtype.element_ty)  # as the backward will read it
        tl.store(total + row * H + h, y, inside)
        y = y.to(tl.float32)
    mean = 0.0 if RMS else tl.sum(y) / H
    centred = tl.where(inside, y - mean, 0.0)
    rstd = 1 / tl.sqrt_rn(tl.sum(centred * centred) / H + eps)
    tl.store(stats + row * 2, mean)
    tl.store(stats + row * 2 + 1, rstd)
    normed = centred * rstd * scale_at(weight, h, inside, offset)
    if bias is not None:
        normed += tl.load(bias + h, inside, other=0).to(tl.float32)
    tl.store(out + row * H + h, rounded(normed, out.dtype.element_ty), inside)


@triton.jit
def norm_bwd(
    grad_x, grad_weights, grad_biases, grad_out, total, stats, weight, R, H, offset,
    RMS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Gradients of a strided set of rows, and the parameters' gradients summed over these rows."""
    program, h = tl.program_id(0), tl.arange(0, BLOCK_H)
    inside = h < H
    scale = scale_at(weight, h, inside, offset)
    for_weight = tl.zeros((BLOCK_H,), tl.float32)
    for_bias = tl.zeros((BLOCK_H,), tl.float32)
    for row in range(program, R, tl.num_programs(0)):
        at = (row + tl.zeros((BLOCK_H,), tl.int64)) * H + h
        mean, rstd = tl.load(stats + row * 2), tl.load(stats + row * 2 + 1)
        y = tl.load(total + at, inside, other=0).to(tl.float32)
        grad = tl.load(grad_out + at, inside, other=0).to(tl.float32)
        normed = tl.where(inside, (y - mean) * rstd, 0.0)
        for_weight += grad * normed
        for_bias += grad
        grad *= scale
        along = tl.sum(grad * normed) / H
        through_mean = 0.0 if RMS else tl.sum(grad) / H
        result = (grad - through_mean - normed * along) * rstd
        tl.store(grad_x + at, rounded(result, grad_x.dtype.element_ty), inside)
    tl.store(grad_weights + program * H + h, for_weight, inside)
    tl.store(grad_biases + program * H + h, for_bias, inside)


def warps(H: int) -> int:
    """Warps per row, such that each thread holds at least 16 elements."""
    return min(16, max(1, power_of_2(H) // 512))


class NormFunction(torch.autograd.Function):
    """Saves the sum, and two numbers per row."""

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
        R = x.numel() // H
        out = torch.empty_like(x)
        total = x if residual is None else torch.empty_like(x)
        stats = x.new_empty(R, 2, dtype=torch.float32)
        norm_fwd[(R,)](
            out, total, stats, x, residual, weight, bias, H, norm.eps, norm.offset,
            RMS=norm.kind == "rms", BLOCK_H=power_of_2(H), num_warps=warps(H),
        )  # fmt: skip
        ctx.norm = norm._replace(weight=None, bias=None)
        ctx.save_for_backward(total, stats, weight, bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        total, stats, weight, bias = ctx.saved_tensors
        R, H = stats.size(0), total.size(-1)
        grad_x = torch.empty_like(total)
        programs = min(R, PROGRAMS)
        sums = stats.new_empty(2, programs, H)
        norm_bwd[(programs,)](
            grad_x, sums[0], sums[1], grad_out.contiguous(), total, stats, weight, R, H,
            ctx.norm.offset, RMS=ctx.norm.kind == "rms", BLOCK_H=power_of_2(H),
            num_warps=warps(H),
        )  # fmt: skip
        grad_weight, grad_bias = sums.sum(1)
        x_needed, _, weight_needed, bias_needed, residual_needed = ctx.needs_input_grad
        return (
            grad_x if x_needed else None,
            None,
            grad_weight.to(weight.dtype) if weight_needed else None,
            grad_bias.to(bias.dtype) if bias_needed else None,
            grad_x if residual_needed else None,
        )


def norm_triton(x: Tensor, norm: Norm, residual: Tensor | None) -> Tensor:
    """See `fastllm.ops.norm.norm`."""
    # Autocast leaves norms in the weights' type.
    if norm.weight is not None and torch.is_autocast_enabled(x.device.type):
        dtype = norm.weight.dtype
        x, residual = x.to(dtype), None if residual is None else residual.to(dtype)
    weight, bias, residual = contiguous(norm.weight, norm.bias, residual)
    norm = norm._replace(weight=weight, bias=bias)
    return NormFunction.apply(x.contiguous(), norm, weight, bias, residual)
