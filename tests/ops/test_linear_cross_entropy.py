import pytest
import torch

from fastllm.ops.embedding import Settings, embedding
from fastllm.ops.layer_norm import layer_norm
from fastllm.ops.linear_cross_entropy import linear_cross_entropy
from fastllm.ops.parameters import Linear, Norm
from tests.conftest import assert_parity


@pytest.mark.parametrize("V", [2, 66, 5000])
@pytest.mark.parametrize("H", [20, 64])
def test_parity(isa: str, V: int, H: int) -> None:
    torch.manual_seed(1)
    x, weight, bias = torch.randn(3, 13, H), torch.randn(V, H) / H**0.5, torch.randn(V)
    targets = torch.randint(0, V, (3, 13))
    targets[0, :4] = -100
    assert_parity(
        lambda x, w, b: linear_cross_entropy(x, Linear(w, b), targets), *(x, weight, bias)
    )
    assert_parity(lambda x, w: linear_cross_entropy(x, Linear(w, None), targets), x, weight)


def test_nothing_to_score_gives_what_pytorch_gives(isa: str) -> None:
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    loss = linear_cross_entropy(x, Linear(weight, None), torch.full((4,), -100))
    assert loss.isnan()
    loss.backward()
    assert torch.equal(x.grad, torch.zeros(4, 8))  # type: ignore[arg-type]


def test_a_target_outside_the_vocabulary_is_named() -> None:
    with pytest.raises(IndexError, match="Token id 7 is outside the vocabulary of 5"):
        linear_cross_entropy(torch.randn(1, 8), Linear(torch.randn(5, 8), None), torch.tensor([7]))


@pytest.mark.parametrize("H", [5, 64, 100])
def test_parity_of_layer_norm(isa: str, H: int) -> None:
    torch.manual_seed(2)
    x, residual, weight, bias = torch.randn(7, H), torch.randn(7, H), torch.randn(H), torch.randn(H)
    assert_parity(lambda x, w, b: layer_norm(x, Norm(w, b, 1e-5)), x, weight, bias)
    assert_parity(
        lambda x, w, b, r: layer_norm(x, Norm(w, b, 1e-5), r), *(x, weight, bias, residual)
    )


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_parity_of_embedding(isa: str, p: float) -> None:
    torch.manual_seed(3)
    ids, settings = torch.randint(0, 9, (3, 7)), Settings(3.0, 1, p, 9)
    assert_parity(
        lambda weight, positions: embedding(ids, weight, positions, settings),
        *(torch.randn(9, 20), torch.randn(7, 20)),
    )
