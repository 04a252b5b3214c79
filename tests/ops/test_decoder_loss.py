import pytest
import torch
from torch import Tensor

import fastllm
from fastllm import DecoderModel
from fastllm.models import decoder
from tests.conftest import assert_as_accurate, needs_extension


def results(model: DecoderModel, ids: Tensor, implementation: str) -> list[Tensor]:
    torch.manual_seed(3)
    with fastllm.use(implementation):
        loss = model.loss(ids, ids)
    loss.backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    return [loss.detach(), *grads]  # type: ignore[list-item]


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "by-operation"])
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre", "post"])
@pytest.mark.parametrize("learned", [True, False], ids=["learned", "sinusoidal"])
def test_parity_with_dropout(
    isa: str, whole: bool, norm_first: bool, learned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    original = decoder.decoder_loss
    monkeypatch.setattr(decoder, "decoder_loss", lambda *a: taken.append(1) or original(*a))
    if not whole:
        monkeypatch.setattr(decoder, "why_not", lambda *arguments: "by operation")
    torch.manual_seed(0)
    settings = {"pos_encoding_learned": learned, "norm_first": norm_first, "padding_idx": 5}
    model = DecoderModel(66, 48, 2, 3, 40, **settings)
    double = DecoderModel(66, 48, 2, 3, 40, **settings).double()
    double.load_state_dict(model.state_dict())
    ids = torch.randint(0, 66, (8, 33))
    oracle, plain = results(double, ids, "ref"), results(model, ids, "ref")
    actual = results(model, ids, "cpu")
    assert bool(taken) == whole
    names = ["loss", *(name for name, _ in model.named_parameters())]
    for name, a, b, c in zip(names, actual, plain, oracle, strict=True):
        assert_as_accurate(a, b, c, name)


@needs_extension
def test_same_bits_for_any_thread_count(threads: None) -> None:
    torch.manual_seed(0)
    model = DecoderModel(66, 48, 2, 3, 40)
    ids = torch.randint(0, 66, (24, 40))
    runs = []
    for count in (1, 2, 3, 4, 8):
        torch.set_num_threads(count)
        runs.append(results(model, ids, "cpu"))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


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
