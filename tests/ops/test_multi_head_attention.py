import pytest
import torch
from torch import Tensor

from fastllm.ops.attention import attention
from fastllm.ops.multi_head_attention import Settings, multi_head_attention
from fastllm.ops.parameters import Linear, Norm
from tests.conftest import assert_parity

SHAPES = [(1, 2, 2, 8), (2, 3, 7, 16), (2, 2, 65, 32), (1, 1, 130, 80)]  # B, N, S, D


def name(shape: tuple[int, ...]) -> str:
    return "B{}-N{}-S{}-D{}".format(*shape)


@pytest.mark.parametrize("shape", SHAPES, ids=name)
@pytest.mark.parametrize("is_causal", [False, True], ids=["open", "causal"])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_parity(isa: str, shape: tuple[int, int, int, int], is_causal: bool, p: float) -> None:
    torch.manual_seed(2)
    B, N, S, D = shape
    H = N * D
    x, qkv, out = torch.randn(B, S, H), torch.randn(3 * H, H), torch.randn(H, H)
    qkv, out = qkv / H**0.5, out / H**0.5
    vectors = torch.randn(3 * H), torch.randn(H), torch.randn(H), torch.randn(H)
    mask = torch.rand(B, 1, S, S) < 0.3
    for norm_first in (True, False):
        settings = Settings(N, mask, is_causal, p, 3, p, 5, norm_first)

        def run(
            x: Tensor, qkv: Tensor, out: Tensor, b1: Tensor, b2: Tensor, w: Tensor, b: Tensor,
            settings: Settings = settings,
        ) -> Tensor:  # fmt: skip
            norm = Norm(w, b, 1e-5)
            return multi_head_attention(x, Linear(qkv, b1), Linear(out, b2), settings, norm)

        assert_parity(run, x, qkv, out, *vectors)
    plain = Settings(N, None, is_causal, p, 3, p, 5)
    assert_parity(
        lambda x, qkv, out: multi_head_attention(x, Linear(qkv, None), Linear(out, None), plain),
        *(x, qkv, out),
    )


@pytest.mark.parametrize("shape", [*SHAPES, (1, 1, 1, 8), (1, 2, 257, 64)], ids=name)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_parity_of_the_core(isa: str, shape: tuple[int, int, int, int], p: float) -> None:
    torch.manual_seed(3)
    B, N, S, D = shape
    q, k, v = torch.randn(3, B, S, N, D).transpose(2, 3)  # not contiguous
    for is_causal in (False, True):
        for mask in (None, torch.rand(S) < 0.5, torch.rand(B, N, S, S) < 0.3):
            assert_parity(
                lambda q, k, v, mask=mask, causal=is_causal: attention(q, k, v, mask, causal, p, 1),
                *(q, k, v),
            )


def test_queries_at_the_end_of_more_keys(isa: str) -> None:
    torch.manual_seed(4)
    q, k, v = torch.randn(2, 1, 5, 64), torch.randn(2, 1, 9, 64), torch.randn(2, 1, 9, 64)
    assert_parity(lambda q, k, v: attention(q, k, v, None, True, 0.1, 9), q, k, v)


def test_same_bits_for_any_thread_count(isa: str, threads: None) -> None:
    torch.manual_seed(5)
    x = torch.randn(5, 33, 48, requires_grad=True)
    qkv, out = Linear(torch.randn(144, 48) / 7, None), Linear(torch.randn(48, 48) / 7, None)
    settings = Settings(3, None, True, 0.1, 1, 0.1, 2)
    results = []
    for count in (1, 2, 3, 4, 8):
        torch.set_num_threads(count)
        y = multi_head_attention(x, qkv, out, settings)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
