"""Models trained in code of one's own: saved, loaded, generated from, evaluated and exported."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastllm
from fastllm import (
    DecoderConfig,
    DecoderModel,
    SimpleCharacterTokenizer,
    TextDataset,
    create_dataloader,
)
from fastllm.generation import generate_text
from fastllm.optim import AdamW
from fastllm.tokenization import SubwordTokenizer
from fastllm.training.checkpoint import CheckpointError
from tests.commands import run_command


def trained(text: Path, **settings: Any) -> tuple[DecoderModel, SimpleCharacterTokenizer]:
    """By the loop of the README."""
    torch.manual_seed(0)
    tokenizer = SimpleCharacterTokenizer([text.read_text()])
    dataset = TextDataset(str(text), tokenizer, max_seq_len=32)
    sizes = {"vocab_size": tokenizer.vocab_size, "num_layers": 1, "num_heads": 2}
    sizes |= {"hidden_size": 16, "max_seq_len": 32}
    if "norm_order" in settings:
        model = DecoderModel.from_config(DecoderConfig(**sizes, **settings))
    else:
        model = DecoderModel(**sizes, **settings)
    optimizer = AdamW(model.parameters(), lr=1e-2, max_grad_norm=1.0)
    for batch in create_dataloader(dataset, batch_size=16):
        model.loss(batch["input_ids"], batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, tokenizer


SETTINGS: list[dict[str, Any]] = [
    {},
    {"pos_encoding_learned": True, "norm_first": False, "mlp_activation": "relu"},
    {"tie_word_embeddings": True, "mlp_intermediate_size": 24, "qkv_bias": False},
    {"lm_head_bias": False, "mlp_bias": False, "norm_eps": 1e-3, "scale_embeddings": False},
    {
        "norm_order": "sandwich",
        "norm": "rms",
        "norm_offset": 1.0,
        "num_kv_heads": 1,
        "pos_encoding": "rope",
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "mlp": "swiglu",
        "qk_norm": "weight",
        "window": 5,
        "window_pattern": (True, False),
        "separate_qkv": True,
        "tie_word_embeddings": True,
    },
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(settings) or "plain")
def test_a_model_of_the_readmes_loop_is_a_model_for_the_commands(
    text: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    model, tokenizer = trained(text, **settings)
    folder = tmp_path / "models" / "mine"
    fastllm.save_model(model, tokenizer, folder)
    loaded, same = fastllm.load_model(folder)
    assert same.fingerprint == tokenizer.fingerprint and not loaded.training
    ids = torch.tensor([tokenizer.encode("the quick brown")])
    with torch.no_grad():
        assert torch.equal(loaded(ids), model.eval()(ids))
    expected = "the" + "".join(generate_text(loaded, tokenizer, "the", 50, seed=3, temperature=0.8))
    flags = ("--checkpoint", str(folder), "--threads", "1")
    result = run_command("generate", *flags, *"--prompt the --max_new_tokens 50 --seed 3".split())
    assert result.stdout == expected + "\n", result.stderr
    result = run_command("evaluate", *flags, "--file_path", str(text), "--json")
    assert 0 < json.loads(result.stdout)["loss"] < 4, result.stderr


def test_a_saved_model_is_served_and_exported(text: Path, tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="pip install '.[serve]' brings the server")
    from fastapi.testclient import TestClient

    from fastllm.integrations.any_model import load_trained_model
    from fastllm.serving.app import create_app
    from fastllm.serving.model import prepare_served_model

    fastllm.save_model(*trained(text), tmp_path / "mine")
    saved = load_trained_model(tmp_path / "mine")
    served, model = prepare_served_model(saved, "cpu", "fp32", None)
    app = create_app(served, model, 2, 2)
    try:
        with TestClient(app, base_url="http://127.0.0.1") as client:
            body = {"prompt": "the", "max_tokens": 40, "temperature": 0, "echo": True}
            answer = client.post("/v1/completions", json=body).json()
            card = client.get("/api/card").json()
            curve = client.get("/api/curve").json()
    finally:
        app.state.service.scheduler.close()
    expected = "the" + "".join(generate_text(model, served.tokenizer, "the", 40, temperature=0))
    assert answer["choices"][0]["text"] == expected and answer["model"] == "mine"
    assert card["settings"]["num_heads"] == 2 and card["settings"]["hidden_size"] == 16
    assert curve["points"] == []
    result = run_command("export", "--checkpoint", str(tmp_path / "mine"), "--format", "hf")
    assert result.returncode == 0, result.stderr
    assert "## Model settings" in (tmp_path / "mine/hf/README.md").read_text()


def test_padding_of_the_tokenizer_is_never_generated(text: Path, tmp_path: Path) -> None:
    model, tokenizer = trained(text)
    assert model.padding_idx is None
    model.lm_head.bias.data[tokenizer.pad_token_id] = 100
    fastllm.save_model(model, tokenizer, tmp_path / "mine")
    loaded, _ = fastllm.load_model(tmp_path / "mine")
    assert "<PAD>" not in "".join(generate_text(loaded, tokenizer, "the", 50))
    assert "<PAD>" in "".join(generate_text(model.eval(), tokenizer, "the", 5))


def test_saving_again_replaces_only_a_saved_model(text: Path, tmp_path: Path) -> None:
    model, tokenizer = trained(text)
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    for bias in (1.0, 2.0):
        model.lm_head.bias.data[0] = bias
        fastllm.save_model(model, tokenizer, folder)
        assert fastllm.load_model(folder)[0].lm_head.bias[0] == bias
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "model.safetensors", "notes.txt", "tokenizer.json",
    ]  # fmt: skip
    for name in ("config.json", "model.safetensors", "tokenizer.json", "checkpoints"):
        (tmp_path / f"other-{name}").mkdir()
        (tmp_path / f"other-{name}" / name).write_text("{}")
        with pytest.raises(ValueError, match=f"holds the {name} of another model; choose another"):
            fastllm.save_model(model, tokenizer, tmp_path / f"other-{name}")
        assert [path.name for path in (tmp_path / f"other-{name}").iterdir()] == [name]


def test_models_that_could_not_be_built_again_are_refused(text: Path, tmp_path: Path) -> None:
    class Adapter(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

    class Own(DecoderModel):
        pass

    model, tokenizer = trained(text)
    size = tokenizer.vocab_size
    mlp = model.transformer_blocks[0].mlp
    mlp.fc1 = Adapter(mlp.fc1)
    wrong = [
        (model, tokenizer, r"'transformer_blocks.0.mlp.fc1' is Adapter"),
        (Own(size, 16, 1, 2), tokenizer, "the model is Own"),
        (DecoderModel(size, 16, 1, 2, mlp_activation=nn.Tanh()), tokenizer, "with a name"),
        (DecoderModel(size - 1, 16, 1, 2), tokenizer, "the tokenizer that the model was trained"),
    ]
    for each, its_tokenizer, message in wrong:
        with pytest.raises(ValueError, match=message):
            fastllm.save_model(each, its_tokenizer, tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_runs_load_and_damaged_folders_do_not(
    text: Path, tmp_path: Path, make_trainer: Any
) -> None:
    trainer = make_trainer("run", "--max_steps", "1")
    trainer.train()
    model, tokenizer = fastllm.load_model(trainer.run_dir)
    fastllm.save_model(model, tokenizer, tmp_path / "mine")
    again, _ = fastllm.load_model(str(tmp_path / "mine"))
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    config = tmp_path / "mine/config.json"
    for change in ({"num_layers": 2}, {"num_heads": 3}, {"other": 1}, {"vocab_size": "many"}):
        settings = {**model.settings, **change}
        config.write_text(json.dumps({"model": settings}))
        with pytest.raises(CheckpointError):
            fastllm.load_model(tmp_path / "mine")
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        fastllm.load_model(tmp_path / "nowhere")


def test_subword_tokenizers_are_saved_too(text: Path, tmp_path: Path) -> None:
    tokenizer = SubwordTokenizer.train([text.read_text()], "bpe", 300)
    model = DecoderModel(320, 16, 1, 2, 32)  # with a few rows to spare
    fastllm.save_model(model, tokenizer, tmp_path / "mine")
    assert fastllm.load_model(tmp_path / "mine")[1].fingerprint == tokenizer.fingerprint
