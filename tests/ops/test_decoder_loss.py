import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import fastllm
from fastllm import DecoderModel
from fastllm.models import decoder
from tests.conftest import (
    MASKS,
    assert_as_accurate,
    assert_same_bits,
    factors,
    named_sizes,
    needs_extension,
    poisoned_memory,
    shape_name,
    stacked,
    use_rms_norms,
    use_swiglu,
)

# B, S, N, D, V; at least four groups of sequences with 64 positions
SHAPES = [
    (100, 2, 1, 8, 2),
    (37, 7, 3, 7, 66),
    (13, 31, 2, 16, 17),
    (8, 33, 3, 16, 66),
    (7, 63, 1, 32, 66),
    (5, 64, 2, 20, 66),
    (4, 65, 1, 64, 300),
    (4, 130, 1, 40, 66),
    (13, 16, 1, 96, 4096),
]


def results(model: DecoderModel, implementation: str, *arguments: Any) -> list[Tensor]:
    """The loss and the gradients of all parameters that require one."""
    torch.manual_seed(3)
    wanted = [p for p in model.parameters() if p.requires_grad]
    poison = poisoned_memory() if implementation == "cpu" else nullcontext()
    with fastllm.use(implementation), poison:
        loss = model.loss(*arguments)
        return [loss.detach(), *torch.autograd.grad(loss, wanted)]


def assert_parity(model: DecoderModel, *arguments: Any) -> None:
    """Compares with the reference in float64, on a copy of the model."""
    double = copy.deepcopy(model).double()
    names = ["loss", *(name for name, p in model.named_parameters() if p.requires_grad)]

    def run(network: DecoderModel, implementation: str, factor: float) -> list[Tensor]:
        scaled = copy.deepcopy(network)
        for parameter in scaled.parameters():
            parameter.data *= factor
        return results(scaled, implementation, *arguments)

    kinds = ((model, "cpu"), (model, "ref"), (double, "ref"))
    runs = (stacked([run(*kind, factor) for factor in factors()]) for kind in kinds)
    for name, *three in zip(names, *runs, strict=True):
        assert_as_accurate(*three, name)


