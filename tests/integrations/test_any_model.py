"""Models of every kind by their path, and paths without a model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import fastllm
from fastllm import DecoderModel, SimpleCharacterTokenizer
from fastllm.integrations import any_model
from fastllm.integrations.any_model import load_trained_model
from fastllm.models import hub
from fastllm.training.checkpoint import CheckpointError
from tests.commands import run_command
from tests.conftest import MakeTrainer
from tests.hf_models import MODELS, save_hf_model

pytest.importorskip("transformers", reason="pip install '.[finetune]' brings transformers")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    save_hf_model(folder, "llama")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return shutil.copytree(saved, tmp_path / "small")


def test_a_run_and_its_checkpoints(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("book", "--max_steps", "3", "--save_interval", "1")
    trainer.train()
    for source in (trainer.run_dir, *(trainer.run_dir / "checkpoints").iterdir()):
        trained = load_trained_model(source)
        assert (trained.name, trained.run_dir) == ("book", trainer.run_dir)
        assert trained.progress is not None and trained.progress.step == 3
        assert trained.settings is not None and trained.settings.max_steps == 3
        assert not trained.sampling and not trained.tokenizer.end_tokens


def test_a_folder_in_hugging_faces_format(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generation = {"do_sample": True, "temperature": 0.6, "top_k": 20, "eos_token_id": [5, 6]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    for source in (folder, str(folder)):
        trained = load_trained_model(source)
        assert (trained.name, trained.folder, trained.run_dir) == ("small", folder, folder)
        assert trained.weights == folder / "model.safetensors"
        assert trained.sampling == {"temperature": 0.6, "top_k": 20}
        assert trained.tokenizer.end_tokens == {5, 6}
        assert trained.settings is None and trained.progress is None
    monkeypatch.chdir(folder)
    assert load_trained_model(".").name == "small"
    model, tokenizer = fastllm.load_model(folder)
    assert not model.training and tokenizer.fingerprint == trained.tokenizer.fingerprint


def test_a_name_on_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(any_model, "download", lambda name: asked.append(name) or folder)
    monkeypatch.chdir(folder)
    for name in ("owner/model-135M", "gpt2"):
        assert load_trained_model(name).name == load_trained_model(Path(name)).name == name
    assert asked == ["owner/model-135M"] * 2 + ["gpt2"] * 2


def test_a_run_of_finetune(folder: Path, tmp_path: Path) -> None:
    """Its model, or the newest checkpoint if the run has not ended yet."""
    run = tmp_path / "tuned"
    for step in (2, 10):
        place = shutil.copytree(folder, run / f"checkpoints/checkpoint-{step}")
        (place / "trainer_state.json").write_text("{}")
    (run / "checkpoints/checkpoint-20").mkdir()  # not complete
    (run / "config.json").write_text('{"fastllm_version": "1", "model": "gpt2"}')
    trained = load_trained_model(run)
    assert trained.folder == run / "checkpoints/checkpoint-10"
    assert (trained.name, trained.run_dir) == ("tuned", run)
    shutil.copytree(folder, run / "model")
    for source in (run, run / "model"):
        trained = load_trained_model(source)
        assert (trained.name, trained.run_dir) == ("tuned", run)
        assert trained.folder == run / "model"
    assert load_trained_model(run / "checkpoints/checkpoint-2").run_dir == run


def test_sharded_weights(folder: Path) -> None:
    import transformers

    whole = load_trained_model(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    theirs.save_pretrained(folder, max_shard_size="20kB")
    parts = load_trained_model(folder)
    assert parts.weights.exists() and parts.weights.name.startswith("model-00001-of-")
    states = (each.model.state_dict().values() for each in (whole, parts))
    assert all(map(torch.equal, *states))


@pytest.mark.parametrize("kind", MODELS)
def test_a_gguf_file(kind: str, tmp_path: Path) -> None:
    """It computes and tokenizes as the folder that it was made from."""
    pytest.importorskip("gguf", reason="pip install '.[export]' brings gguf")
    save_hf_model(tmp_path / "small", kind)
    file = tmp_path / "other.gguf"
    flags = ("--checkpoint", str(tmp_path / "small"), "--format", "gguf", "--out", str(file))
    result = run_command("export", *flags)
    assert result.returncode == 0, result.stderr
    whole, trained = load_trained_model(tmp_path / "small"), load_trained_model(file)
    assert (trained.name, trained.weights, trained.run_dir) == ("other", file, tmp_path)
    text = "What's in a name?"
    for each in (whole, trained):
        each.model.eval()
    ids = [*whole.tokenizer.start_tokens, *whole.tokenizer.encode(text)]
    assert [*trained.tokenizer.start_tokens, *trained.tokenizer.encode(text)] == ids
    assert trained.tokenizer.end_tokens == whole.tokenizer.end_tokens
    expected = whole.model(torch.tensor([ids]))
    assert (trained.model(torch.tensor([ids])) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_gguf_file_of_a_run(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="pip install '.[export]' brings gguf")
    trainer = make_trainer("book", "--max_steps", "1")
    trainer.train()
    run_command("export", "--checkpoint", str(trainer.run_dir), "--format", "gguf")
    model, tokenizer = fastllm.load_model(trainer.run_dir / "gguf/model.gguf")
    assert isinstance(tokenizer, SimpleCharacterTokenizer)
    assert tokenizer.fingerprint == trainer.tokenizer.fingerprint
    assert model.vocab_size == tokenizer.vocab_size


def without(*names: str) -> Any:
    """Removes files of a folder."""

    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return remove


def with_content(name: str, content: str) -> Any:
    """Replaces a file of a folder."""
    return lambda folder: (folder / name).write_text(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("config.json", "model.safetensors"), "small holds no checkpoint"),
        (without("model.safetensors"), "small has neither model.safetensors nor"),
        (without("tokenizer.json"), "small has no tokenizer.json; copy it from"),
        (with_content("config.json", "{"), "config.json is not valid JSON"),
        (with_content("config.json", "[]"), "config.json is damaged: it is not a JSON object"),
        (with_content("config.json", '{"model_type": "bert"}'), r"model_type: .* \(got 'bert'\)"),
        (with_content("model.safetensors", "no"), "model.safetensors cannot be read as"),
        (with_content("generation_config.json", "nonsense"), "generation_config.json is not valid"),
        (
            with_content("generation_config.json", '{"do_sample": true, "top_p": 3}'),
            r"generation_config.json: top_p must be in \(0, 1\], got 3",
        ),
        (
            with_content("generation_config.json", '{"repetition_penalty": "much"}'),
            "generation_config.json: repetition_penalty must be a number, not 'much'",
        ),
    ],
)
def test_a_damaged_folder(folder: Path, change: Any, message: str) -> None:
    change(folder)
    with pytest.raises((CheckpointError, OSError, ValueError), match=message) as caught:
        load_trained_model(folder)
    assert "\n" not in str(caught.value)


def test_a_lora_adapter_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    for config in (None, '{"model_type": "llama"}'):  # some come with that of their model
        if config is not None:
            (tmp_path / "config.json").write_text(config)
        with pytest.raises(CheckpointError, match=r"is a LoRA adapter .* merge_and_unload"):
            load_trained_model(tmp_path)


def test_paths_without_a_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be a name on the hub is not looked for there."""
    monkeypatch.setattr(any_model, "download", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for missing in ("runs/bokk", "../model", "a/b/c", "/nowhere", "~/model", "model.gguf"):
        with pytest.raises(CheckpointError, match=f"{missing} does not exist; give a run"):
            load_trained_model(missing)
    with pytest.raises(CheckpointError, match="config.json is a file; give a run"):
        load_trained_model(folder / "config.json")
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="^gpt3 does not exist; .* needs the package hugg"):
        load_trained_model("gpt3")
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="damaged.gguf is not a GGUF file, or is damaged"):
        load_trained_model("damaged.gguf")
    with pytest.raises(CheckpointError, match="is a folder with damaged.gguf; give that file"):
        load_trained_model(tmp_path)
    # Something else may be called model.
    (tmp_path / "copy").mkdir()
    shutil.copytree(folder, tmp_path / "copy/model")
    for file in folder.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path / "copy")
    assert load_trained_model(tmp_path / "copy").folder == tmp_path / "copy"


def test_what_the_library_saves_can_be_loaded_again(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = fastllm.load_model(folder)
    fastllm.save_model(model, tokenizer, tmp_path / "mine")
    again, same = fastllm.load_model(tmp_path / "mine")
    ids = torch.tensor([tokenizer.encode("a rose")])
    assert isinstance(again, DecoderModel) and torch.equal(again(ids), model(ids))
    assert tokenizer.start_tokens and tokenizer.end_tokens
    for name in ("start_tokens", "end_tokens", "pad_token_id"):
        assert getattr(same, name) == getattr(tokenizer, name)
