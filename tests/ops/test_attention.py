import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

import fastllm
from fastllm.ops.attention import attention
from fastllm.ops.dropout import keep_mask
from tests.conftest import (
    BAD,
    LAYOUTS,
    MASKS,
    assert_parity,
    assert_same_bits,
    bits,
    named_sizes,
    shape_name,
    with_others_fixed,
)


def random_qkv(B: int, N: int, S: int, D: int, dtype: torch.dtype = torch.float32) -> list:
    generator = torch.Generator().manual_seed(B * 1000 + N * 100 + S * 10 + D)
    return [torch.randn(B, N, S, D, generator=generator).to(dtype) for _ in range(3)]


def test_by_hand() -> None:
    """Two positions, one head of one element: every number can be checked by hand."""
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
    # Every row begins with its own group of 64 random numbers.
    keep = keep_mask(torch.Size([1, 1, 5, 64]), 0.5, 42, 0, "cpu")[..., :5]
    weights = (q @ k.mT / math.sqrt(5)).softmax(-1)
    expected = torch.where(keep, weights * 2, 0) @ v
    assert torch.allclose(attention(q, k, v, dropout_p=0.5, seed=42), expected, atol=1e-6)


# B, N, S, D
SHAPES = [
    (1, 1, 1, 8),
    (1, 2, 1, 128),
    (2, 1, 2, 16),
    (1, 2, 2, 96),
    (1, 3, 7, 32),
    (2, 1, 7, 5),
    (1, 2, 31, 64),
    (1, 1, 31, 20),
    (1, 2, 63, 64),
    (2, 1, 63, 80),
    (1, 2, 64, 16),
    (1, 1, 64, 96),
    (2, 2, 65, 8),
    (1, 1, 65, 128),
    (1, 2, 130, 32),
    (1, 1, 130, 80),
    (1, 2, 257, 64),
    (1, 1, 257, 8),
]


@pytest.mark.parametrize("shape", SHAPES, ids=shape_name("BNSD"))
@pytest.mark.parametrize("is_causal", [False, True], ids=["open", "causal"])
def test_parity(isa: str, shape: tuple[int, int, int, int], is_causal: bool) -> None:
    qkv = random_qkv(*shape)
    B, N, S, _ = shape
    mask = torch.rand(B, N, S, S, generator=torch.Generator().manual_seed(S)) < 0.3
    for some_mask, p in ((None, 0.0), (None, 0.25), (mask, 0.1)):
        assert_parity(
            lambda *t, mask=some_mask, p=p: attention(*t, mask, is_causal, p, 2**62 + 1), *qkv
        )


@pytest.mark.parametrize("shape", MASKS)
@pytest.mark.parametrize(
    "sizes", [(2, 3, 7, 7), (2, 3, 66, 66), (2, 3, 5, 70)], ids=shape_name("BNST")
)
def test_parity_of_masks(isa: str, shape: str, sizes: tuple[int, int, int, int]) -> None:
    """Every broadcastable shape; each letter stands for a size."""
    B, N, S, T = sizes
    generator = torch.Generator().manual_seed(S)
    mask = torch.rand(named_sizes(shape, B=B, N=N, S=S, T=T), generator=generator) < 0.4
    q = torch.randn(B, N, S, 16, generator=generator)
    k, v = torch.randn(2, B, N, T, 16, generator=generator)
    for is_causal in (False, True):
        assert_parity(lambda *t, causal=is_causal: attention(*t, mask, causal, 0.2, 5), q, k, v)


def test_parity_of_masks_of_any_layout(isa: str) -> None:
    qkv = random_qkv(2, 3, 37, 16)
    mask = torch.rand(2, 3, 37, 74, generator=torch.Generator().manual_seed(0)) < 0.4
    for some_mask in (
        mask[..., ::2],
        mask[..., 37:],
        mask[..., :37].mT,
        mask[:1, :, :, :37].expand(2, 3, 37, 37),
        mask[..., :37].transpose(0, 1).contiguous().transpose(0, 1),
    ):
        assert_parity(lambda *t, mask=some_mask: attention(*t, mask, True, 0.2, 5), *qkv)