@pytest.fixture(params=[True, False], ids=["whole", "by-operation"])
def whole(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Runs the test with this operation and with the ones that it replaces."""
    taken = []
    original = decoder.decoder_loss
    monkeypatch.setattr(decoder, "decoder_loss", lambda *a: taken.append(1) or original(*a))
    if not request.param:
        monkeypatch.setattr(decoder, "why_not", lambda *arguments: "by operation")
    yield request.param
    assert bool(taken) == request.param


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre", "post"])
@pytest.mark.parametrize("learned", [True, False], ids=["learned", "sinusoidal"])
def test_parity_with_dropout(arithmetic: str, whole: bool, norm_first: bool, learned: bool) -> None:
    torch.manual_seed(0)
    settings = {"pos_encoding_learned": learned, "norm_first": norm_first, "padding_idx": 5}
    model = DecoderModel(66, 48, 2, 3, 40, **settings)
    ids = torch.randint(0, 66, (8, 33))
    assert_parity(model, ids, ids)


@pytest.mark.parametrize("replace", [use_rms_norms, use_swiglu])
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre", "post"])
def test_parity_of_blocks_as_in_llama(
    arithmetic: str, whole: bool, norm_first: bool, replace: Callable[[DecoderModel], None]
) -> None:
    torch.manual_seed(0)
    model = DecoderModel(66, 48, 2, 3, 40, norm_first=norm_first)
    replace(model)
    ids = torch.randint(0, 66, (8, 33))
    assert_parity(model, ids, ids)


TIED: dict[str, Any] = {"tie_word_embeddings": True, "lm_head_bias": False, "padding_idx": 5}


@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "unscaled"])
def test_parity_of_tied_models(isa: str, whole: bool, scaled: bool) -> None:
    """The operation sees the weight shared by embeddings and head as two tensors."""
    torch.manual_seed(0)
    model = DecoderModel(66, 48, 2, 3, 40, **TIED, scale_embeddings=scaled)
    ids = torch.randint(0, 66, (8, 33))
    assert_parity(model, ids, ids)


def test_parity_of_tied_models_with_a_large_vocabulary(isa: str) -> None:
    torch.manual_seed(0)
    model = DecoderModel(
        5003, 32, 1, 2, 20, **TIED, scale_embeddings=False, mlp_activation="gelu_tanh"
    )
    ids = torch.randint(0, 5003, (13, 20))
    ids[:, 7] = 5
    assert_parity(model, ids, ids)


@pytest.mark.parametrize("shape", SHAPES, ids=shape_name("BSNDV"))
def test_parity_of_shapes(arithmetic: str, whole: bool, shape: tuple[int, ...]) -> None:
    B, S, N, D, V = shape
    torch.manual_seed(1)
    model = DecoderModel(V, N * D, 1, N, S + 3, 50, True, qkv_bias=False, lm_head_bias=False)
    ids, labels = torch.randint(0, V, (2, B, S))
    labels[:, 1::5] = -100
    assert_parity(model, ids, labels)
    assert_parity(model, ids.t().contiguous().t().int(), labels.repeat(1, 2)[:, :S])


@pytest.mark.parametrize("mask", MASKS)
def test_parity_of_masks(arithmetic: str, whole: bool, mask: str) -> None:
    """Every broadcastable shape; each letter stands for a size."""
    B, N, S = 24, 3, 10
    torch.manual_seed(2)
    model = DecoderModel(20, 24, 1, N, S, 40)
    ids = torch.randint(0, 20, (B, S))
    attn_mask = torch.rand(named_sizes(mask, B=B, N=N, S=S, T=S)) < 0.4
    assert_parity(model, ids, ids, attn_mask)


@pytest.mark.parametrize(
    "trained",
    ["token_embeddings", "blocks.0.self_attn", "blocks.1.mlp.fc2.bias", "final_norm", "lm_head"],
)
def test_parity_where_a_part_is_trained(arithmetic: str, whole: bool, trained: str) -> None:
    torch.manual_seed(3)
    model = DecoderModel(20, 24, 2, 3, 10, 40)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    ids = torch.randint(0, 20, (24, 10))
    assert_parity(model, ids, ids)


def test_parity_where_a_parameter_is_not_a_number(arithmetic: str, whole: bool) -> None:
    torch.manual_seed(4)
    model = DecoderModel(20, 24, 1, 3, 10, 40)
    with torch.no_grad():
        model.lm_head.weight[3, 4] = float("nan")
    ids = torch.randint(0, 20, (24, 10))
    assert_parity(model, ids, ids)


@pytest.mark.parametrize("S", [1, 8])
def test_nothing_to_score_gives_what_pytorch_gives(arithmetic: str, whole: bool, S: int) -> None:
    model = DecoderModel(20, 24, 1, 3, 8, 40)
    ids = torch.randint(0, 20, (4 * 64, S))
    loss, *gradients = results(model, "cpu", ids, torch.full_like(ids, -100))
    assert loss.isnan()
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


def test_same_bits(arithmetic: str, threads: None) -> None:
    torch.manual_seed(0)
    model = DecoderModel(66, 24, 1, 3, 20, 40)
    ids = torch.randint(0, 66, (23, 20))
    assert_same_bits(lambda: results(model, "cpu", ids, ids))


@needs_extension
def test_backwards_of_several_graphs_and_again() -> None:
    """A backward does not reuse the memory of another one's gradients."""
    model = DecoderModel(20, 16, 1, 2, 8)
    ids = torch.randint(0, 20, (8, 8))
    loss = model.loss(ids, ids)
    parameters = list(model.parameters())
    once = [g.clone() for g in torch.autograd.grad(loss, parameters, retain_graph=True)]
    for _ in range(3):
        loss.backward(retain_graph=True)
    for parameter, gradient in zip(parameters, once, strict=True):
        assert torch.allclose(parameter.grad, 3 * gradient)  # type: ignore[arg-type]


@needs_extension
def test_scaled_and_repeated_backwards() -> None:
    model = DecoderModel(20, 16, 1, 2, 8, embedding_dropout_p=0, attn_dropout_p=0, mlp_dropout_p=0)
    ids = torch.randint(0, 20, (4, 8))
    loss = model.loss(ids, ids)
    loss.backward(retain_graph=True)
    once = model.lm_head.weight.grad.clone()  # type: ignore[union-attr]
    (loss * 3).backward()
    assert torch.allclose(model.lm_head.weight.grad, 4 * once)  # type: ignore[arg-type]


@needs_extension
def test_second_derivatives_are_refused_with_the_remedy() -> None:
    model = DecoderModel(20, 16, 1, 2, 8)
    ids = torch.randint(0, 20, (4, 8))
    loss = model.loss(ids, ids)
    with pytest.raises(RuntimeError, match=r'no second derivatives.*fastllm.use\("ref"\)'):
        torch.autograd.grad(loss, model.lm_head.weight, create_graph=True)
