from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

import fastllm
from fastllm.ops.decoder import Dropout, Linear, MultiHeadAttention, Norm
from fastllm.ops.multi_head_attention import multi_head_attention
from tests.conftest import (
    BAD,
    LAYOUTS,
    MASKS,
    assert_parity,
    assert_same_bits,
    bits,
    named_sizes,
    shape_name,
    with_others_fixed,
)

# B, N, S, D
SHAPES = [
    (1, 1, 1, 8),
    (2, 3, 1, 16),
    (1, 2, 2, 8),
    (2, 3, 7, 16),
    (1, 3, 7, 5),
    (2, 2, 31, 32),
    (1, 1, 63, 96),
    (2, 3, 64, 8),
    (1, 2, 65, 64),
    (1, 1, 65, 128),
    (1, 1, 130, 80),
    (1, 2, 257, 8),
]
NORMS = ["none", "pre", "post"]


# Lengths of packed sequences.
LENGTHS = [(1,), (7, 1, 3), (5, 0, 64, 66), (9, 3, 1, 30, 2, 8, 17, 1, 5)]


def problem(
    shape: tuple[int, int, int, int],
    norm: str = "pre",
    biases: bool = True,
    weights_p: float = 0.2,
    out_p: float = 0.2,
    kind: str = "layer",
    **settings: Any,
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The operation as a function of tensors, and random tensors for it."""
    B, N, S, D = shape
    H = N * D
    generator = torch.Generator().manual_seed(B * 10_000 + N * 1000 + S * 10 + D)
    sizes = ((B, S, H), (3 * H, H), (H, H), (3 * H,), (H,), (H,), (H,))
    x, qkv, out, b1, b2, *affine = (torch.randn(size, generator=generator) for size in sizes)
    tensors = [x, qkv / H**0.5, out / H**0.5]
    tensors += [b1, b2] if biases else []
    tensors += affine if norm != "none" else []
    dropouts = {"weights_dropout": Dropout(weights_p, 3), "out_dropout": Dropout(out_p, 5)}

    def run(x: Tensor, qkv: Tensor, out: Tensor, *vectors: Tensor) -> Tensor:
        b1, b2 = vectors[:2] if biases else (None, None)
        layer_norm = None if norm == "none" else Norm(*vectors[-2:], 1e-5, kind)
        mha = MultiHeadAttention(
            Linear(qkv, b1), Linear(out, b2), N, layer_norm, norm == "pre", **dropouts, **settings
        )
        return multi_head_attention(x, mha)

    return run, tensors


@pytest.mark.parametrize("shape", SHAPES, ids=shape_name("BNSD"))
@pytest.mark.parametrize("norm", NORMS)
def test_parity(arithmetic: str, shape: tuple[int, int, int, int], norm: str) -> None:
    B, _, S, _ = shape
    mask = torch.rand(B, 1, S, S, generator=torch.Generator().manual_seed(S)) < 0.3
    for biases, p, is_causal, attn_mask in (
        (True, 0.2, True, None),
        (False, 0.0, True, mask),
        (True, 0.1, False, mask),
    ):
        run, tensors = problem(shape, norm, biases, p, p, causal=is_causal, mask=attn_mask)
        assert_parity(run, *tensors)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_parity_of_rms_norms(arithmetic: str, norm: str) -> None:
    for shape, p in (((2, 3, 7, 16), 0.2), ((1, 2, 65, 64), 0.0)):
        run, tensors = problem(shape, norm, True, p, p, kind="rms")
        assert_parity(run, *tensors)


@pytest.mark.parametrize("p", [(0.3, 0.0), (0.0, 0.3)], ids=["weights", "output"])
@pytest.mark.parametrize("norm", NORMS)
def test_parity_of_one_dropout_alone(arithmetic: str, p: tuple[float, float], norm: str) -> None:
    run, tensors = problem((2, 3, 17, 8), norm, weights_p=p[0], out_p=p[1])
    assert_parity(run, *tensors)


@pytest.mark.parametrize("mask", MASKS)
def test_parity_of_masks(arithmetic: str, mask: str) -> None:
    """Every broadcastable shape; each letter stands for a size."""
    B, N, S = 2, 3, 18
    sizes = named_sizes(mask, B=B, N=N, S=S, T=S)
    attn_mask = torch.rand(sizes, generator=torch.Generator().manual_seed(1)) < 0.4
    for is_causal in (False, True):
        run, tensors = problem((B, N, S, 8), mask=attn_mask, causal=is_causal)
        assert_parity(run, *tensors)


@pytest.mark.parametrize("norm", NORMS)
def test_parity_of_fully_masked_rows(arithmetic: str, norm: str) -> None:
    mask = torch.zeros(2, 1, 18, 18, dtype=torch.bool)
    mask[0] = True
    mask[1, 0, 4:7] = True
    run, tensors = problem((2, 3, 18, 8), norm, mask=mask, causal=True)
    assert_parity(run, *tensors)
    if norm == "none":
        with fastllm.use("cpu"):
            x, qkv, out, b1, _ = tensors
            nothing = run(x, qkv, out, b1, torch.zeros(24))
        assert torch.equal(nothing[0], torch.zeros(18, 24))
        assert torch.equal(nothing[1, 4:7], torch.zeros(3, 24))


def packed_sequences(
    lengths: tuple[int, ...], norm: str, **settings: Any
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The operation on packed sequences of these lengths."""
    starts = tuple(accumulate(lengths, initial=0))
    run, (x, *parameters) = problem((1, 3, sum(lengths), 7), norm, starts=starts, **settings)
    return run, [x[0], *parameters]


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: "-".join(map(str, lengths)))
@pytest.mark.parametrize("norm", NORMS)
def test_parity_of_packed_sequences(arithmetic: str, lengths: tuple[int, ...], norm: str) -> None:
    for is_causal in (False, True):
        run, tensors = packed_sequences(lengths, norm, causal=is_causal)
        assert_parity(run, *tensors)


