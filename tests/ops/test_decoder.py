"""The records: the kernels' checks, and tensors identified by name rather than position."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllm import DecoderModel
from fastllm.ops import extension
from fastllm.ops.decoder import Decoder, Linear, Mlp, MultiHeadAttention, Norm, Rope
from fastllm.ops.memory import address
from tests.conftest import needs_extension

pytestmark = needs_extension


def mlp_fields() -> dict[str, Any]:
    k = extension.kernels
    linear = k.Linear(weight=0, bias=0, transposed=False)
    dropout = k.Dropout(p=0.0, seed=0)
    return {
        "rows": 1,
        "H": 4,
        "I": 8,
        "norm": k.Norm(kind=1, weight=0, bias=0, eps=1e-5, offset=0.0),
        "norm_first": True,
        "fc1": linear,
        "up": None,
        "fc2": linear,
        "activation": 0,
        "hidden_dropout": dropout,
        "out_dropout": dropout,
        "out_norm": None,
        "residual_scale": 1.0,
        "precision": 0,
    }


@pytest.mark.parametrize("field", ["rows", "norm", "norm_first", "fc2", "out_dropout", "precision"])
def test_a_missing_field_of_a_kernel_record_is_named(field: str) -> None:
    fields = mlp_fields()
    extension.kernels.Mlp(**fields)
    del fields[field]
    with pytest.raises(TypeError, match=rf"(?s)supported:.*\b{field}: .*Invoked with"):
        extension.kernels.Mlp(**fields)


@pytest.mark.parametrize(
    ("field", "other"),
    [("fc1", "norm"), ("norm", "fc2"), ("hidden_dropout", "fc1"), ("rows", "norm"), ("H", "fc1")],
)
def test_a_field_of_the_wrong_kind_is_named(field: str, other: str) -> None:
    fields = mlp_fields()
    with pytest.raises(TypeError, match=rf"(?s)supported:.*\b{field}: .*Invoked with:.*{field}="):
        extension.kernels.Mlp(**fields | {field: fields[other]})


def test_fields_have_no_order_to_confuse() -> None:
    with pytest.raises(TypeError, match="incompatible"):
        extension.kernels.Linear(0, 0, False)
    with pytest.raises(TypeError, match="incompatible"):
        extension.kernels.NormGrad(0, 0)


def linear(outputs: int, inputs: int) -> Linear:
    return Linear(torch.zeros(outputs, inputs), torch.zeros(outputs))


H, I = 8, 20
NORM = Norm(torch.zeros(H), torch.zeros(H), 1e-5)
ATTENTION = MultiHeadAttention(linear(3 * H, H), linear(H, H), 2, NORM)
SHARED = MultiHeadAttention(
    qkv=(linear(12, H), linear(6, H), linear(6, H)),
    out=linear(H, 12),
    heads=4,
    norm=NORM,
    causal=True,
    kv_heads=2,
    rope=Rope(torch.zeros(10, 2)),
    q_norm=Norm(torch.zeros(3), None, 1e-5, "rms"),
    k_norm=Norm(None, None, 1e-5, "rms"),
    window=5,
    out_norm=NORM,
)
MLP = Mlp(linear(I, H), linear(H, I), norm=NORM)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (ATTENTION._replace(qkv=ATTENTION.out, out=ATTENTION.qkv), r"out has a weight \[24, 8\]"),
        (ATTENTION._replace(out=linear(H, H + 1)), "out's width 9 is not divisible by the 2 heads"),
        (ATTENTION._replace(heads=3), "width 8 is not divisible by the 3 heads"),
        (ATTENTION._replace(kv_heads=1), r"need \[16, 8\]"),
        (SHARED._replace(kv_heads=3), "4 heads cannot share 3 heads"),
        (SHARED._replace(qkv=(*SHARED.projections[:2], linear(12, H))), r"^v has .*need \[6, 8\]"),
        (SHARED._replace(q_norm=NORM), "norm of queries or keys does not have the width 3"),
        (SHARED._replace(out_norm=SHARED.q_norm), "attention's norm"),
        (SHARED._replace(causal=False), "a window must be positive, and the attention causal"),
        (SHARED._replace(window=0), "a window must be positive"),
        (SHARED._replace(rope=Rope(torch.zeros(9, 2))), r"table is \[9, 2\] for 10 positions"),
        (SHARED._replace(rope=Rope(torch.zeros(10, 4))), "heads of 3"),
        (ATTENTION._replace(norm=Norm(torch.zeros(1), NORM.bias, 1e-5)), "attention's norm"),
        (MLP._replace(fc1=MLP.fc2, fc2=MLP.fc1), r"fc1 has a weight \[8, 20\]"),
        (MLP._replace(fc2=Linear(MLP.fc2.weight, torch.zeros(1))), r"fc2 .* and bias \[1\]"),
        (MLP._replace(norm=Norm(NORM.weight, torch.zeros(H, 1), 1e-5)), "MLP's norm"),
    ],
)
def test_sizes_that_do_not_fit_are_named(record: Any, reason: str) -> None:
    def why_not(record: Any) -> str | None:
        return record.why_not_sizes(*((H,) if isinstance(record, Mlp) else (10, H)))

    assert [*map(why_not, (ATTENTION, SHARED, MLP))] == [None] * 3
    assert re.search(reason, why_not(record) or "")


@pytest.mark.parametrize("record", [ATTENTION, SHARED, MLP, MLP._replace(norm=None)])
def test_parameters_go_back_to_their_places(record: Any) -> None:
    parameters = record.parameters()
    assert record.with_parameters(iter(parameters)) is not record
    again = record.with_parameters(iter(parameters))
    assert [*map(id, again.parameters())] == [*map(id, parameters)]
    assert again[2:3] == record[2:3] and again[4:] == record[4:]


def test_gradients_are_matched_to_parameters_by_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients do not depend on the order in which the record lists its parameters."""
    torch.manual_seed(0)
    model = DecoderModel(11, H, 2, 2, 12, I, tie_word_embeddings=True, lm_head_bias=False).eval()
    ids = torch.randint(0, 11, (64, 12))

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(model.loss(ids, ids), list(model.parameters())))

    expected, original = gradients(), Decoder.parameters
    monkeypatch.setattr(Decoder, "parameters", lambda decoder: original(decoder)[::-1])
    assert all(map(torch.equal, gradients(), expected))


