import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from fastllm.ops.attention import attention
from fastllm.ops.dropout import keep_mask


def random_qkv(B: int, N: int, S: int, D: int, dtype: torch.dtype = torch.float32) -> list:
    generator = torch.Generator().manual_seed(B * 1000 + N * 100 + S * 10 + D)
    return [torch.randn(B, N, S, D, generator=generator).to(dtype) for _ in range(3)]


def test_by_hand() -> None:
    """Two positions, one head of one element: every number can be done on paper."""
    q = torch.tensor([[[[1.0], [2.0]]]])
    k = torch.tensor([[[[0.0], [math.log(3)]]]])
    v = torch.tensor([[[[10.0], [20.0]]]])
    # Row 0: exp(0) : exp(ln 3) = 1 : 3; row 1: exp(0) : exp(2 ln 3) = 1 : 9.
    expected = torch.tensor([[[[0.25 * 10 + 0.75 * 20], [0.1 * 10 + 0.9 * 20]]]])
    assert torch.allclose(attention(q, k, v), expected)
    # A causal first position sees itself alone.
    expected[0, 0, 0, 0] = 10
    assert torch.allclose(attention(q, k, v, is_causal=True), expected)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (2, 3, 7, 16), (1, 2, 65, 8)], ids=str)
def test_agrees_with_pytorch(shape: tuple[int, int, int, int], is_causal: bool) -> None:
    q, k, v = random_qkv(*shape, torch.float64)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    assert torch.allclose(attention(q, k, v, is_causal=is_causal), expected, atol=1e-12)


@given(st.data())
@settings(deadline=None, max_examples=50, derandomize=True)
def test_masks(data: st.DataObject) -> None:
    B, N, S = (data.draw(st.integers(1, limit)) for limit in (2, 3, 9))
    q, k, v = random_qkv(B, N, S, 4, torch.float64)
    shape = [data.draw(st.sampled_from([1, size])) for size in (B, N, S)] + [S]
    seed = data.draw(st.integers(0, 99))
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    is_causal = data.draw(st.booleans())
    out = attention(q, k, v, mask, is_causal)
    hidden = mask.expand(B, N, S, S)
    if is_causal:
        hidden = hidden | torch.ones(S, S, dtype=torch.bool).triu(1)
    for b in range(B):
        for n in range(N):
            for s in range(S):
                seen = ~hidden[b, n, s]
                if not seen.any():
                    assert torch.equal(out[b, n, s], torch.zeros(4, dtype=torch.float64))
                    continue
                weights = (k[b, n, seen] @ q[b, n, s] / 2).softmax(0)
                assert torch.allclose(out[b, n, s], weights @ v[b, n, seen])


def test_fully_masked_rows_give_zeros_and_finite_gradients() -> None:
    q, k, v = (x.requires_grad_() for x in random_qkv(1, 2, 4, 8))
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[2] = True
    out = attention(q, k, v, mask, is_causal=True)
    assert torch.equal(out[:, :, 2], torch.zeros(1, 2, 8))
    out.sum().backward()
    for x in (q, k, v):
        assert x.grad is not None and x.grad.isfinite().all()


def test_queries_of_a_cache_are_the_last_positions() -> None:
    q, k, v = random_qkv(1, 2, 6, 8, torch.float64)
    whole = attention(q, k, v, is_causal=True)
    last = attention(q[:, :, 4:], k, v, is_causal=True)
    assert torch.allclose(last, whole[:, :, 4:])


def test_dropout_is_on_the_weights() -> None:
    q, k, v = random_qkv(1, 1, 5, 5)
    # Every row begins with a group of 64 random numbers of its own.
    keep = keep_mask(torch.Size([1, 1, 5, 64]), 0.5, 42, 0, "cpu")[..., :5]
    weights = (q @ k.mT / math.sqrt(5)).softmax(-1)
    expected = torch.where(keep, weights * 2, 0) @ v
    assert torch.allclose(attention(q, k, v, dropout_p=0.5, seed=42), expected, atol=1e-6)


@pytest.mark.parametrize("scale", [1e4, 1e-30])
def test_extreme_logits(scale: float) -> None:
    q, k, v = random_qkv(1, 2, 9, 8)
    out = attention(q * scale, k, v, is_causal=True)
    expected = attention((q * scale).double(), k.double(), v.double(), is_causal=True)
    assert out.isfinite().all()
    assert torch.allclose(out.double(), expected, atol=1e-4)


def test_gradients() -> None:
    q, k, v = (x.requires_grad_() for x in random_qkv(1, 2, 4, 3, torch.float64))
    assert torch.autograd.gradcheck(lambda *qkv: attention(*qkv, None, True, 0.3, 7), (q, k, v))


def test_additive_mask_is_refused_with_the_remedy() -> None:
    q, k, v = random_qkv(1, 1, 3, 4)
    with pytest.raises(TypeError, match=r"must be boolean.*`mask < 0`"):
        attention(q, k, v, torch.zeros(3, 3))
