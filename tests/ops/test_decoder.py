"""The records: what the kernels refuse, and that names, not positions, tell tensors apart."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllm import DecoderModel
from fastllm.ops import extension
from fastllm.ops.decoder import Decoder, Linear, Mlp, MultiHeadAttention, Norm
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
        "norm": k.Norm(weight=0, bias=0, eps=1e-5),
        "norm_first": True,
        "fc1": linear,
        "fc2": linear,
        "activation": 0,
        "hidden_dropout": dropout,
        "out_dropout": dropout,
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
        extension.kernels.MlpGrad(None, None, None)


def linear(outputs: int, inputs: int) -> Linear:
    return Linear(torch.zeros(outputs, inputs), torch.zeros(outputs))


H, I = 8, 20
NORM = Norm(torch.zeros(H), torch.zeros(H), 1e-5)
ATTENTION = MultiHeadAttention(linear(3 * H, H), linear(H, H), 2, NORM)
MLP = Mlp(linear(I, H), linear(H, I), norm=NORM)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (ATTENTION._replace(qkv=ATTENTION.out, out=ATTENTION.qkv), r"qkv has a weight \[8, 8\]"),
        (ATTENTION._replace(out=linear(H, H + 1)), r"out has a weight \[8, 9\].*need \[8, 8\]"),
        (ATTENTION._replace(heads=3), "width 8 is not divisible by the 3 heads"),
        (ATTENTION._replace(norm=Norm(torch.zeros(1), NORM.bias, 1e-5)), "attention's norm"),
        (MLP._replace(fc1=MLP.fc2, fc2=MLP.fc1), r"fc1 has a weight \[8, 20\]"),
        (MLP._replace(fc2=Linear(MLP.fc2.weight, torch.zeros(1))), r"fc2 .* and bias \[1\]"),
        (MLP._replace(norm=Norm(NORM.weight, torch.zeros(H, 1), 1e-5)), "MLP's norm"),
    ],
)
def test_sizes_that_do_not_fit_are_named(record: Any, reason: str) -> None:
    assert ATTENTION.why_not_sizes(H) is None and MLP.why_not_sizes(H) is None
    assert re.search(reason, record.why_not_sizes(H))


def test_parameters_go_back_to_their_places() -> None:
    model = DecoderModel(11, H, 2, 2, 12, I)
    decoder = model.record(12)
    assert isinstance(decoder, Decoder)
    parameters = decoder.parameters()
    again = decoder.with_parameters(iter(parameters))
    assert [*map(id, again.parameters())] == [*map(id, parameters)]
    assert again.layers[1].mlp.fc2.bias is model.transformer_blocks[1].mlp.fc2.bias
    assert (
        again.layers[0].attention.out.weight
        is model.transformer_blocks[0].self_attn.out_proj.weight
    )
    assert again.head.weight is model.lm_head.weight
    # Every parameter of the model is one of the record's; its positions are a view of a buffer.
    assert {id(p) for p in model.parameters()} == {id(p) for p in parameters} - {id(parameters[1])}


def test_gradients_of_another_number_of_layers_are_refused() -> None:
    ids = torch.zeros(64, 12, dtype=torch.long)
    records = []
    for layers in (1, 2):
        decoder = DecoderModel(11, H, layers, 2, 12, I).eval().record(12)
        assert isinstance(decoder, Decoder)
        records.append(decoder)
    with pytest.raises(ValueError, match="another number of layers"):
        extension.kernels.decoder_loss(
            decoder=records[0].to_kernel(64, 12, ids, ids),
            grad=records[1].to_kernel_grad(),
            threads=1,
        )


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
    """Its other half gets no gradient, and costs no memory for one."""
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
