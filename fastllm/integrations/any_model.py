"""A trained model with its tokenizer, from whatever wrote it.

That is `train`, `save_model`, `finetune`, or transformers and everything else that writes its
format.
"""

import os
from pathlib import Path

from fastllm.generation.defaults import read_sampling
from fastllm.integrations.trainer_checkpoints import whole_checkpoints
from fastllm.models.decoder import DecoderModel
from fastllm.models.hub import HUB_NAME, download
from fastllm.models.pretrained import tensor_files
from fastllm.tokenization import Tokenizer
from fastllm.tokenization.pretrained import load_pretrained_tokenizer, read_settings
from fastllm.training.checkpoint import (
    CheckpointError,
    find_checkpoint,
    read_progress,
    run_of,
)
from fastllm.training.checkpoint import load_model as load_checkpoint
from fastllm.training.trained_model import TrainedModel

KINDS = "a run, a checkpoint in it, a folder in Hugging Face's format, or a name on its hub"


def load_trained_model(source: str | os.PathLike[str]) -> TrainedModel:
    """The model that a path or a name stands for.

    Args:
        source: a run of `train` or a checkpoint in it, a folder of `save_model`, a run of
            `finetune` or a folder in it, a folder in Hugging Face's format, or a name on its hub.

    Raises:
        CheckpointError: there is no model, or one of `train` is damaged.
        FileNotFoundError: a file is missing; the message names it.
        ValueError: the model cannot be computed, or a file is damaged.
        ImportError: a package is missing.
    """
    path = Path(source)
    if path.is_file():
        raise CheckpointError(f"{path} is a file; give {KINDS}")
    if not path.exists():
        if not HUB_NAME.fullmatch(str(path)) or (len(path.parts) == 2 and path.parent.exists()):
            raise CheckpointError(f"{path} does not exist; give {KINDS}")
        return _load_pretrained(download(str(path)), str(path))
    folder = _finetuned(path)
    config = folder / "config.json"
    if (folder / "adapter_config.json").exists() and not config.exists():
        raise CheckpointError(
            f"{folder} is a LoRA adapter without its model; give the `model` folder that finetune "
            "writes at the end of a run, or merge the adapter by peft's merge_and_unload"
        )
    if "model_type" in read_settings(config):
        return _load_pretrained(folder)
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
    if run_dir.name == "model" and "fastllm_version" in read_settings(around / "config.json"):
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
