import pytest
import torch
from torch import nn

from fastllm import MLP


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("gelu", nn.functional.gelu),
        ("gelu_tanh", lambda x: nn.functional.gelu(x, approximate="tanh")),
        ("relu", torch.relu),
        ("silu", nn.functional.silu),
        ("swish", nn.functional.silu),
        ("leaky_relu", nn.functional.leaky_relu),
        ("relu_squared", lambda x: torch.relu(x) ** 2),
    ],
)
@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (2, 2, 3, 8)], ids=str)
def test_computes_its_layers_in_order(name: str, function, shape: tuple[int, ...]) -> None:
    mlp = MLP(8, activation=name, dropout_p=0.0, include_norm_residual=False)
    x = torch.randn(shape)
    assert torch.allclose(mlp(x), mlp.fc2(function(mlp.fc1(x))), atol=1e-6)


def test_a_gated_network_multiplies_by_a_third_layer() -> None:
    mlp = MLP(8, 20, "silu", dropout_p=0.0, include_norm_residual=False, gated=True)
    x = torch.randn(2, 3, 8)
    assert mlp.up is not None
    expected = mlp.fc2(nn.functional.silu(mlp.fc1(x)) * mlp.up(x))
    assert torch.allclose(mlp(x), expected, atol=1e-6)
    assert {"up.weight", "up.bias"} <= mlp.state_dict().keys()
    assert MLP(8).up is None


def test_norm_and_residual_before_and_after() -> None:
    inner = MLP(16, dropout_p=0.0, include_norm_residual=False)
    x = torch.randn(2, 5, 16)
    for norm_first in (True, False):
        mlp = MLP(16, dropout_p=0.0, norm_first=norm_first)
        mlp.load_state_dict(inner.state_dict(), strict=False)
        assert mlp.norm is not None
        expected = x + inner(mlp.norm(x)) if norm_first else mlp.norm(x + inner(x))
        assert torch.allclose(mlp(x), expected, atol=1e-6)


def test_attributes() -> None:
    mlp = MLP(8, norm_type=nn.RMSNorm, norm_eps=1e-3, bias=False)
    assert mlp.intermediate_size == 32
    assert isinstance(mlp.norm, nn.RMSNorm) and mlp.norm.eps == 1e-3
    assert mlp.fc1.bias is None and mlp.fc2.bias is None
    assert MLP(8, 20).fc1.out_features == 20
    tanh = nn.Tanh()
    assert MLP(8, activation=tanh).activation is tanh


def test_dropout_lies_between_activation_and_fc2() -> None:
    mlp = MLP(8, 4000, "relu", dropout_p=0.5, include_norm_residual=False)
    with torch.no_grad():
        mlp.fc1.weight.zero_()
        assert mlp.fc1.bias is not None and mlp.fc2.bias is not None
        mlp.fc1.bias.fill_(1.0)
        mlp.fc2.weight.fill_(1.0)
        mlp.fc2.bias.fill_(0.5)
    out = mlp(torch.zeros(1, 8))
    # All outputs are equal: a sum of 4000 units, each 0 or 2 with equal probability.
    assert torch.equal(out, out[:, :1].expand(1, 8))
    assert abs(out[0, 0].item() - 4000.5) < 5 * 4000**0.5
    assert mlp.eval()(torch.zeros(1, 8))[0, 0].item() == 4000.5


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_smooth_activations_start_from_a_truncated_normal(activation: str) -> None:
    weight = MLP(256, activation=activation).fc1.weight
    assert weight.abs().max().item() <= 2 / 16
    # Cut at two standard deviations, a normal distribution keeps 0.88 of its width.
    assert weight.std().item() == pytest.approx(0.88 / 16, rel=0.02)


def test_unknown_activation_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"Unknown activation 'gleu'.*gelu, gelu_tanh, relu, silu"):
        MLP(8, activation="gleu")
