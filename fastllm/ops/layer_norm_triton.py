"""Layer norm in Triton: a row stays in registers from the sum to the result."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllm.ops.autograd import check_first_derivative
from fastllm.ops.blocks_triton import power_of_2, rounded
from fastllm.ops.decoder import Norm

# Programs that sum the gradients of weight and bias over their own rows: enough to occupy every
# multiprocessor of current GPUs, and few enough that adding up the partial sums is cheap.
PROGRAMS = 256


@triton.jit
def layer_norm_fwd(
    out, total, stats, x, residual, weight, bias, H, eps,
    RESIDUAL: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Normalises one row; `stats` are its mean and 1 / standard deviation."""
    row, h = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_H)
    inside = h < H
    y = tl.load(x + row * H + h, inside, other=0).to(tl.float32)
    if RESIDUAL:
        y += tl.load(residual + row * H + h, inside, other=0).to(tl.float32)
        y = rounded(y, total.dtype.element_ty)  # as the backward will read it
        tl.store(total + row * H + h, y, inside)
        y = y.to(tl.float32)
    mean = tl.sum(y) / H
    centred = tl.where(inside, y - mean, 0.0)
    rstd = 1 / tl.sqrt_rn(tl.sum(centred * centred) / H + eps)
    tl.store(stats + row * 2, mean)
    tl.store(stats + row * 2 + 1, rstd)
    w = tl.load(weight + h, inside, other=0).to(tl.float32)
    b = tl.load(bias + h, inside, other=0).to(tl.float32)
    normed = centred * rstd * w + b
    tl.store(out + row * H + h, rounded(normed, out.dtype.element_ty), inside)


@triton.jit
def layer_norm_bwd(
    grad_x, grad_weights, grad_biases, grad_out, total, stats, weight, R, H, BLOCK_H: tl.constexpr
):
    """Gradients of a strided set of rows, and the parameters' gradients summed over these rows."""
    program, h = tl.program_id(0), tl.arange(0, BLOCK_H)
    inside = h < H
    w = tl.load(weight + h, inside, other=0).to(tl.float32)
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
        grad *= w
        along = tl.sum(grad * normed) / H
        result = (grad - tl.sum(grad) / H - normed * along) * rstd
        tl.store(grad_x + at, rounded(result, grad_x.dtype.element_ty), inside)
    tl.store(grad_weights + program * H + h, for_weight, inside)
    tl.store(grad_biases + program * H + h, for_bias, inside)


def warps(H: int) -> int:
    """Warps per row, such that each thread holds at least 16 elements."""
    return min(16, max(1, power_of_2(H) // 512))


class LayerNormFunction(torch.autograd.Function):
    """Saves the sum, and two numbers per row."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None
    ) -> Tensor:
        H = x.size(-1)
        R = x.numel() // H
        out = torch.empty_like(x)
        total = x if residual is None else torch.empty_like(x)
        stats = x.new_empty(R, 2, dtype=torch.float32)
        layer_norm_fwd[(R,)](
            out, total, stats, x, x if residual is None else residual, weight, bias, H, eps,
            RESIDUAL=residual is not None, BLOCK_H=power_of_2(H), num_warps=warps(H),
        )  # fmt: skip
        ctx.save_for_backward(total, stats, weight)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        total, stats, weight = ctx.saved_tensors
        R, H = stats.size(0), weight.size(0)
        grad_x = torch.empty_like(total)
        programs = min(R, PROGRAMS)
        sums = weight.new_empty(2, programs, H, dtype=torch.float32)
        layer_norm_bwd[(programs,)](
            grad_x, sums[0], sums[1], grad_out.contiguous(), total, stats, weight, R, H,
            BLOCK_H=power_of_2(H), num_warps=warps(H),
        )  # fmt: skip
        grad_weight, grad_bias = sums.sum(1).to(weight.dtype)
        wanted = ctx.needs_input_grad
        return (
            grad_x if wanted[0] else None,
            grad_weight if wanted[1] else None,
            grad_bias if wanted[2] else None,
            None,
            grad_x if wanted[4] else None,
        )


def layer_norm_triton(x: Tensor, norm: Norm, residual: Tensor | None) -> Tensor:
    """See `fastllm.ops.layer_norm.layer_norm`."""
    dtype = norm.weight.dtype
    if torch.is_autocast_enabled(x.device.type):  # autocast leaves norms in the weights' type
        x, residual = x.to(dtype), None if residual is None else residual.to(dtype)
    weight, bias = norm.weight.contiguous(), norm.bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    return LayerNormFunction.apply(x.contiguous(), weight, bias, norm.eps, residual)
