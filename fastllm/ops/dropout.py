"""Dropout with a mask that is computed, not stored: a function of (seed, stream, element index).

The generator is Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011), keyed by the seed, with the stream as third word of the counter. Every implementation
draws the same mask, whatever its thread count or vector width, and the backward draws it again.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastllm.ops import dispatch, extension
from fastllm.ops.torch_private import disable_dynamo

# The fused operations divide by 1 - p.
DROPOUT_RANGE = "a dropout probability is outside [0, 1)"

_WORD = 0xFFFFFFFF


def draw_seed() -> int:
    """A fresh 63-bit seed from PyTorch's default generator: `torch.manual_seed` governs it."""
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_())


def fresh_seeds() -> Iterator[int]:
    """An endless stream of seeds, each drawn by `draw_seed` on demand."""
    while True:
        yield draw_seed()


def draw_seeds(count: int) -> list[int]:
    """The next `count` seeds, equal to those of `count` calls of `draw_seed`."""
    return torch.empty(count, dtype=torch.int64, device="cpu").random_().tolist()


def philox(counters: Tensor, seed: int, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words of Philox 4x32-10 for each counter, as non-negative int64.

    Args:
        counters: int64, any shape: the lower two words of the counter.
        seed: the key, taken modulo 2**64.
        stream: the third word of the counter, in [0, 2**32).
    """
    x0, x1 = counters & _WORD, counters >> 32
    x2, x3 = torch.full_like(counters, stream), torch.zeros_like(counters)
    key0, key1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        # An int64 product wraps around, but its 64 bits equal those of the unsigned product.
        product0, product1 = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x1 = (product1 >> 32 & _WORD) ^ x1 ^ key0, product1 & _WORD
        x2, x3 = (product0 >> 32 & _WORD) ^ x3 ^ key1, product0 & _WORD
        key0, key1 = key0 + 0x9E3779B9 & _WORD, key1 + 0xBB67AE85 & _WORD
    return x0, x1, x2, x3


# Inductor (torch 2.13) turns these integers into floats, which do not compile.
@disable_dynamo
def keep_mask(shape: torch.Size, p: float, seed: int, stream: int, device: Any) -> Tensor:
    """Which elements survive dropout with probability `p`: bool, of the given shape.

    Each element uses 16 random bits, so eight counters decide a group of 64 elements. Element
    `64 g + 16 q + 2 c + w` uses half of word `2 (q // 2) + w` of counter `8 g + c`, the low half
    for even `q` and the high half for odd `q`. In this order, vectors of any width hold adjacent
    elements.
    """
    size = shape.numel()
    counters = torch.arange((size + 63) // 64 * 8, device=device)
    w0, w1, w2, w3 = philox(counters.view(-1, 8), seed, stream)
    pairs = [torch.stack(pair, dim=-1).flatten(1) for pair in ((w0, w1), (w2, w3))]
    halves = [half for words in pairs for half in (words & 0xFFFF, words >> 16)]
    return (torch.stack(halves, dim=1) >= dropped_of_65536(p)).flatten()[:size].view(shape)


def dropped_of_65536(p: float) -> int:
    """How many of the 65,536 values of 16 random bits drop an element; 0 only if `p` is 0."""
    return 0 if p == 0 else min(max(int(p * 65536 + 0.5), 1), 65535)


def dropout_ref(x: Tensor, p: float, seed: int, stream: int) -> Tensor:
    keep = keep_mask(x.shape, p, seed, stream, x.device)
    return x * (keep * (1 / (1 - dropped_of_65536(p) / 65536))).to(x.dtype)


class DropoutFunction(torch.autograd.Function):
    """The C++ kernel. Dropout is linear, so the backward is the forward on the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int, stream: int) -> Tensor:
        ctx.settings = p, seed, stream
        x = x.contiguous()
        out = torch.empty_like(x)
        extension.kernels.dropout(
            out=out.data_ptr(),
            x=x.data_ptr(),
            size=x.numel(),
            p=p,
            seed=seed,
            stream=stream,
            threads=torch.get_num_threads(),
        )
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None, None]:
        return dropout(grad_out, *ctx.settings), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *settings: None) -> Tensor:
        return dropout(tangent, *ctx.settings)


def dropout_cpu(x: Tensor, p: float, seed: int, stream: int) -> Tensor:
    return DropoutFunction.apply(x, p, seed, stream)


def why_not_cpu(x: Tensor, p: float, seed: int, stream: int) -> str | None:
    return dispatch.why_not_cpu(x)


def why_not_triton(x: Tensor, p: float, seed: int, stream: int) -> str | None:
    return dispatch.why_not_triton(x)


IMPLEMENTATIONS = [
    dispatch.cpu(dropout_cpu, why_not_cpu),
    dispatch.triton("dropout", why_not_triton),
    dispatch.reference(dropout_ref),
]


def dropout(x: Tensor, p: float, seed: int, stream: int = 0) -> Tensor:
    """Zero each element with probability `p` and divide the others by `1 - p`.

    Args:
        x: any shape, contiguous or not; elements are numbered in row-major order.
        p: in [0, 1]; taken as a multiple of 1 / 65,536.
        seed: selects the mask, in [0, 2**63); `draw_seed` returns a fresh one.
        stream: distinguishes masks with the same seed, in [0, 2**32).

    Raises:
        ValueError: `p` is outside [0, 1].
    """
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability must be between 0 and 1, got {p}")
    if p == 0:
        return x
    if p == 1:
        return x * 0
    arguments = (x, p, seed, stream)
    return dispatch.choose("dropout", IMPLEMENTATIONS, *arguments).run(*arguments)
