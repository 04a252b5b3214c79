"""Parts of a fine-tuning run that need no training."""

import pytest
from torch import nn

from fastllm.finetuning.config import FinetuneConfig
from fastllm.finetuning.run import resolve, run_name

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from fastllm.finetuning.model import choose_task, modules_without_weights  # noqa: E402


def test_resolving_makes_a_second_record() -> None:
    config = FinetuneConfig(model="gpt2", dataset=["a.txt"], precision="auto")
    resolved = resolve(config, transformers.GPT2Config(n_embd=16))
    assert (resolved.task, resolved.precision) == ("causal", "fp32")
    assert (config.task, config.precision) == (None, "auto")
    assert resolved.to_json().count('"task": "causal"') == 1


def test_the_architecture_determines_the_task() -> None:
    assert choose_task(transformers.BertConfig(), None) == "mlm"
    assert choose_task(transformers.BertConfig(is_decoder=True), None) == "causal"
    with pytest.raises(ValueError, match="t5 has an encoder and a decoder"):
        choose_task(transformers.T5Config(), None)
    with pytest.raises(ValueError, match="vit is not a language model"):
        choose_task(transformers.ViTConfig(), None)


def test_modules_without_weights_are_the_outermost() -> None:
    model = nn.ModuleDict(
        {"body": nn.Linear(2, 2), "head": nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))}
    )
    head = {"head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias"}
    assert modules_without_weights(model, head | {"body.bias"}) == {"head"}
    assert modules_without_weights(model, head - {"head.1.bias"}) == {"head.0"}


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("runs/minilm/model", "minilm"),
        ("org/name", "name"),
        ("a/tiny.gguf", "tiny"),
        ("a/small/config.json", "small"),
    ],
)
def test_run_names(model: str, name: str) -> None:
    assert run_name(model) == name