@pytest.mark.parametrize("implementation", ["ref", "cpu"])
def test_packed_sequences_equal_separate_ones(implementation: str) -> None:
    with fastllm.use(implementation):
        run, (x, *parameters) = packed_sequences(
            (5, 9, 2), "pre", weights_p=0, out_p=0, causal=True
        )
        alone, _ = problem((1, 3, 9, 7), "pre", weights_p=0, out_p=0, causal=True)
        parts = [alone(part[None], *parameters)[0] for part in x.split([5, 9, 2])]
        assert torch.allclose(run(x, *parameters), torch.cat(parts), atol=1e-5)


@pytest.mark.parametrize("starts", [(0,), (1, 5), (0, 4), (0, 3, 2, 5)])
def test_wrong_starts_are_refused(starts: tuple[int, ...]) -> None:
    run, (x, *parameters) = problem((1, 3, 5, 7), starts=starts)
    with pytest.raises(ValueError, match="starts must rise from 0 to the number of rows 5"):
        run(x[0], *parameters)
    run, (x, *parameters) = problem((1, 3, 5, 7), starts=(0, 5), mask=torch.ones(5, 5) > 2)
    with pytest.raises(ValueError, match="starts and mask are mutually exclusive"):
        run(x[0], *parameters)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", NORMS)
def test_parity_of_any_layout(arithmetic: str, layout: str, norm: str) -> None:
    run, tensors = problem((2, 3, 9, 7), norm, causal=True)
    inputs = [LAYOUTS[layout](tensor) for tensor in tensors]
    assert_parity(run, *inputs)
    assert_parity(lambda *tensors: run(*tensors).mT, *inputs)  # also of the incoming gradient


def test_parity_of_long_sums(arithmetic: str) -> None:
    run, tensors = problem((1, 6, 3, 128), causal=True)
    assert_parity(run, *tensors)


def test_parity_of_large_scores(arithmetic: str) -> None:
    """Scores beyond 1e4. All products are exact, so only the softmax can differ."""
    run, (x, qkv, *rest) = problem((1, 2, 40, 16), "none", False, causal=True)
    x, qkv = (x * 8).round(), (qkv * 8).round()
    qkv[:64] *= 4
    x[:, ::3] /= 2**13  # some rows have weights other than 0 and 1
    q, k = (x @ qkv[:64].T).view(40, 2, 2, 16).permute(1, 2, 0, 3)
    assert (q @ k.mT / 4).max() > 1e4
    assert_parity(run, x, qkv, *rest)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("which", range(7), ids=["x", "qkv", "out", "b1", "b2", "weight", "bias"])
def test_not_a_number_and_infinity_as_in_the_reference(
    arithmetic: str, bad: float, which: int
) -> None:
    for norm in ("pre", "post"):
        run, tensors = problem((2, 3, 9, 7), norm)
        tensors[which].view(-1)[20] = bad
        assert_parity(run, *tensors, kinds_of_gradients=False)


@pytest.mark.parametrize("wanted", range(7))
def test_one_gradient_alone(arithmetic: str, wanted: int) -> None:
    for norm in ("pre", "post"):
        run, tensors = problem((2, 3, 9, 7), norm)
        assert_parity(with_others_fixed(run, tensors, wanted), tensors[wanted])


# Threads divide a single sequence; of several sequences, each goes to one thread.
@pytest.mark.parametrize(
    ("shape", "norm"), [((1, 3, 33, 8), "pre"), ((5, 2, 17, 20), "post")], ids=["B1", "B5"]
)
def test_same_bits(
    arithmetic: str, threads: None, shape: tuple[int, int, int, int], norm: str
) -> None:
    run, tensors = problem(shape, norm, causal=True)
    assert_same_bits(bits(run, *tensors))


@pytest.mark.parametrize("lengths", LENGTHS[2:], ids=["few", "many"])
def test_same_bits_of_packed_sequences(
    arithmetic: str, threads: None, lengths: tuple[int, ...]
) -> None:
    run, tensors = packed_sequences(lengths, "post")
    assert_same_bits(bits(run, *tensors))
