"""Attention in Triton, without scores in global memory (Dao, "FlashAttention-2", 2023).

The forward saves the logarithm of each row's sum of exponentials, from which the backward
recomputes the weights. One backward kernel takes blocks of queries and another blocks of keys, so
that each program sums its own gradients and no two write to the same place; a program of keys takes
all heads of queries that share them. Blocks outside the window are skipped.

Roofline: a block of 64 queries computes 4 * 64 * D operations for every key and value, 4 D bytes in
16 bits: 64 a byte from L2, which gives an A100 more than it can multiply. So blocks are as large as
registers allow, and the gain comes from keeping scores out of memory.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllm.ops.attention import AttentionOptions
from fastllm.ops.autograd import check_first_derivative
from fastllm.ops.blocks_triton import (
    dot,
    dot_precision,
    heads_beside_each_other,
    in_autocast,
    keep_mask,
    power_of_2,
    rounded,
    tanh,
    tuned,
)
from fastllm.ops.dropout import dropped_of_65536

# exp2 is an instruction, exp is not.
LOG2_E = tl.constexpr(math.log2(math.e))


def config(
    block_s: int, block_t: int, warps: int, stages: int = 2, registers: int | None = None
) -> triton.Config:
    """Tiles; without a number of registers, ptxas may choose few and spill."""
    sizes = {"BLOCK_S": block_s, "BLOCK_T": block_t}
    return triton.Config(sizes, num_warps=warps, num_stages=stages, maxnreg=registers)


class Tiles(NamedTuple):
    """Tiles that fit into registers on every GPU from sm_80 to sm_100, by type and head width.

    Kernels with a soft-cap, or with dropout and a mask, are crowded: they need more registers. See
    `benchmarks/triton_targets.py`.
    """

    narrow: tuple[triton.Config, ...]  # 16 bits, D <= 64
    narrow_crowded: tuple[triton.Config, ...]
    wide: tuple[triton.Config, ...]  # 16 bits, D <= 128
    widest: tuple[triton.Config, ...]  # 16 bits, D <= 256
    fp32: tuple[triton.Config, ...]  # D <= 64
    fp32_crowded: tuple[triton.Config, ...]


# Of two candidates to measure, the first has fewer threads to synchronise. The second has more
# warps to hide latency, or reads less per query.
FORWARD = Tiles(
    narrow=(config(64, 64, 4), config(128, 64, 8)),
    narrow_crowded=(config(64, 64, 4, registers=255), config(128, 64, 8)),
    wide=(config(32, 64, 4), config(64, 64, 8)),
    widest=(config(32, 32, 8, registers=255), config(64, 32, 8, registers=255)),
    fp32=(config(16, 32, 4, 1),),
    fp32_crowded=(config(16, 32, 4, 1),),
)
BACKWARD_Q = Tiles(
    narrow=(config(32, 64, 4), config(64, 32, 8)),
    narrow_crowded=(config(32, 64, 4), config(64, 32, 8)),
    wide=(config(32, 64, 4), config(64, 32, 8)),
    widest=(config(32, 32, 8, registers=255),),
    fp32=(config(16, 32, 4),),
    fp32_crowded=(config(16, 32, 4, 3),),
)
BACKWARD_KV = Tiles(
    narrow=(config(32, 32, 4), config(32, 64, 8)),
    narrow_crowded=(config(32, 32, 4), config(16, 64, 8)),
    wide=(config(32, 32, 4), config(32, 64, 8)),
    widest=(config(16, 32, 8, registers=255), config(32, 32, 8, registers=255)),
    fp32=(config(16, 32, 8, 1),),
    fp32_crowded=(config(16, 32, 4),),
)


def tuned_tiles(tiles: Tiles) -> Callable[[Any], Any]:
    """Chooses among the tiles that fit."""

    def fitting(configs: Any, arguments: Any, **constants: Any) -> list[triton.Config]:
        D = constants["BLOCK_D"]
        crowded = constants["CAPPED"] or (constants["MASKED"] and constants["DROPOUT"])
        if arguments["q"].dtype is torch.float32:
            return list(tiles.fp32_crowded if crowded else tiles.fp32)
        if D <= 64:
            return list(tiles.narrow_crowded if crowded else tiles.narrow)
        return list(tiles.wide if D <= 128 else tiles.widest)

    key = "length BLOCK_D SHARED CAUSAL WINDOWED CAPPED MASKED DROPOUT PRECISION".split()
    return tuned(sum(tiles, ()), key, fitting)


@triton.jit
def _hidden(
    mask, mask_strides, rows, columns, S, T, window,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Which of a block's scores are masked."""
    hidden = columns[None, :] >= T
    if CAUSAL:
        hidden = hidden | (columns[None, :] > rows[:, None] + (T - S))
    if WINDOWED:
        hidden = hidden | (columns[None, :] <= rows[:, None] + (T - S - window))
    if MASKED:
        inside = (rows[:, None] < S) & (columns[None, :] < T)
        at = rows[:, None].to(tl.int64) * mask_strides[2] + columns[None, :] * mask_strides[3]
        hidden = hidden | (tl.load(mask + at, inside, other=1) != 0)
    return hidden


