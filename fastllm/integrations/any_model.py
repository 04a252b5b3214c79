"""A trained model with its tokenizer, from whatever wrote it.

That is `train`, `save_model`, `finetune`, transformers and everything else that writes its format,
or a converter to llama.cpp's.
"""

import json
import os
from pathlib import Path

from fastllm.generation.defaults import read_sampling
from fastllm.integrations.gguf_tokenizer import read_tokenizer
from fastllm.integrations.trainer_checkpoints import whole_checkpoints
from fastllm.models.decoder import DecoderModel
from fastllm.models.gguf_file import GgufFile
from fastllm.models.hub import download, may_be_on_hub
from fastllm.models.pretrained import tensor_files
from fastllm.tokenization import (
    SimpleCharacterTokenizer,
    SubwordTokenizer,
    Tokenizer,
    exported_characters,
)
from fastllm.tokenization.base import SpecialTokens
from fastllm.tokenization.pretrained import load_pretrained_tokenizer, read_json_object
from fastllm.training.checkpoint import (
    CheckpointError,
    find_checkpoint,
    read_progress,
    run_of,
)
from fastllm.training.checkpoint import load_model as load_checkpoint
from fastllm.training.trained_model import TrainedModel

KINDS = (
    "a run, a checkpoint in it, a folder in Hugging Face's format, a name on its hub (which needs "
    "the package huggingface_hub), or a .gguf file"
)


def load_trained_model(source: str | os.PathLike[str]) -> TrainedModel:
    """The model that a path or a name stands for.

    Args:
        source: a run of `train` or a checkpoint in it, a folder of `save_model`, a run of
            `finetune` or a folder in it, a folder in Hugging Face's format, a name on its hub, or
            a GGUF file.

    Raises:
        CheckpointError: there is no model, or one of `train` is damaged.
        FileNotFoundError: a file is missing; the message names it.
        ValueError: the model cannot be computed, or a file is damaged.
        ImportError: a package is missing.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path} is a file; give {KINDS}")
        return _load_gguf(path)
    if not path.exists():
        if not may_be_on_hub(path):
            raise CheckpointError(f"{path} does not exist; give {KINDS}")
        return _load_pretrained(download(str(path)), str(path))
    folder = _finetuned(path)
    has_adapter = (folder / "adapter_config.json").exists()
    if has_adapter and not any(folder.glob("model*.safetensors")):
        raise CheckpointError(
            f"{folder} is a LoRA adapter without its model; give the `model` folder that finetune "
            "writes at the end of a run, or merge the adapter by peft's merge_and_unload"
        )
    if "model_type" in read_json_object(folder / "config.json"):
        return _load_pretrained(folder)
    if not (folder / "config.json").exists() and (files := sorted(folder.glob("*.gguf"))):
        raise CheckpointError(f"{folder} is a folder with {files[0].name}; give that file")
    checkpoint = find_checkpoint(folder)
    model, tokenizer, settings = load_checkpoint(checkpoint)
    run_dir = run_of(checkpoint)
    return TrainedModel(
        run_dir.name,
        model,
        tokenizer,
        checkpoint,
        run_dir,
        checkpoint / "model.safetensors",
        settings,
        read_progress(checkpoint),
    )


def load_model(folder: str | os.PathLike[str]) -> tuple[DecoderModel, Tokenizer]:
    """The model, on the CPU and in evaluation mode, and its tokenizer.

    Args and errors are those of `load_trained_model`.
    """
    trained = load_trained_model(folder)
    return trained.model.eval(), trained.tokenizer


def _finetuned(folder: Path) -> Path:
    """The model that a run of `finetune` has written, else its newest checkpoint; any other folder
    itself."""
    if "model_type" in read_json_object(folder / "config.json"):
        return folder
    whole = whole_checkpoints(folder / "checkpoints")
    if (folder / "model" / "config.json").exists():
        return folder / "model"
    return whole[-1] if whole else folder


def _load_pretrained(folder: Path, name: str = "") -> TrainedModel:
    """The model in a folder in Hugging Face's format."""
    model = DecoderModel.from_pretrained(folder)
    tokenizer = load_pretrained_tokenizer(folder, model.vocab_size)
    run_dir = run_of(folder)
    around = run_dir.parent
    if run_dir.name == "model" and "fastllm_version" in read_json_object(around / "config.json"):
        run_dir = around
    return TrainedModel(
        name or run_dir.name,
        model,
        tokenizer,
        folder,
        run_dir,
        tensor_files(folder)[0],
        sampling=read_sampling(folder),
    )


def _load_gguf(file: Path) -> TrainedModel:
    model = DecoderModel.from_pretrained(file)
    saved = read_tokenizer(GgufFile(file))
    # Only models of `train` have such a vocabulary.
    is_of_characters = type(saved.library.model).__name__ == "WordLevel"
    chars = exported_characters(json.loads(saved.library.to_str())) if is_of_characters else None
    tokenizer: Tokenizer
    if chars is not None:
        tokenizer = SimpleCharacterTokenizer(chars)
        tokenizer.end_tokens = saved.end
    else:
        pad = next(iter(sorted(saved.end)), 0) if saved.pad is None else saved.pad
        special = SpecialTokens(pad, saved.start, saved.end)
        tokenizer = SubwordTokenizer.checked(saved.library, file, special, model.vocab_size)
    return TrainedModel(file.stem, model, tokenizer, file.parent, file.parent, file)
