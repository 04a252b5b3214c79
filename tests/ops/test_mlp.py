import pytest
import torch

from fastllm.ops.mlp import ACTIVATIONS, mlp
from fastllm.ops.parameters import Linear, Norm
from tests.conftest import assert_parity

SIZES = [(1, 20, 36), (21, 64, 100), (130, 96, 256)]  # rows, H, I


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "R{}-H{}-I{}".format(*size))
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_parity(isa: str, size: tuple[int, int, int], activation: str, p: float) -> None:
    torch.manual_seed(1)
    rows, H, I = size
    x, w1, w2 = torch.randn(rows, H), torch.randn(I, H) / H**0.5, torch.randn(H, I) / I**0.5
    b1, b2, weight, bias = torch.randn(I), torch.randn(H), torch.randn(H), torch.randn(H)
    assert_parity(
        lambda x, w1, b1, w2, b2: mlp(x, Linear(w1, b1), Linear(w2, b2), activation, p, 7),
        *(x, w1, b1, w2, b2),
    )
    for norm_first in (True, False):
        assert_parity(
            lambda x, w1, w2, weight, bias, norm_first=norm_first: mlp(
                x, Linear(w1, None), Linear(w2, None), activation, p, 7,
                Norm(weight, bias, 1e-5), norm_first,
            ),
            *(x, w1, w2, weight, bias),
        )  # fmt: skip


def test_wrong_sizes_and_names_are_refused() -> None:
    fc1, fc2 = Linear(torch.ones(8, 4), None), Linear(torch.ones(4, 8), None)
    with pytest.raises(ValueError, match="do not fit"):
        mlp(torch.ones(2, 5), fc1, fc2)
    with pytest.raises(ValueError, match="Unknown activation 'tanh'"):
        mlp(torch.ones(2, 4), fc1, fc2, "tanh")