@triton.jit
def _visible_keys(
    row, S, T, window,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The first block of keys that a block of queries sees, and the end of the last."""
    begin, end = 0, T
    if CAUSAL:
        end = tl.minimum(T, row + BLOCK_S + T - S)
    if WINDOWED:
        begin = tl.maximum(0, row + T - S - window + 1) // BLOCK_T * BLOCK_T
    return begin, end


@triton.jit
def _seeing_queries(
    column, S, T, window,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The first block of queries that sees a block of keys, and the end of the last."""
    begin, end = 0, S
    if CAUSAL:
        begin = tl.maximum(0, column - (T - S)) // BLOCK_S * BLOCK_S
    if WINDOWED:
        end = tl.minimum(S, column + BLOCK_T - 1 + window - (T - S))
    return begin, end


@triton.jit
def _capped(scores, cap, CAPPED: tl.constexpr):
    """The scores under the soft-cap, if there is one, and the derivative."""
    if CAPPED:
        share = tanh(scores / cap)
        return share * cap, 1 - share * share
    else:
        return scores, 1.0


@triton.jit
def _kept(head, rows, column, S, T, seed, dropped, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr):
    """Which weights of a block survive dropout; rows are padded to a multiple of 64."""
    first = (head * S + rows.to(tl.int64)) * (tl.cdiv(T, 64) * 64) + column
    return keep_mask(first, seed, 0, dropped, BLOCK_S, BLOCK_T)


@triton.jit
def _block(x, row, stride, size, D, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """A block [BLOCK, BLOCK_D] of a matrix [size, D] in memory, 0 beyond its bounds."""
    rows, d = row + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < size) & (d[None, :] < D)
    return tl.load(x + rows[:, None].to(tl.int64) * stride + d[None, :], inside, other=0)


@triton.jit
def _write(x, block, row, stride, size, D, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    rows, d = row + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < size) & (d[None, :] < D)
    block = rounded(block, x.dtype.element_ty)
    tl.store(x + rows[:, None].to(tl.int64) * stride + d[None, :], block, inside)


@triton.jit
def _head(strides, head, N, SHARED: tl.constexpr = 1):
    """The offset of a head of queries in a tensor of strides [B, N / SHARED, ...]."""
    return (head // N).to(tl.int64) * strides[0] + (head % N // SHARED).to(tl.int64) * strides[1]


@tuned_tiles(FORWARD)
@triton.jit(do_not_specialize=["length", "S", "T", "window", "seed", "dropped"])
def attention_fwd(
    out, lse, q, k, v, mask, out_strides, q_strides, k_strides, v_strides, mask_strides,
    length, N, S, T, D, window, scale, cap, seed, dropped,
    BLOCK_D: tl.constexpr, SHARED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head, over all visible keys.

    `SHARED` heads of queries share one of keys; `scale` and `cap` are those of exponents of 2.
    """
    row, head = tl.program_id(0) * BLOCK_S, tl.program_id(1)
    rows = row + tl.arange(0, BLOCK_S)
    k += _head(k_strides, head, N, SHARED)
    v += _head(v_strides, head, N, SHARED)
    mask += _head(mask_strides, head, N)
    queries = _block(q + _head(q_strides, head, N), row, q_strides[2], S, D, BLOCK_S, BLOCK_D)
    seen = rows >= S - T if CAUSAL else rows >= 0
    if MASKED:
        seen = rows < 0
    largest = tl.full((BLOCK_S,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_S,), tl.float32)
    sums = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    begin, end = _visible_keys(row, S, T, window, CAUSAL, WINDOWED, BLOCK_S, BLOCK_T)
    for column in range(begin, end, BLOCK_T):
        columns = column + tl.arange(0, BLOCK_T)
        keys = _block(k, column, k_strides[2], T, D, BLOCK_T, BLOCK_D)
        scores = dot(queries, tl.trans(keys), PRECISION) * scale
        scores, _ = _capped(scores, cap, CAPPED)
        hidden = _hidden(mask, mask_strides, rows, columns, S, T, window, CAUSAL, WINDOWED, MASKED)
        if MASKED:
            seen = seen | (tl.min(hidden.to(tl.int32), 1) == 0)
        scores = tl.where(hidden, float("-inf"), scores)
        larger = tl.maximum(largest, tl.max(scores, 1))
        # Until a row has a finite score, avoid -inf - -inf.
        base = tl.where(larger == float("-inf"), 0.0, larger)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(largest - base)
        total = total * shrink + tl.sum(weights, 1)
        if DROPOUT:
            kept = _kept(head, rows, column, S, T, seed, dropped, BLOCK_S, BLOCK_T)
            weights = tl.where(kept, weights, 0.0)
        values = _block(v, column, v_strides[2], T, D, BLOCK_T, BLOCK_D)
        product = dot(rounded(weights, values.dtype), values, PRECISION)
        sums = sums * shrink[:, None] + product
        largest = larger
    # A fully masked row gives 0; a row whose scores are all -inf gives NaN, as in the reference.
    factor = tl.where(seen, 1.0 / total, 0.0)
    if DROPOUT:
        factor *= 65536.0 / (65536 - dropped)
    out += _head(out_strides, head, N)
    _write(out, sums * factor[:, None], row, out_strides[2], S, D, BLOCK_S, BLOCK_D)
    # Infinite for a fully masked row, so that all weights recomputed from it are 0.
    logarithms = tl.where(seen, largest + tl.log2(total), float("inf"))
    tl.store(lse + head.to(tl.int64) * S + rows, logarithms, rows < S)


@tuned_tiles(BACKWARD_Q)
@triton.jit(do_not_specialize=["length", "S", "T", "window", "seed", "dropped"])
def attention_bwd_q(
    grad_q, delta, grad_out, out, lse, q, k, v, mask,
    out_strides, q_strides, k_strides, v_strides, mask_strides,
    length, N, S, T, D, window, scale, cap, seed, dropped,
    BLOCK_D: tl.constexpr, SHARED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of queries; also delta, each row's product of output and gradient.

    `out_strides` are the strides of `grad_q`, `out` and `grad_out`.
    """
    row, head = tl.program_id(0) * BLOCK_S, tl.program_id(1)
    rows = row + tl.arange(0, BLOCK_S)
    at, stride = _head(out_strides, head, N), out_strides[2]
    k += _head(k_strides, head, N, SHARED)
    v += _head(v_strides, head, N, SHARED)
    mask += _head(mask_strides, head, N)
    queries = _block(q + _head(q_strides, head, N), row, q_strides[2], S, D, BLOCK_S, BLOCK_D)
    grads = _block(grad_out + at, row, stride, S, D, BLOCK_S, BLOCK_D)
    outs = _block(out + at, row, stride, S, D, BLOCK_S, BLOCK_D)
    deltas = tl.sum(outs.to(tl.float32) * grads.to(tl.float32), 1)
    places = head.to(tl.int64) * S + rows
    tl.store(delta + places, deltas, rows < S)
    logarithms = tl.load(lse + places, rows < S, other=float("inf"))
    sums = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    begin, end = _visible_keys(row, S, T, window, CAUSAL, WINDOWED, BLOCK_S, BLOCK_T)
    for column in range(begin, end, BLOCK_T):
        columns = column + tl.arange(0, BLOCK_T)
        keys = _block(k, column, k_strides[2], T, D, BLOCK_T, BLOCK_D)
        values = _block(v, column, v_strides[2], T, D, BLOCK_T, BLOCK_D)
        scores = dot(queries, tl.trans(keys), PRECISION) * scale
        scores, slope = _capped(scores, cap, CAPPED)
        hidden = _hidden(mask, mask_strides, rows, columns, S, T, window, CAUSAL, WINDOWED, MASKED)
        weights = tl.exp2(tl.where(hidden, float("-inf"), scores) - logarithms[:, None])
        for_weights = dot(grads, tl.trans(values), PRECISION)
        if DROPOUT:
            kept = _kept(head, rows, column, S, T, seed, dropped, BLOCK_S, BLOCK_T)
            for_weights = tl.where(kept, for_weights * (65536.0 / (65536 - dropped)), 0.0)
        for_scores = weights * (for_weights - deltas[:, None]) * slope
        sums += dot(rounded(for_scores, keys.dtype), keys, PRECISION)
    _write(grad_q + at, sums * (scale / LOG2_E), row, stride, S, D, BLOCK_S, BLOCK_D)


@tuned_tiles(BACKWARD_KV)
@triton.jit(do_not_specialize=["length", "S", "T", "window", "seed", "dropped"])
def attention_bwd_kv(
    grad_k, grad_v, delta, grad_out, lse, q, k, v, mask,
    grad_strides, out_strides, q_strides, k_strides, v_strides, mask_strides,
    length, N, S, T, D, window, scale, cap, seed, dropped,
    BLOCK_D: tl.constexpr, SHARED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of keys and values; both have the strides `grad_strides`."""
    column, first = tl.program_id(0) * BLOCK_T, tl.program_id(1) * SHARED
    columns = column + tl.arange(0, BLOCK_T)
    k += _head(k_strides, first, N, SHARED)
    v += _head(v_strides, first, N, SHARED)
    keys = _block(k, column, k_strides[2], T, D, BLOCK_T, BLOCK_D)
    values = _block(v, column, v_strides[2], T, D, BLOCK_T, BLOCK_D)
    for_keys = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for_values = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    begin, end = _seeing_queries(column, S, T, window, CAUSAL, WINDOWED, BLOCK_S, BLOCK_T)
    # One loop over blocks and heads takes fewer registers than two.
    for i in range(tl.cdiv(end - begin, BLOCK_S) * SHARED):
        head, row = first + i % SHARED, begin + i // SHARED * BLOCK_S
        q_head = q + _head(q_strides, head, N)
        grad_head = grad_out + _head(out_strides, head, N)
        mask_head = mask + _head(mask_strides, head, N)
        rows = row + tl.arange(0, BLOCK_S)
        places = head.to(tl.int64) * S + rows
        queries = _block(q_head, row, q_strides[2], S, D, BLOCK_S, BLOCK_D)
        grads = _block(grad_head, row, out_strides[2], S, D, BLOCK_S, BLOCK_D)
        logarithms = tl.load(lse + places, rows < S, other=float("inf"))
        scores = dot(keys, tl.trans(queries), PRECISION) * scale  # [BLOCK_T, BLOCK_S]
        scores, slope = _capped(scores, cap, CAPPED)
        hidden = _hidden(
            mask_head, mask_strides, rows, columns, S, T, window, CAUSAL, WINDOWED, MASKED
        )
        weights = tl.where(tl.trans(hidden), float("-inf"), scores) - logarithms[None, :]
        weights = tl.exp2(weights)
        for_weights = dot(values, tl.trans(grads), PRECISION)
        used = weights
        if DROPOUT:
            kept = tl.trans(_kept(head, rows, column, S, T, seed, dropped, BLOCK_S, BLOCK_T))
            factor = 65536.0 / (65536 - dropped)
            used = tl.where(kept, weights * factor, 0.0)
            for_weights = tl.where(kept, for_weights * factor, 0.0)
        for_values += dot(rounded(used, grads.dtype), grads, PRECISION)
        deltas = tl.load(delta + places, rows < S, other=0)
        for_scores = weights * (for_weights - deltas[None, :]) * slope
        for_keys += dot(rounded(for_scores, queries.dtype), queries, PRECISION)
    at, stride = _head(grad_strides, first, N, SHARED), grad_strides[2]
    _write(grad_k + at, for_keys * (scale / LOG2_E), column, stride, T, D, BLOCK_T, BLOCK_D)
    _write(grad_v + at, for_values, column, stride, T, D, BLOCK_T, BLOCK_D)


class AttentionFunction(torch.autograd.Function):
    """Saves the inputs, the output and one number per row."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        options: AttentionOptions,
    ) -> Tensor:
        B, N, S = q.shape[:3]
        out = heads_beside_each_other(q)
        lse = q.new_empty(B, N, S, dtype=torch.float32)
        mask, numbers, constants = kernel_arguments(q, k, options)
        attention_fwd[lambda meta: (triton.cdiv(S, meta["BLOCK_S"]), B * N)](
            out, lse, q, k, v, mask, out.stride(), q.stride(), k.stride(), v.stride(),
            mask.stride(), *numbers, **constants,
        )  # fmt: skip
        ctx.options = options._replace(mask=None)
        ctx.save_for_backward(q, k, v, out, lse, options.mask)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        q, k, v, out, lse, mask = ctx.saved_tensors
        (B, N, S), (K, T) = q.shape[:3], k.shape[1:3]
        options = ctx.options._replace(mask=mask)
        mask, numbers, constants = kernel_arguments(q, k, options)
        if grad_out.stride() != out.stride():
            grad_out = torch.empty_like(out).copy_(grad_out)
        grad_q, delta = torch.empty_like(out), torch.empty_like(lse)
        grad_k, grad_v = heads_beside_each_other(k), heads_beside_each_other(v)
        attention_bwd_q[lambda meta: (triton.cdiv(S, meta["BLOCK_S"]), B * N)](
            grad_q, delta, grad_out, out, lse, q, k, v, mask, out.stride(), q.stride(),
            k.stride(), v.stride(), mask.stride(), *numbers, **constants,
        )  # fmt: skip
        attention_bwd_kv[lambda meta: (triton.cdiv(T, meta["BLOCK_T"]), B * K)](
            grad_k, grad_v, delta, grad_out, lse, q, k, v, mask, grad_k.stride(), out.stride(),
            q.stride(), k.stride(), v.stride(), mask.stride(), *numbers, **constants,
        )  # fmt: skip
        return grad_q, grad_k, grad_v, None


def kernel_arguments(
    q: Tensor, k: Tensor, options: AttentionOptions
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """The arguments shared by all three kernels: the mask, numbers and constants."""
    (B, N, S, D), (K, T) = q.shape, k.shape[1:3]
    if options.mask is None:
        mask = q.new_empty(1, dtype=torch.uint8).expand(1, 1, 1, 1)
    else:
        mask = options.mask.view(torch.uint8).expand(B, N, S, T)
    length = max(S, T).bit_length()  # a tuning key: roughly, the sequence length
    scale, cap = (x * LOG2_E.value for x in (options.scale_of(q), options.softcap or 0.0))
    seed, dropped = options.dropout.seed, dropped_of_65536(options.dropout.p)
    numbers = length, N, S, T, D, options.window or 0, scale, cap, seed, dropped
    constants = {
        "BLOCK_D": power_of_2(D),
        "SHARED": N // K,
        "CAUSAL": options.causal,
        "WINDOWED": options.window is not None,
        "CAPPED": options.softcap is not None,
        "MASKED": options.mask is not None,
        "DROPOUT": options.dropout.p > 0,
        "PRECISION": dot_precision(q),
    }
    return mask, numbers, constants


def attention_triton(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
    """See `fastllm.ops.attention.attention`."""
    typed: Any = in_autocast(q, k, v)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in typed)
    return AttentionFunction.apply(q, k, v, options)