def test_a_gradient_of_a_foreign_tensor_is_refused() -> None:
    decoder = DecoderModel(11, H, 1, 2, 12, I).record(12)
    assert isinstance(decoder, Decoder)
    ids = torch.zeros(64, 12, dtype=torch.long)
    k = extension.kernels
    fields = {"B": 64, "S": 12, "ids": ids.data_ptr(), "labels": ids.data_ptr(), "mask": None}
    dropouts = [k.Dropout(p=0.0, seed=0)] * 5
    batch = k.Batch(**fields, ignore_index=-100, dropouts=dropouts, precision=0)
    few = k.Batch(**fields, ignore_index=-100, dropouts=dropouts[1:], precision=0)
    arguments = {"decoder": decoder.to_kernel(), "threads": 1}
    assert k.decoder_loss(**arguments, batch=batch, parameters=[], grads=None) > 0
    with pytest.raises(ValueError, match="a tensor that the decoder does not have"):
        k.decoder_loss(**arguments, batch=batch, parameters=[ids.data_ptr()], grads=[0])
    with pytest.raises(ValueError, match="fewer dropouts than the decoder"):
        k.decoder_loss(**arguments, batch=few, parameters=[], grads=None)


def test_records_of_a_model_are_made_once() -> None:
    model, other = DecoderModel(11, H, 1, 2, 12, I), DecoderModel(11, H, 1, 2, 12, I)

    def kernel(model: DecoderModel) -> Any:
        decoder = model.record(12)
        assert isinstance(decoder, Decoder)
        return decoder.to_kernel_once([*map(address, decoder.parameters())])

    first = kernel(model)
    assert kernel(model) is first
    assert kernel(other) is not first
    model.transformer_blocks[0].norm1.eps = 0.5
    assert kernel(model) is not first


@pytest.mark.parametrize(
    "pick",
    [
        lambda m: m.transformer_blocks[1].norm1.weight,
        lambda m: m.transformer_blocks[0].norm2.bias,
        lambda m: m.final_norm.bias,
        lambda m: m.final_norm.weight,
    ],
)
def test_half_a_norm_can_be_trained(pick: Callable[[DecoderModel], Tensor]) -> None:
    """The other half gets no gradient and no memory for one."""
    torch.manual_seed(0)
    model = DecoderModel(11, H, 2, 2, 12, I).eval()
    ids = torch.randint(0, 11, (64, 12))
    model.loss(ids, ids).backward()
    expected = pick(model).grad
    model.zero_grad()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is pick(model))
    model.loss(ids, ids).backward()
    assert torch.equal(pick(model).grad, expected)
    assert sum(p.grad is not None for p in model.parameters()) == 1
