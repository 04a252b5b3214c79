"""What the tests share: the parity rule, the instruction sets, and where real texts lie."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastllm.ops import dispatch

REPOSITORY = Path(__file__).parent.parent
TEXTS = REPOSITORY.parent / "shared" / "data"

needs_extension = pytest.mark.skipif(
    dispatch.kernels is None, reason=f"no C++ kernels: {dispatch.extension_problem}"
)


def assert_as_accurate(actual: Tensor, plain: Tensor, oracle: Tensor, name: str = "") -> None:
    """The error of `actual` is at most twice that of plain PyTorch plus 1e-6 of the scale.

    `oracle` is the reference in float64. Where it is not a number or infinite, so must `actual` be.
    """
    assert actual.shape == oracle.shape
    finite = oracle.isfinite()
    assert torch.equal(actual.double()[~finite], oracle[~finite]) or torch.equal(
        actual.isnan(), oracle.isnan()
    )
    error = (actual.double() - oracle)[finite].abs().max().item() if finite.any() else 0.0
    plain_error = (plain.double() - oracle)[finite].abs().max().item() if finite.any() else 0.0
    scale = oracle[finite].abs().max().item() if finite.any() else 0.0
    bound = 2 * plain_error + 1e-6 * scale
    assert error <= bound, f"{name} error {error:.3g} exceeds {bound:.3g} at scale {scale:.3g}"


@pytest.fixture(params=dispatch.kernels.isas() if dispatch.kernels else ["none"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with the kernels of every instruction set that this CPU has."""
    if dispatch.kernels is None:
        pytest.skip(f"no C++ kernels: {dispatch.extension_problem}")
    before = dispatch.kernels.isa()
    dispatch.kernels.set_isa(request.param)
    yield request.param
    dispatch.kernels.set_isa(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the thread count that the test changes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def shakespeare() -> Path:
    path = TEXTS / "tinyshakespeare.txt"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path
