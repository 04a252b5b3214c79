"""The feed-forward network in Triton: bias, activation and dropout are fused into the products.

The forward saves the outputs of `fc1` and `up`; the backward recomputes the rest. The product of
`up` is cuBLAS's; the factor is fused into the product of `fc1`.

Roofline: a separate elementwise kernel costs one more round trip of [rows, I] through memory,
4 rows I bytes in 16 bits. A product of our own runs at four fifths of cuBLAS's speed, which costs a
quarter of cuBLAS's time for 2 rows H I operations. The two costs are equal at H = 1,248 on an A100
(312 TFLOP/s, 2.0 TB/s) and at 2,364 on an H100 (990, 3.35), so 16-bit products are our own up to
`WIDEST_DOT`. In fp32 (19.5 TFLOP/s) they are equal at 78, so cuBLAS computes those products.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastllm.ops.autograd import check_first_derivative
from fastllm.ops.blocks_triton import (
    ELEMENTS,
    dot,
    elements,
    in_autocast,
    keep_mask,
    rounded,
    tuned,
)
from fastllm.ops.decoder import Mlp
from fastllm.ops.dropout import dropped_of_65536
from fastllm.ops.memory import contiguous
from fastllm.ops.residual import enter, leave

WIDEST_DOT = 1024


def config(block_r: int, block_i: int, warps: int, stages: int) -> triton.Config:
    sizes = {"BLOCK_R": block_r, "BLOCK_I": block_i}
    return triton.Config(sizes, num_warps=warps, num_stages=stages)


TILES = (
    config(64, 64, 4, 4),  # many tiles: even few rows keep every multiprocessor busy
    config(128, 64, 8, 3),  # reads the weight less often
    config(64, 128, 8, 3),  # reads the rows less often
)
# The backward with `up` holds three results at once: fewer elements per thread fit into registers.
GATED_BACKWARD = (config(64, 64, 8, 3), config(64, 32, 4, 4))


def fitting(configs: Any, arguments: Any, **constants: Any) -> tuple[triton.Config, ...]:
    """The tiles whose results fit into registers on every GPU from sm_80 to sm_100."""
    gated_backward = constants["BACKWARD"] and arguments["up"] is not None
    return GATED_BACKWARD if gated_backward else TILES


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """The activation and its derivative."""
    if ACTIVATION == "gelu":
        share = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        return x * share, share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        share = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        slope = 1.5957691216057308 * (1 + 0.134145 * x * x)
        return x * share, share + x * share * (1 - share) * slope
    elif ACTIVATION == "relu":
        positive = tl.where(x <= 0, 0.0, 1.0)
        return tl.where(x <= 0, 0.0, x), positive
    elif ACTIVATION == "silu":
        share = tl.sigmoid(x)
        return x * share, share * (1 + x * (1 - share))
    elif ACTIVATION == "leaky_relu":
        slope = tl.where(x > 0, 1.0, 0.01)
        return x * slope, slope
    else:
        tl.static_assert(ACTIVATION == "relu_squared")
        positive = tl.where(x <= 0, 0.0, x)
        return positive * positive, 2 * positive


@triton.jit
def _finish(product, before, up, kept, factor, ACTIVATION: tl.constexpr, BACKWARD: tl.constexpr):
    """Returns the value to store in place of the product, the hidden activations, and the gradient
    of `up`, in the forward without meaning.

    In the forward, `before` is the bias that the product lacks. In the backward, the product is the
    gradient of the hidden activations, and `before` is the value that the forward stored.
    """
    x = before if BACKWARD else product + before
    active, slope = activated(x, ACTIVATION)
    hidden = tl.where(kept, active * factor * up, 0.0)
    if BACKWARD:
        grad = tl.where(kept, product * factor, 0.0)
        return grad * slope * up, hidden, grad * active
    else:
        return x, hidden, hidden


@tuned(TILES + GATED_BACKWARD, ("rows", "H", "I", "ACTIVATION", "BACKWARD", "DROPOUT"), fitting)
@triton.jit(do_not_specialize=["rows", "seed", "dropped"])
def mlp_product(
    out, hidden, grad_up, x, weight, before, up, rows, R, H, I, weight_strides, seed, dropped,
    factor,
    ACTIVATION: tl.constexpr, BACKWARD: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """`_finish` of x [R, H] times a weight with strides [I, H]: results [R, I].

    `rows` is a tuning key: roughly, the number of rows.
    """
    BLOCK_H: tl.constexpr = 32
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_I
    columns, h = column + tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_H)
    x += r[:, None].to(tl.int64) * H + h[None, :]
    weight += h[:, None].to(tl.int64) * weight_strides[1] + columns[None, :] * weight_strides[0]
    sums = tl.zeros((BLOCK_R, BLOCK_I), tl.float32)
    for first in range(0, H, BLOCK_H):
        left = tl.load(x + first, (r[:, None] < R) & (first + h[None, :] < H), other=0)
        inside = (first + h[:, None] < H) & (columns[None, :] < I)
        right = tl.load(weight + first * weight_strides[1], inside, other=0)
        sums += dot(left, right, "ieee")
    inside = (r[:, None] < R) & (columns[None, :] < I)
    at = r[:, None].to(tl.int64) * I + columns[None, :]
    if BACKWARD:
        earlier = tl.load(before + at, inside, other=0).to(tl.float32)
    elif BIAS:
        earlier = tl.load(before + columns, columns < I, other=0).to(tl.float32)[None, :]
    else:
        earlier = 0.0
    if DROPOUT:
        first = r.to(tl.int64) * I + column
        kept = keep_mask(first, seed, 0, dropped, BLOCK_R, BLOCK_I)
    else:
        kept = inside
    factors = 1.0 if up is None else tl.load(up + at, inside, other=0).to(tl.float32)
    stored, after, for_up = _finish(sums, earlier, factors, kept, factor, ACTIVATION, BACKWARD)
    tl.store(out + at, rounded(stored, out.dtype.element_ty), inside)
    tl.store(hidden + at, rounded(after, hidden.dtype.element_ty), inside)
    if grad_up is not None:
        tl.store(grad_up + at, rounded(for_up, grad_up.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["seed", "dropped"])
def mlp_elements(
    out, hidden, grad_up, before, up, size, I, seed, dropped, factor,
    ACTIVATION: tl.constexpr, BACKWARD: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    ELEMENTS: tl.constexpr,
):  # fmt: skip
    """`_finish` of products in `out`, which the first result overwrites."""
    first, at, inside = elements(size, ELEMENTS)
    product = tl.load(out + at, inside, other=0).to(tl.float32)
    if BACKWARD:
        earlier = tl.load(before + at, inside, other=0).to(tl.float32)
    elif BIAS:
        earlier = tl.load(before + at % I, inside, other=0).to(tl.float32)
    else:
        earlier = 0.0
    kept = keep_mask(first, seed, 0, dropped, ELEMENTS // 64, 64) if DROPOUT else inside
    factors = 1.0 if up is None else tl.load(up + at, inside, other=0).to(tl.float32)
    stored, after, for_up = _finish(product, earlier, factors, kept, factor, ACTIVATION, BACKWARD)
    tl.store(out + at, rounded(stored, out.dtype.element_ty), inside)
    tl.store(hidden + at, rounded(after, hidden.dtype.element_ty), inside)
    if grad_up is not None:
        tl.store(grad_up + at, rounded(for_up, grad_up.dtype.element_ty), inside)


def finished_product(
    x: Tensor,
    weight: Tensor,
    before: Tensor | None,
    up: Tensor | None,
    backward: bool,
    activation: str,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The results of `_finish` for x [R, H] times weight^T [H, I]; None for the gradient of `up`
    if that is None or in the forward."""
    (R, H), I = x.shape, weight.size(0)
    dropped = dropped_of_65536(dropout_p)
    numbers = (seed, dropped, 65536 / (65536 - dropped))
    constants = {
        "ACTIVATION": activation,
        "BACKWARD": backward,
        "BIAS": before is not None,
        "DROPOUT": dropout_p > 0,
    }
    before = x if before is None else before
    # Dropout's groups of 64 elements must not cross the end of a row.
    if x.dtype is not torch.float32 and H <= WIDEST_DOT and (I % 64 == 0 or not dropout_p):
        out, hidden = x.new_empty(R, I), x.new_empty(R, I)
        grad_up = torch.empty_like(out) if up is not None and backward else None

        def grid(meta: dict[str, int]) -> tuple[int, int]:
            return triton.cdiv(R, meta["BLOCK_R"]), triton.cdiv(I, meta["BLOCK_I"])

        mlp_product[grid](
            out, hidden, grad_up, x, weight, before, up, R.bit_length(), R, H, I, weight.stride(),
            *numbers, **constants,
        )  # fmt: skip
        return out, hidden, grad_up
    out = x @ weight.t()
    hidden = torch.empty_like(out)
    grad_up = torch.empty_like(out) if up is not None and backward else None
    mlp_elements[(triton.cdiv(R * I, ELEMENTS),)](
        out, hidden, grad_up, before, up, R * I, I, *numbers, **constants, ELEMENTS=ELEMENTS
    )
    return out, hidden, grad_up


