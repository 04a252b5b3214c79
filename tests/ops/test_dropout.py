import pytest
import torch

import fastllm
from fastllm.ops.dropout import draw_seed, dropout, dropout_ref, keep_mask, philox
from tests.conftest import LAYOUTS, assert_same_bits, bits, poisoned_memory

SIZES = [1, 5, 63, 64, 65, 1000, 64 * 16 + 1]


def test_philox_known_answers() -> None:
    """The known answers that the generator's authors published (Random123) for a zero key."""
    words = [int(word) for word in philox(torch.zeros((), dtype=torch.int64), seed=0, stream=0)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_every_instruction_set_draws_the_mask_of_the_reference(
    isa: str, size: int, p: float
) -> None:
    x = torch.randn(size)
    with fastllm.use("cpu"), poisoned_memory():
        out = dropout(x, p, seed=2**62 + 12345, stream=7)
    assert torch.equal(out, dropout_ref(x, p, seed=2**62 + 12345, stream=7))


def test_the_gradient_uses_the_mask_of_the_forward(isa: str) -> None:
    x = torch.randn(3, 50, requires_grad=True)
    grad = torch.randn(3, 50)
    with fastllm.use("cpu"):
        dropout(x, 0.3, seed=5).backward(grad)
    assert x.grad is not None
    assert torch.equal(x.grad, dropout_ref(grad, 0.3, seed=5, stream=0))


def test_second_derivative() -> None:
    x = torch.randn(20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: dropout(x, 0.5, seed=1).pow(3), x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_matter(isa: str, layout: str) -> None:
    x = torch.randn(7, 9)
    with fastllm.use("cpu"), poisoned_memory():
        out = dropout(LAYOUTS[layout](x), 0.4, seed=3)
    assert torch.equal(out, dropout_ref(x, 0.4, seed=3, stream=0))


def test_same_bits(isa: str, threads: None) -> None:
    assert_same_bits(bits(lambda x: dropout(x, 0.2, seed=9), torch.randn(20_003)))


def test_seed_stream_and_probability_tell_masks_apart() -> None:
    shape = torch.Size([4096])
    masks = {
        (seed, stream): keep_mask(shape, 0.5, seed, stream, "cpu")
        for seed in (0, 1, 2**40)
        for stream in (0, 1)
    }
    keys = list(masks)
    for i, first in enumerate(keys):
        for second in keys[i + 1 :]:
            agreement = (masks[first] == masks[second]).double().mean().item()
            assert abs(agreement - 0.5) < 0.05, (first, second)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_drops_the_fraction_asked_for_and_keeps_the_mean(p: float) -> None:
    x = torch.ones(1_000_000)
    out = dropout(x, p, seed=11)
    sigma = (p * (1 - p) / len(x)) ** 0.5
    assert abs((out == 0).double().mean().item() - p) < 5 * sigma
    taken = round(p * 65536) / 65536
    assert torch.allclose(out[out != 0], torch.tensor(1 / (1 - taken)))


def test_manual_seed_governs_the_seeds() -> None:
    torch.manual_seed(1)
    first = [draw_seed() for _ in range(3)]
    torch.manual_seed(1)
    assert [draw_seed() for _ in range(3)] == first
    assert len(set(first)) == 3


def test_edges() -> None:
    x = torch.randn(10)
    assert dropout(x, 0, seed=1) is x
    assert torch.equal(dropout(x, 1, seed=1), torch.zeros(10))
    assert dropout(torch.empty(0, 3), 0.5, seed=1).shape == (0, 3)
    for p in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            dropout(x, p, seed=1)


def test_not_a_number_and_infinity_pass_through(isa: str) -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0] * 50)
    out, expected = dropout(x, 0.5, seed=4), dropout_ref(x, 0.5, seed=4, stream=0)
    assert torch.equal(out.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert out.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_take_the_reference(dtype: torch.dtype) -> None:
    out = dropout(torch.ones(1000, dtype=dtype), 0.25, seed=6)
    assert out.dtype == dtype
    assert torch.equal(out != 0, keep_mask(out.shape, 0.25, 6, 0, "cpu"))


def test_under_vmap_and_torch_func() -> None:
    x = torch.randn(4, 8)
    grads = torch.func.grad(lambda x: dropout(x, 0.5, seed=8).sum())(x)
    assert torch.equal(grads, dropout_ref(torch.ones(4, 8), 0.5, seed=8, stream=0))
    out = torch.func.vmap(lambda row: dropout(row, 0.5, seed=8))(x)
    assert torch.equal(out[1], dropout_ref(x[1], 0.5, seed=8, stream=0))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # PyTorch itself uses it
def test_forward_mode() -> None:
    x, tangent = torch.randn(4, 8), torch.randn(4, 8)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        out = torch.autograd.forward_ad.unpack_dual(dropout(dual, 0.5, seed=8)).tangent
    assert torch.equal(out, dropout_ref(tangent, 0.5, seed=8, stream=0))
