"""Models as ONNX files."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fastllm import DecoderModel
from fastllm.integrations import onnx as module
from fastllm.integrations.onnx import check_onnx, onnx_logits, save_onnx
from tests.integrations.samples import assert_close, logits, random_ids

for name in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(name, reason=f"{name} is not installed: pip install '.[test]'")


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "pre": {"mlp_activation": "gelu_tanh", "padding_idx": 12},
    "post": {"norm_first": False, "mlp_activation": "leaky_relu", "tie_word_embeddings": True},
    "learned": {"pos_encoding_learned": True, "mlp_activation": "relu"},
    "post-learned": {"norm_first": False, "pos_encoding_learned": True, "mlp_activation": "silu"},
}


@pytest.mark.parametrize("settings", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_onnx_of_any_batch_and_length(tmp_path: Path, settings: dict[str, Any]) -> None:
    from onnx import checker

    torch.manual_seed(0)
    model = DecoderModel(13, 12, 1, 3, 9, **settings)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) / 4
    save_onnx(model, tmp_path / "model.onnx")
    checker.check_model(tmp_path / "model.onnx", full_check=True)
    assert model.training  # as it was
    model.eval()
    for shape in ((1, 1), (1, 9), (3, 2), (2, 9), (5, 1), (12, 7)):
        ids = random_ids(model, *shape)
        assert_close(onnx_logits(tmp_path / "model.onnx", ids), logits(model, ids), 1e-4)


def test_onnx_holds_less_than_2_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    model = DecoderModel(100, 8, 1, 1, 4, tie_word_embeddings=True)
    size = sum(p.nbytes for p in model.parameters())
    monkeypatch.setattr(module, "LARGEST_FILE", size + 1)
    check_onnx(model)
    monkeypatch.setattr(module, "LARGEST_FILE", size)
    with pytest.raises(ValueError, match="an ONNX file holds less than 2 GiB"):
        check_onnx(model)