class MlpFunction(torch.autograd.Function):
    """Two products in the forward, four in the backward; with `up` three and six."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor | None,
        fc2_weight: Tensor,
        fc2_bias: Tensor | None,
        up_weight: Tensor | None,
        up_bias: Tensor | None,
        *settings: Any,
    ) -> Tensor:
        rows = x.reshape(-1, x.size(-1))
        up = None if up_weight is None else F.linear(rows, up_weight, up_bias)
        before, hidden, _ = finished_product(rows, fc1_weight, fc1_bias, up, False, *settings)
        ctx.settings = settings
        ctx.save_for_backward(x, before, up, fc1_weight, fc2_weight, up_weight)
        return F.linear(hidden, fc2_weight, fc2_bias).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        x, before, up, fc1_weight, fc2_weight, up_weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        x, grad_out = (t.reshape(-1, t.size(-1)) for t in (x, grad_out.contiguous()))
        grad, hidden, grad_up = finished_product(
            grad_out, fc2_weight.t(), before, up, True, *ctx.settings
        )
        grad_x = grad @ fc1_weight if wanted[0] else None
        grad_up_weight = grad_up_bias = None
        if grad_up is not None:
            if grad_x is not None:
                grad_x.addmm_(grad_up, up_weight)
            grad_up_weight = grad_up.t() @ x if wanted[5] else None
            grad_up_bias = grad_up.sum(0) if wanted[6] else None
        return (
            None if grad_x is None else grad_x.view(ctx.saved_tensors[0].shape),
            grad.t() @ x if wanted[1] else None,
            grad.sum(0) if wanted[2] else None,
            grad_out.t() @ hidden if wanted[3] else None,
            grad_out.sum(0) if wanted[4] else None,
            grad_up_weight,
            grad_up_bias,
            None,
            None,
            None,
        )


def mlp_triton(x: Tensor, mlp: Mlp, base: Tensor | None) -> Tensor:
    """See `fastllm.ops.mlp.mlp`."""
    tensors = contiguous(*in_autocast(enter(x, mlp), *mlp.fc1, *mlp.fc2, *(mlp.up or (None, None))))
    out = MlpFunction.apply(*tensors, mlp.activation, *mlp.hidden_dropout)
    return leave(out, x if base is None else base, mlp)
