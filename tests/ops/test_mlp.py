from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllm.ops.decoder import ACTIVATIONS, Dropout, Linear, Mlp, Norm
from fastllm.ops.mlp import mlp
from tests.conftest import (
    BAD,
    LAYOUTS,
    assert_parity,
    assert_same_bits,
    bits,
    shape_name,
    with_others_fixed,
)

# Inner dimensions with and without a partial last vector.
SIZES = [
    (1, 8, 32),
    (1, 20, 36),
    (2, 5, 17),
    (7, 30, 120),
    (31, 64, 100),
    (63, 24, 96),
    (64, 32, 128),
    (65, 40, 33),
    (130, 96, 256),
    (257, 48, 192),
]
LONG_SUMS = [(3, 384, 1536), (300, 16, 1537), (2, 256, 3072), (3, 3072, 20), (6000, 8, 20)]
NORMS = ["none", "pre", "post"]


def problem(
    size: tuple[int, int, int],
    norm: str = "pre",
    biases: bool = True,
    activation: str = "gelu",
    p: float = 0.3,
    out_p: float = 0.0,
    **norm_settings: Any,
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The operation as a function of tensors, and random tensors for it."""
    rows, H, I = size
    generator = torch.Generator().manual_seed(rows * 10_000 + H * 100 + I)
    sizes = ((rows, H), (I, H), (H, I), (I,), (H,), (H,), (H,))
    x, w1, w2, b1, b2, *affine = (torch.randn(size, generator=generator) for size in sizes)
    tensors = [x, w1 / H**0.5, w2 / I**0.5]
    tensors += [b1, b2] if biases else []
    tensors += affine if norm != "none" else []

    def run(x: Tensor, w1: Tensor, w2: Tensor, *vectors: Tensor) -> Tensor:
        b1, b2 = vectors[:2] if biases else (None, None)
        layer_norm = None if norm == "none" else Norm(*vectors[-2:], 1e-5, **norm_settings)
        layers = Linear(w1, b1), Linear(w2, b2)
        dropouts = Dropout(p, 7), Dropout(out_p, 9)
        return mlp(x, Mlp(*layers, activation, layer_norm, norm == "pre", *dropouts))

    return run, tensors


def gated_problem(
    size: tuple[int, int, int], norm: str, biases: bool, activation: str, p: float
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """As `problem`, with the weight of `up`, and its bias if there are others, at the end."""
    _, H, I = size
    _, tensors = problem(size, norm, biases)
    generator = torch.Generator().manual_seed(I)
    added = [torch.randn(I, H, generator=generator) / H**0.5]
    added += [torch.randn(I, generator=generator)] if biases else []

    def run(x: Tensor, w1: Tensor, w2: Tensor, *rest: Tensor) -> Tensor:
        vectors, up = rest[: -len(added)], rest[-len(added) :]
        b1, b2 = vectors[:2] if biases else (None, None)
        which = None if norm == "none" else Norm(*vectors[-2:], 1e-5)
        layers = Linear(w1, b1), Linear(w2, b2)
        dropouts = Dropout(p, 7), Dropout(p, 9)
        third = Linear(up[0], up[1] if biases else None)
        return mlp(x, Mlp(*layers, activation, which, norm == "pre", *dropouts, third))

    return run, tensors + added


@pytest.mark.parametrize("size", SIZES, ids=shape_name("RHI"))
@pytest.mark.parametrize("norm", NORMS)
def test_parity(arithmetic: str, size: tuple[int, int, int], norm: str) -> None:
    for biases, p in ((True, 0.3), (False, 0.0)):
        run, tensors = problem(size, norm, biases, p=p)
        assert_parity(run, *tensors)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_parity_of_rms_norms(arithmetic: str, norm: str) -> None:
    for size, p, offset in (((7, 30, 120), 0.3, 0.0), ((65, 40, 33), 0.0, 1.0)):
        run, tensors = problem(size, norm, p=p, out_p=p, kind="rms", offset=offset)
        assert_parity(run, *tensors)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_parity_of_gated_networks(arithmetic: str, activation: str, norm: str) -> None:
    for size, biases, p in (((7, 30, 120), True, 0.3), ((65, 40, 33), False, 0.0)):
        run, tensors = gated_problem(size, norm, biases, activation, p)
        assert_parity(run, *tensors)


@pytest.mark.parametrize("wanted", range(7))
def test_one_gradient_of_a_gated_network_alone(isa: str, wanted: int) -> None:
    run, tensors = gated_problem((7, 20, 33), "none", True, "silu", 0.3)
    assert_parity(with_others_fixed(run, tensors, wanted), tensors[wanted])


def test_gated_networks_give_the_same_bits(arithmetic: str, threads: None) -> None:
    run, tensors = gated_problem((67, 40, 130), "pre", True, "silu", 0.3)
    assert_same_bits(bits(run, *tensors))


@pytest.mark.parametrize("size", LONG_SUMS, ids=shape_name("RHI"))
def test_parity_of_long_sums(arithmetic: str, size: tuple[int, int, int]) -> None:
    run, tensors = problem(size)
    assert_parity(run, *tensors)
    # With a single sign, small numbers are added to large sums.
    run, tensors = problem(size, "none", activation="relu")
    assert_parity(run, *(tensor.abs() for tensor in tensors))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_parity_of_activations(arithmetic: str, activation: str, p: float) -> None:
    for norm in NORMS:
        run, tensors = problem((21, 40, 100), norm, False, activation, p)
        assert_parity(run, *tensors)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("scale", [1e-20, 100.0, 1e4])
def test_parity_far_from_one(arithmetic: str, activation: str, scale: float) -> None:
    """Inputs for which an activation is flat, linear, or rounds to zero."""
    run, (x, *parameters) = problem((7, 24, 100), "none", False, activation)
    assert_parity(run, x * scale, *parameters)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", NORMS)
def test_parity_of_any_layout(arithmetic: str, layout: str, norm: str) -> None:
    run, tensors = problem((9, 21, 38), norm)
    inputs = [LAYOUTS[layout](tensor) for tensor in tensors]
    assert_parity(run, *inputs)
    assert_parity(lambda *tensors: run(*tensors).mT, *inputs)  # also of the incoming gradient


@pytest.mark.parametrize("norm", NORMS)
def test_parity_of_output_dropout(arithmetic: str, norm: str) -> None:
    for size, p in (((7, 30, 120), 0.0), ((65, 40, 33), 0.3)):
        run, tensors = problem(size, norm, p=p, out_p=0.2)
        assert_parity(run, *tensors)


def test_parity_of_more_dimensions(arithmetic: str) -> None:
    run, (x, *parameters) = problem((30, 24, 50))
    assert_parity(run, x.view(2, 3, 5, 24), *parameters)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("which", range(7), ids=["x", "w1", "w2", "b1", "b2", "weight", "bias"])
def test_not_a_number_and_infinity_as_in_the_reference(
    arithmetic: str, bad: float, which: int
) -> None:
    for norm in ("pre", "post"):
        run, tensors = problem((7, 21, 37), norm)
        tensors[which].view(-1)[20] = bad
        assert_parity(run, *tensors, kinds_of_gradients=False)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_nan_and_infinity(arithmetic: str, activation: str, bad: float) -> None:
    def run(x: Tensor) -> Tensor:
        same = Linear(torch.ones(1, 1, dtype=x.dtype), None)
        return mlp(x, Mlp(same, same, activation))

    assert_parity(run, torch.tensor([[bad], [1.0]]), kinds_of_gradients=False)


@pytest.mark.parametrize("wanted", range(7))
def test_one_gradient_alone(arithmetic: str, wanted: int) -> None:
    for norm in ("pre", "post"):
        run, tensors = problem((7, 21, 37), norm)
        assert_parity(with_others_fixed(run, tensors, wanted), tensors[wanted])


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_same_bits(arithmetic: str, threads: None, norm: str) -> None:
    run, tensors = problem((75, 40, 100), norm, out_p=0.2)
    assert_same_bits(bits(run, *tensors))


def test_wrong_sizes_and_names_are_refused() -> None:
    fc1, fc2 = Linear(torch.ones(8, 4), None), Linear(torch.ones(4, 8), None)
    with pytest.raises(ValueError, match="do not match"):
        mlp(torch.ones(2, 5), Mlp(fc1, fc2))
    with pytest.raises(ValueError, match="Unknown activation 'tanh'"):
        mlp(torch.ones(2, 4), Mlp(fc1, fc2, "tanh"))
