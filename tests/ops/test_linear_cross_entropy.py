import math

import pytest
import torch
from torch import Tensor

from fastllm.ops.decoder import Linear
from fastllm.ops.linear_cross_entropy import linear_cross_entropy
from tests.conftest import (
    BAD,
    LAYOUTS,
    assert_parity,
    assert_same_bits,
    bits,
    needs_extension,
    shape_name,
    with_others_fixed,
)

# A piece of the vocabulary has 2048 tokens.
SIZES = [
    (1, 8, 2),
    (2, 5, 66),
    (7, 20, 66),
    (31, 64, 17),
    (63, 33, 100),
    (64, 16, 2048),
    (65, 40, 2049),
    (130, 64, 66),
    (257, 24, 300),
    (39, 20, 5000),
    (600, 16, 66),
    (4, 1536, 66),
    (3, 3072, 70),
    (3, 24, 50_257),
]


def random_inputs(rows: int, H: int, V: int) -> tuple[Tensor, list[Tensor]]:
    """Targets, some of them not scored, and x, weight and bias."""
    generator = torch.Generator().manual_seed(rows * 10_000 + H * 100 + V)
    x, weight, bias = (torch.randn(s, generator=generator) for s in ((rows, H), (V, H), (V,)))
    targets = torch.randint(0, V, (rows,), generator=generator)
    targets[1::4] = -100
    return targets, [x, weight / H**0.5, bias]


def loss(x: Tensor, weight: Tensor, *rest: Tensor, ignore_index: int = -100) -> Tensor:
    """The loss of x, weight, an optional bias, and the targets."""
    bias = rest[0] if len(rest) == 2 else None
    return linear_cross_entropy(x, Linear(weight, bias), rest[-1], ignore_index)


@pytest.mark.parametrize("size", SIZES, ids=shape_name("RHV"))
def test_parity(arithmetic: str, size: tuple[int, int, int]) -> None:
    targets, inputs = random_inputs(*size)
    assert_parity(lambda *t: loss(*t, targets), *inputs)
    assert_parity(lambda *t: loss(*t, targets), *inputs[:2])


@pytest.mark.parametrize(
    "size", [(5, 3072, 66), (6000, 8, 30), (2, 8, 20_000)], ids=shape_name("RHV")
)
def test_parity_of_long_sums_of_one_sign(arithmetic: str, size: tuple[int, int, int]) -> None:
    """Small numbers are added to large sums."""
    targets, (x, *parameters) = random_inputs(*size)
    assert_parity(lambda *t: loss(*t, targets), x.abs(), *(t.abs() for t in parameters))


@needs_extension
def test_parity_of_more_logits_than_the_kernel_holds_at_once() -> None:
    """It holds 16 M of them, for every instruction set."""
    rows, V = 113, 151_936
    assert rows * V > 16 * 2**20
    targets, inputs = random_inputs(rows, 4, V)
    assert_parity(lambda *t: loss(*t, targets), *inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parity_of_any_layout(arithmetic: str, layout: str) -> None:
    targets, inputs = random_inputs(9, 21, 38)
    inputs = [LAYOUTS[layout](tensor) for tensor in inputs]
    for some_targets in (targets, targets.int(), torch.stack((targets, targets), 1)[:, 1]):
        assert_parity(lambda *t, to=some_targets: loss(*t, to), *inputs)


def test_parity_of_more_dimensions(arithmetic: str) -> None:
    targets, (x, *parameters) = random_inputs(30, 24, 50)
    # The last position of every sequence has no next token.
    assert_parity(
        lambda x, *t: loss(x.view(5, 6, 24)[:, :-1], *t, targets.view(5, 6)[:, 1:]),
        *(x, *parameters),
    )


@pytest.mark.parametrize("ignore_index", [0, 3, -1, 10**12])
def test_parity_of_any_ignore_index(arithmetic: str, ignore_index: int) -> None:
    targets, inputs = random_inputs(30, 20, 6)
    targets[targets < 0] = ignore_index
    assert_parity(lambda *t: loss(*t, targets, ignore_index=ignore_index), *inputs)


@pytest.mark.parametrize("scale", [1e-4, 1.0])
def test_parity_of_large_logits(arithmetic: str, scale: float) -> None:
    """Logits up to 1e4. All products are exact, so only the softmax can differ."""
    targets, (x, weight, _) = random_inputs(40, 32, 67)
    x, weight = (x * 100).round(), (weight * 100).round()
    assert (x @ weight.T).abs().max() > 1e4
    assert_parity(lambda *t: loss(*t, targets), x, weight * 0.5**13 if scale < 1 else weight)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("which", range(3), ids=["x", "weight", "bias"])
def test_not_a_number_and_infinity_as_in_the_reference(
    arithmetic: str, bad: float, which: int
) -> None:
    targets, inputs = random_inputs(7, 21, 37)
    inputs[which].view(-1)[20] = bad
    assert_parity(lambda *t: loss(*t, targets), *inputs, kinds_of_gradients=False)


def test_tokens_that_are_ruled_out(arithmetic: str) -> None:
    """Some tokens have a bias of minus infinity; none of them is a target."""
    targets, inputs = random_inputs(7, 21, 37)
    inputs[2][[0, 15, 36]] = -math.inf
    targets[:] = torch.tensor([1, 2, -100, 4, 14, 16, 35])
    assert_parity(lambda *t: loss(*t, targets), *inputs)


@pytest.mark.parametrize("wanted", range(3), ids=["x", "weight", "bias"])
def test_one_gradient_alone(arithmetic: str, wanted: int) -> None:
    targets, inputs = random_inputs(7, 21, 37)
    run = with_others_fixed(lambda *t: loss(*t, targets), inputs, wanted)
    assert_parity(run, inputs[wanted])


def test_same_bits(arithmetic: str, threads: None) -> None:
    targets, inputs = random_inputs(75, 40, 300)
    assert_same_bits(bits(lambda *t: loss(*t, targets), *inputs))


def test_nothing_to_score_gives_what_pytorch_gives(arithmetic: str) -> None:
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    nothing = linear_cross_entropy(x, Linear(weight, None), torch.full((4,), -100))
    assert nothing.isnan()
    nothing.backward()
    assert torch.equal(x.grad, torch.zeros(4, 8))  # type: ignore[arg-type]
    assert torch.equal(weight.grad, torch.zeros(5, 8))  # type: ignore[arg-type]


def test_backwards_that_are_scaled_and_repeated(arithmetic: str) -> None:
    targets, inputs = random_inputs(7, 21, 37)
    x, weight, bias = (tensor.requires_grad_() for tensor in inputs)
    out = loss(x, weight, bias, targets)
    once = torch.autograd.grad(out, inputs, retain_graph=True)
    for factor in (1.0, 3.0, 1.0):
        out.backward(torch.tensor(factor), retain_graph=True)
    for tensor, gradient in zip(inputs, once, strict=True):
        assert torch.allclose(tensor.grad, 5 * gradient)  # type: ignore[arg-type]


def test_a_target_outside_the_vocabulary_is_named() -> None:
    with pytest.raises(IndexError, match="Token id 7 is outside the vocabulary of 5"):
        linear_cross_entropy(torch.randn(1, 8), Linear(torch.randn(5, 8), None), torch.tensor([7]))
