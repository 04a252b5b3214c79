import pytest
import torch
from torch import nn

from fastllm import MLP, MultiHeadAttention, TransformerBlock
from fastllm.core.attn import KeyValueCache


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre", "post"])
@pytest.mark.parametrize("bias", [True, False])
def test_composition_and_gradients(norm_first: bool, bias: bool) -> None:
    block = TransformerBlock(
        16,
        2,
        attn_dropout_p=0.0,
        mlp_dropout_p=0.0,
        norm_first=norm_first,
        qkv_bias=bias,
        mlp_bias=bias,
    )
    x = torch.randn(2, 5, 16)
    if norm_first:
        middle = x + block.self_attn(block.norm1(x))
        expected = middle + block.mlp(block.norm2(middle))
    else:
        middle = block.norm1(x + block.self_attn(x))
        expected = block.norm2(middle + block.mlp(middle))
    assert torch.allclose(block(x), expected, atol=1e-6)
    block(x).sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_parts() -> None:
    block = TransformerBlock(16, 2, norm_eps=1e-3, mlp_activation="relu", is_causal=True)
    assert isinstance(block.self_attn, MultiHeadAttention)
    assert isinstance(block.mlp, MLP)
    assert isinstance(block.norm1, nn.LayerNorm) and block.norm1.eps == block.norm2.eps == 1e-3
    assert block.self_attn.include_norm_residual is False and block.self_attn.norm is None
    assert block.mlp.include_norm_residual is False and block.mlp.norm is None
    assert isinstance(block.mlp.activation, nn.ReLU)
    assert block.self_attn.is_causal


def test_mask_and_causality_reach_the_attention() -> None:
    block = TransformerBlock(16, 2, is_causal=True).eval()
    x = torch.randn(1, 4, 16)
    assert not torch.allclose(block(x), block(x, is_causal=False))
    mask = torch.ones(4, 4, dtype=torch.bool).tril(-1)
    assert not torch.allclose(block(x), block(x, attn_mask=mask))


def test_a_module_in_place_of_ours_is_used() -> None:
    class Zero(nn.Module):
        def forward(self, x, attn_mask=None, is_causal=None):
            return torch.zeros_like(x)

    block = TransformerBlock(16, 2, mlp_dropout_p=0.0)
    block.self_attn = Zero()
    x = torch.randn(1, 4, 16)
    assert torch.allclose(block(x), x + block.mlp(block.norm2(x)))


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre", "post"])
def test_attention_is_called_with_keywords(
    norm_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code that replaces `forward` may take the mask and the causality by name only."""
    block = TransformerBlock(16, 2, attn_dropout_p=0.0, mlp_dropout_p=0.0, norm_first=norm_first)
    x, mask = torch.randn(2, 5, 16), torch.rand(5, 5) > 0.9
    mask.fill_diagonal_(False)
    expected = block(x, mask, True)
    forward, seen = block.self_attn.forward, []

    def replaced(x: torch.Tensor, /, **settings: object) -> torch.Tensor:
        seen.append(settings)
        return forward(x, **settings)

    monkeypatch.setattr(block.self_attn, "forward", replaced)
    assert torch.allclose(block(x, mask, True), expected, atol=1e-6)
    assert seen == [{"attn_mask": mask, "is_causal": True}]


def test_norms_of_the_outputs_alone() -> None:
    block = TransformerBlock(
        16, 2, attn_dropout_p=0.0, mlp_dropout_p=0.0, in_norms=False, out_norms=True
    )
    assert not any(name.startswith("norm") for name in block.state_dict())
    x = torch.randn(2, 5, 16)
    middle = x + block.self_attn(x)
    expected = middle + block.mlp(middle)
    assert torch.allclose(block(x), expected, atol=1e-6)
    assert torch.allclose(block(x, cache=KeyValueCache(5), is_causal=False), expected, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [{}, {"out_norms": True, "parallel": True}, {"out_norms": True, "norm_first": False}],
)
def test_sublayers_need_a_norm(settings: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match="without in_norms, sublayers need out_norms"):
        TransformerBlock(16, 2, in_norms=False, **settings)
