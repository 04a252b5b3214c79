"""Shared parts of the Triton kernels: dropout masks, block products, rounding, autotuning.

Kernels are compiled for CUDA tensors. If TRITON_INTERPRET=1 is set before Triton is imported,
Triton interprets them on CPU tensors: slow, but enough to test their results.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
_INTERPRETED = tl.constexpr(INTERPRETED)


def tuned(
    configs: Sequence[triton.Config], key: Sequence[str], fitting: Callable[..., Any] | None = None
) -> Callable[[Any], Any]:
    """`triton.autotune` with its choices cached on disk.

    Args:
        configs: the candidates; the interpreter takes the first.
        key: arguments whose values, like the tensors' types, are tuned for separately.
        fitting: selects the candidates to measure, as `early_config_prune` of `triton.autotune`.
    """
    return triton.autotune(
        list(configs[:1] if INTERPRETED else configs),
        list(key),
        prune_configs_by={"early_config_prune": fitting} if fitting else None,
        cache_results=True,
    )


def dot_precision(x: Tensor) -> str:
    """The precision of `dot` on fp32 operands: PyTorch's setting."""
    return "tf32" if x.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def in_autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, cast to autocast's type if autocast is on."""
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [None if t is None else t.to(dtype) for t in tensors]


def heads_beside_each_other(x: Tensor) -> Tensor:
    """An empty [B, N, S, D] in which a position's heads are contiguous, as the projection reads."""
    B, N, S, D = x.shape
    return x.new_empty(B, S, N, D).transpose(1, 2)


def power_of_2(size: int) -> int:
    """The size of a block that holds `size` elements; products need at least 16."""
    return max(16, triton.next_power_of_2(size))


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """Product of two blocks, accumulated in fp32."""
    if _INTERPRETED:  # the interpreter would multiply the bits of bf16 numbers as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """A block of fp32 numbers, rounded to nearest in another type."""
    if _INTERPRETED and tl.bfloat16 == DTYPE:  # the interpreter would truncate
        word = x.to(tl.uint32, bitcast=True)
        nearest = (word + 0x7FFF + (word >> 16 & 1)) & 0xFFFF0000
        x = tl.where(x == x, nearest, word).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def tanh(x):
    """Accurate near 0 too, where 1 - exp(-2 x) cancels: by the polynomial of Cephes there."""
    size, z = tl.abs(x), x * x
    decayed = tl.exp(-2 * size)
    large = (1 - decayed) / (1 + decayed)
    terms = ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z
    small = x + x * z * ((terms + 1.33314422036e-1) * z - 3.33332819422e-1)
    return tl.where(size < 0.625, small, tl.where(x < 0, -large, large))


# Elements per program of an elementwise kernel: 16 bytes per thread, several transactions in
# flight.
ELEMENTS = 1024


@triton.jit
def elements(size, ELEMENTS: tl.constexpr):
    """A program's indices [ELEMENTS / 64, 64]: the first per row, all, and whether they exist."""
    first = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS // 64) * 64
    at = first[:, None] + tl.arange(0, 64)[None, :]
    return first, at, at < size


@triton.jit
def keep_mask(first, seed, stream, dropped, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Which elements survive dropout: [ROWS, SIZE]; each row starts at element `first` [ROWS].

    As in `fastllm.ops.dropout.keep_mask`, each Philox counter decides eight of 64 elements. SIZE is
    32 or a multiple of 64, and rows begin at multiples of it.
    """
    GROUPS: tl.constexpr = (SIZE + 63) // 64
    groups = first[:, None] // 64 + tl.arange(0, GROUPS)[None, :]
    counters = groups[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    low, high = counters.to(tl.uint32), (counters >> 32).to(tl.uint32)
    third = (low * 0 + stream).to(tl.uint32)
    x0, x1, x2, x3 = tl.philox(seed, low, high, third, low * 0)
    if SIZE == 32:  # the words cover 64 elements: choose the half for these 32
        upper = (first // 32 % 2 == 1)[:, None, None]
        words = tl.join(tl.where(upper, x2, x0), tl.where(upper, x3, x1))
        halves = tl.join(words & 0xFFFF, words >> 16)  # [ROWS, 1, 8, w, q % 2]
        halves = tl.permute(halves, (0, 1, 4, 2, 3))
    else:
        words = tl.join(tl.join(x0, x1), tl.join(x2, x3))  # [ROWS, GROUPS, 8, w, q // 2]
        halves = tl.join(words & 0xFFFF, words >> 16)  # [..., q % 2]
        halves = tl.permute(halves, (0, 1, 4, 5, 2, 3))  # [ROWS, GROUPS, q // 2, q % 2, 8, w]
    return tl.reshape(halves, (ROWS, SIZE)) >= dropped