@pytest.mark.parametrize("S", [1, 2, 9, 65])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_parity_of_fully_masked_rows(isa: str, S: int, p: float) -> None:
    qkv = random_qkv(2, 2, S, 24)
    masked = torch.ones(2, 1, S, S, dtype=torch.bool)
    all_but_one = masked.clone()
    all_but_one[0, 0, S // 2, 0] = False
    ahead = masked[0].triu()  # causality then masks all the rest
    for mask, is_causal in ((masked, False), (all_but_one, False), (ahead, True), (masked, True)):

        def run(*t: Tensor, mask: Tensor = mask, causal: bool = is_causal) -> Tensor:
            return attention(*t, mask, causal, p, 5)

        assert_parity(run, *qkv)
        with fastllm.use("cpu"):
            out = run(*qkv)
        seen = ~mask & (masked.tril() if is_causal else masked)
        nothing = ~seen.any(-1).expand(2, 2, S)
        assert nothing.any() and torch.equal(out[nothing], torch.zeros_like(out[nothing]))


@pytest.mark.parametrize("S", [1, 5, 64])
@pytest.mark.parametrize("T", [64, 70, 130])
def test_parity_of_queries_at_the_end_of_more_keys(isa: str, S: int, T: int) -> None:
    q, k, v = random_qkv(2, 2, T, 32)
    assert_parity(lambda *t: attention(*t, None, True, 0.1, 9), q[:, :, T - S :], k, v)
    assert_parity(lambda *t: attention(*t), q[:, :, T - S :], k, v)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("D", [20, 64])
def test_parity_of_any_layout(isa: str, layout: str, D: int) -> None:
    inputs = [LAYOUTS[layout](tensor) for tensor in random_qkv(2, 3, 19, D)]
    assert_parity(lambda *t: attention(*t, None, True, 0.2, 5), *inputs)
    assert_parity(lambda *t: attention(*t).mT, *inputs)  # also of the incoming gradient
    # As a projection returns them: q, k and v of each head are adjacent.
    side_by_side = torch.stack(random_qkv(2, 3, 19, D), 2).permute(0, 3, 2, 1, 4).contiguous()
    assert_parity(lambda x: attention(*x.permute(2, 0, 3, 1, 4), None, True, 0.2, 5), side_by_side)


@pytest.mark.parametrize("S", [9, 65])
@pytest.mark.parametrize("is_causal", [False, True], ids=["open", "causal"])
def test_parity_of_large_scores(isa: str, S: int, is_causal: bool) -> None:
    """Scores beyond 1e4. All products are exact, so only the softmax can differ."""
    q, k, v = random_qkv(1, 2, S, 16)
    q, k = (q * 500).round(), (k * 20).round()
    q[:, :, ::3] /= 2**13  # some rows have weights other than 0 and 1
    scores = q @ k.mT / 4
    assert scores.max() > 1e4 and scores.min() < -1e4
    assert_parity(lambda *t: attention(*t, None, is_causal, 0.1, 3), q, k, v)


@pytest.mark.parametrize("scale", [1e4, 1e-30])
def test_extreme_logits(isa: str, scale: float) -> None:
    q, k, v = random_qkv(1, 2, 9, 8)
    with fastllm.use("cpu"):
        out = attention(q * scale, k, v, is_causal=True)
    expected = attention((q * scale).double(), k.double(), v.double(), is_causal=True)
    assert out.isfinite().all()
    assert torch.allclose(out.double(), expected, atol=1e-4)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("which", range(3), ids=["q", "k", "v"])
@pytest.mark.parametrize("S", [7, 64])
def test_not_a_number_and_infinity_as_in_the_reference(
    isa: str, bad: float, which: int, S: int
) -> None:
    qkv = random_qkv(1, 2, S, 16)
    qkv[which][0, 1, 3, 5] = bad
    for p in (0.0, 0.2):
        assert_parity(
            lambda *t, p=p: attention(*t, None, False, p, 5), *qkv, kinds_of_gradients=False
        )


@pytest.mark.parametrize("wanted", range(3), ids=["q", "k", "v"])
def test_one_gradient_alone(isa: str, wanted: int) -> None:
    qkv = random_qkv(1, 2, 19, 16)
    run = with_others_fixed(lambda *t: attention(*t, None, True, 0.2, 5), qkv, wanted)
    assert_parity(run, qkv[wanted])


@pytest.mark.parametrize("shape", [(1, 3, 33, 16), (5, 1, 9, 20)], ids=shape_name("BNSD"))
def test_same_bits(isa: str, threads: None, shape: tuple[int, int, int, int]) -> None:
    assert_same_bits(bits(lambda *t: attention(*t, None, True, 0.2, 5), *random_qkv(*shape)))


def test_gradients() -> None:
    q, k, v = (x.requires_grad_() for x in random_qkv(1, 2, 4, 3, torch.float64))
    assert torch.autograd.gradcheck(lambda *qkv: attention(*qkv, None, True, 0.3, 7), (q, k, v))


def test_additive_mask_is_refused_with_the_remedy() -> None:
    q, k, v = random_qkv(1, 1, 3, 4)
    with pytest.raises(TypeError, match=r"must be boolean.*`mask < 0`"):
        attention(q, k, v, torch.zeros(3, 3))


def test_nan_with_any_payload_propagates(isa: str) -> None:
    q, k, v = random_qkv(1, 1, 5, 8)
    for payload in (-1, 0x7F800001, 0x7FC00001):
        bad = k.clone()
        bad[0, 0, 2, 0] = torch.tensor(payload, dtype=torch.int32).view(torch.float32)
        with fastllm.use("cpu"):
            out = attention(q, bad, v)
        assert out.isnan().all()


def test_a_dropout_probability_out_of_range_is_refused() -> None:
    q, k, v = random_qkv(1, 1, 5, 8)
    for p in (-0.1, 1.5):
        with pytest.raises(ValueError, match="between 0 and 1"):
            attention(q, k, v, dropout_p=p)
