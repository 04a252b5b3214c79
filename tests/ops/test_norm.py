from functools import partial

import pytest
import torch
from torch import Tensor

import fastllm
from fastllm.ops.decoder import Norm
from fastllm.ops.norm import norm as norm_of
from fastllm.ops.norm import why_not_triton
from tests.conftest import (
    BAD,
    LAYOUTS,
    assert_parity,
    assert_same_bits,
    bits,
    shape_name,
    with_others_fixed,
)

SIZES = [
    (1, 3),
    (1, 64),
    (2, 5),
    (7, 15),
    (31, 16),
    (63, 17),
    (64, 64),
    (65, 100),
    (130, 257),
    (257, 40),
    (3, 1536),
    (2, 3072),
    (6000, 16),
]


KINDS = ["layer", "rms"]


def norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    kind: str = "layer",
    offset: float = 0.0,
) -> Tensor:
    return norm_of(x, Norm(weight, bias, 1e-5, kind, offset), residual)


def random_inputs(rows: int, H: int) -> list[Tensor]:
    """x, weight, bias, residual."""
    generator = torch.Generator().manual_seed(1000 * rows + H)
    sizes = ((rows, H), (H,), (H,), (rows, H))
    return [torch.randn(size, generator=generator) for size in sizes]


@pytest.mark.parametrize("size", SIZES, ids=shape_name("RH"))
@pytest.mark.parametrize("kind", KINDS)
def test_parity(isa: str, kind: str, size: tuple[int, int]) -> None:
    x, weight, bias, residual = random_inputs(*size)
    assert_parity(partial(norm, kind=kind), x, weight, bias)
    assert_parity(partial(norm, kind=kind), x, weight, bias, residual)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_parity_without_weight_or_bias(isa: str, kind: str, offset: float) -> None:
    x, weight, bias, residual = random_inputs(31, 37)
    settings = {"kind": kind, "offset": offset}
    assert_parity(lambda x, w, r: norm(x, w, None, r, **settings), x, weight, residual)
    assert_parity(lambda x, b, r: norm(x, None, b, r, **settings), x, bias, residual)
    assert_parity(lambda x: norm(x, None, None, **settings), x)
    assert_parity(lambda x, w, b: norm(x, w, b, **settings), x, weight, bias)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parity_of_any_layout(isa: str, layout: str) -> None:
    inputs = [LAYOUTS[layout](t) for t in random_inputs(9, 21)]
    assert_parity(norm, *inputs)
    assert_parity(lambda *tensors: norm(*tensors).mT, *inputs)  # also of the incoming gradient


def test_parity_of_more_dimensions(isa: str) -> None:
    x, weight, bias, residual = random_inputs(30, 24)
    assert_parity(norm, x.view(2, 3, 5, 24), weight, bias, residual.view(2, 3, 5, 24))


@pytest.mark.parametrize("mean", [0.1, 1e3, 1e6])
@pytest.mark.parametrize("kind", KINDS)
def test_parity_where_the_mean_is_large(isa: str, kind: str, mean: float) -> None:
    x, weight, bias, _ = random_inputs(5, 100)
    assert_parity(partial(norm, kind=kind), x + mean, weight, bias)
    full = torch.full((3, 100), mean)  # zero variance
    assert_parity(partial(norm, kind=kind), full, weight, bias)


def test_rounding_does_not_make_the_variance_negative(isa: str) -> None:
    _, weight, bias, _ = random_inputs(5, 100)
    x = torch.logspace(-20, 18, 400)[:, None].expand(400, 100)
    with fastllm.use("cpu"):
        out = norm(x, weight, bias)
    assert torch.allclose(out[:150], bias.expand(150, 100))  # while eps dominates
    assert out.isfinite().all()


@pytest.mark.parametrize("scale", [1e-12, 1e4, 1e15])
@pytest.mark.parametrize("kind", KINDS)
def test_parity_of_extreme_scales(isa: str, kind: str, scale: float) -> None:
    x, weight, bias, _ = random_inputs(5, 100)
    assert_parity(partial(norm, kind=kind), x * scale, weight, bias)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("which", range(4), ids=["x", "weight", "bias", "residual"])
@pytest.mark.parametrize("kind", KINDS)
def test_not_a_number_and_infinity_as_in_the_reference(
    isa: str, kind: str, bad: float, which: int
) -> None:
    inputs = random_inputs(7, 37)
    inputs[which].view(-1)[36] = bad
    assert_parity(partial(norm, kind=kind), *inputs, kinds_of_gradients=False)


@pytest.mark.parametrize("wanted", range(4), ids=["x", "weight", "bias", "residual"])
def test_one_gradient_alone(isa: str, wanted: int) -> None:
    tensors = random_inputs(7, 37)
    assert_parity(with_others_fixed(norm, tensors, wanted), tensors[wanted])


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits(isa: str, kind: str, threads: None) -> None:
    assert_same_bits(bits(partial(norm, kind=kind), *random_inputs(67, 130)))


def test_a_broadcast_residual_is_left_to_the_reference() -> None:
    x, weight, bias, residual = random_inputs(3, 8)
    expected = norm(x, weight, bias, residual[:1].expand(3, 8))
    assert torch.allclose(norm(x, weight, bias, residual[:1]), expected)
    with fastllm.use("cpu"), pytest.raises(RuntimeError, match=r"broadcast|extension"):
        norm(x, weight, bias, residual[:1])


@pytest.mark.parametrize(
    ("kind", "dtype", "one_kernel"),
    [
        ("layer", torch.bfloat16, True),
        ("rms", torch.float32, True),
        ("rms", torch.bfloat16, False),
    ],
)
def test_narrow_norms_are_pytorchs_on_a_gpu_where_it_has_one_kernel(
    kind: str, dtype: torch.dtype, one_kernel: bool
) -> None:
    """An RMS norm of bf16 with a weight in fp32, as under autocast, would be several."""
    record = Norm(torch.ones(8), None, 1e-5, kind)
    with fastllm.use("auto"):
        reason = why_not_triton(torch.ones(2, 8, dtype=dtype), record, None)
    assert str(reason).startswith("PyTorch's own kernel is faster") == one_kernel
