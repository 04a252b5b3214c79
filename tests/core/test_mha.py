import pytest
import torch
from torch import nn

from fastllm import MultiHeadAttention
from fastllm.core.attn import KeyValueCache
from fastllm.core.attn import MultiHeadAttention as same_class
from fastllm.core.norm import AllHeadsRMSNorm


def test_attributes_and_start() -> None:
    assert same_class is MultiHeadAttention
    mha = MultiHeadAttention(64, 4, p=0.2, bias=True)
    assert (mha.hidden_size, mha.num_heads, mha.head_dim, mha.p) == (64, 4, 16, 0.2)
    assert (mha.norm_first, mha.is_causal, mha.include_norm_residual) == (True, False, True)
    assert isinstance(mha.norm, nn.LayerNorm)
    assert mha.dropout.p == 0.2
    bound = (6 / (64 + 3 * 64)) ** 0.5
    assert mha.qkv_proj.weight.abs().max().item() == pytest.approx(bound, rel=0.05)
    assert torch.equal(mha.qkv_proj.bias, torch.zeros(192))
    assert torch.equal(mha.out_proj.bias, torch.zeros(64))
    assert MultiHeadAttention(64, 4).qkv_proj.bias is None
    assert MultiHeadAttention(64, 4, include_norm_residual=False).norm is None


@pytest.mark.parametrize("is_causal", [False, True])
def test_agrees_with_pytorchs_own_module(is_causal: bool) -> None:
    """Rows of qkv_proj are ordered q, k, v, each by head: the order of nn.MultiheadAttention."""
    ours = MultiHeadAttention(24, 3, p=0.0, bias=True, include_norm_residual=False).double()
    torchs = nn.MultiheadAttention(24, 3, batch_first=True).double()
    torchs.in_proj_weight.data = ours.qkv_proj.weight.data
    torchs.in_proj_bias.data = ours.qkv_proj.bias.data
    torchs.out_proj.load_state_dict(ours.out_proj.state_dict())
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    causal = torch.ones(7, 7, dtype=torch.bool).triu(1) if is_causal else None
    expected = torchs(x, x, x, attn_mask=causal, need_weights=False)[0]
    assert torch.allclose(ours(x, is_causal=is_causal), expected)


def test_norm_and_residual_before_and_after() -> None:
    inner = MultiHeadAttention(16, 2, p=0.0, include_norm_residual=False)
    x = torch.randn(2, 5, 16)
    for norm_first in (True, False):
        mha = MultiHeadAttention(16, 2, p=0.0, norm_first=norm_first)
        mha.load_state_dict(inner.state_dict(), strict=False)
        assert mha.norm is not None
        expected = x + inner(mha.norm(x)) if norm_first else mha.norm(x + inner(x))
        assert torch.allclose(mha(x), expected, atol=1e-6)


def test_true_means_masked() -> None:
    mha = MultiHeadAttention(16, 2, p=0.0, include_norm_residual=False)
    x = torch.randn(1, 4, 16)
    mask = torch.tensor([False, False, False, True]).view(1, 1, 1, 4)
    out = mha(x, attn_mask=mask)
    changed = x.clone()
    changed[:, 3] += 1
    assert torch.allclose(mha(changed, attn_mask=mask)[:, :3], out[:, :3], atol=1e-6)
    everything = torch.ones(4, 4, dtype=torch.bool)
    assert torch.equal(mha(x, attn_mask=everything), torch.zeros(1, 4, 16))


def test_causality_hides_the_future_and_forward_overrides_it() -> None:
    mha = MultiHeadAttention(16, 2, p=0.0, is_causal=True)
    x = torch.randn(1, 6, 16)
    changed = x.clone()
    changed[:, 4] = torch.randn(16)
    assert torch.allclose(mha(x)[:, :4], mha(changed)[:, :4], atol=1e-6)
    open_ = mha(x, is_causal=False), mha(changed, is_causal=False)
    assert not torch.allclose(open_[0][:, :4], open_[1][:, :4], atol=1e-6)


def test_cache_gives_what_the_whole_sequence_gives() -> None:
    mha = MultiHeadAttention(16, 2, p=0.0, is_causal=True)
    x = torch.randn(2, 6, 16)
    cache = KeyValueCache(6)
    pieces = [mha(part, cache=cache) for part in (x[:, :3], x[:, 3:4], x[:, 4:])]
    assert torch.allclose(torch.cat(pieces, 1), mha(x), atol=1e-6)
    with pytest.raises(ValueError, match="Sequence length 7 exceeds maximum sequence length 6"):
        mha(x[:, :1], cache=cache)


@pytest.mark.parametrize("heads", [3, 0, -1])
def test_heads_must_divide_the_width(heads: int) -> None:
    with pytest.raises(ValueError, match="must be divisible by num_heads"):
        MultiHeadAttention(16, heads)


def test_dropout_on_weights_and_output_only_in_training() -> None:
    mha = MultiHeadAttention(16, 2, p=0.5)
    x = torch.randn(2, 5, 16)
    assert not torch.equal(mha(x), mha(x))
    assert torch.equal(mha.eval()(x), mha(x))
    # Without output dropout, the weights' dropout still applies.
    mha.train()
    mha.dropout = nn.Dropout(0.0)
    assert not torch.equal(mha(x), mha(x))


def test_a_norm_of_all_heads_together() -> None:
    """Equal to norms of the projections, before they are divided into heads."""
    mha = MultiHeadAttention(
        16, 4, p=0.0, num_kv_heads=2, qk_norm=AllHeadsRMSNorm, qk_norm_of_all_heads=True,
        separate_qkv=True,
    )  # fmt: skip
    assert (mha.q_norm.weight.shape, mha.k_norm.weight.shape) == ((16,), (8,))
    for norm in (mha.q_norm, mha.k_norm):
        nn.init.uniform_(norm.weight)
    x = torch.randn(2, 5, 16)
    expected = mha(x)
    for norm, projection in ((mha.q_norm, mha.q_proj), (mha.k_norm, mha.k_proj)):
        of_projection = nn.RMSNorm(norm.weight.numel())
        of_projection.weight = norm.weight
        projection.register_forward_hook(lambda _, __, out, norm=of_projection: norm(out))
    mha.q_norm = mha.k_norm = None
    assert torch.allclose(mha(x), expected, atol=1e-6)
