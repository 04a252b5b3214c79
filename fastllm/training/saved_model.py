"""A model and its tokenizer in a folder that generate, evaluate, serve and export can read."""

import json
import os
from pathlib import Path

from safetensors.torch import save_file

from fastllm.files import writing_aside
from fastllm.models.decoder import DecoderModel, check_as_built
from fastllm.tokenization import Tokenizer
from fastllm.training.checkpoint import read_saved_settings
from fastllm.version import __version__

FILES = ("config.json", "tokenizer.json", "model.safetensors")


def save_model(model: DecoderModel, tokenizer: Tokenizer, folder: str | os.PathLike[str]) -> None:
    """Saves a model that was trained in code of your own, for the commands and `load_model`.

    A model without `padding_idx` gets the tokenizer's padding, which will never be generated.

    Args:
        model: weights are saved in their own type, and loaded as float32.
        folder: is made; an earlier saved model in it is replaced, other files in it stay.

    Raises:
        ValueError: the model has replaced or added modules, its vocabulary is smaller than the
            tokenizer's, or the folder holds another model.
    """
    folder = Path(folder)
    settings = {**model.settings, "padding_idx": model.padding_idx}
    if model.padding_idx is None:
        settings["padding_idx"] = tokenizer.pad_token_id
    check_as_built(model)
    if model.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"the model has {model.vocab_size} tokens and the tokenizer {tokenizer.vocab_size}; "
            "save the tokenizer that the model was trained with"
        )
    taken = [name for name in (*FILES, "checkpoints") if (folder / name).exists()]
    if taken and read_saved_settings(folder) is None:
        raise ValueError(f"{folder} holds the {taken[0]} of another model; choose another folder")
    weights = {name: each.detach().cpu().contiguous() for name, each in model.state_dict().items()}
    if model.tie_word_embeddings:  # safetensors refuses shared memory
        del weights["lm_head.weight"]
    special = {"start": list(tokenizer.start_tokens), "end": sorted(tokenizer.end_tokens)}
    config = {"fastllm_version": __version__, "model": settings, "special_tokens": special}
    with writing_aside(folder) as aside:
        (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tokenizer.save(aside / "tokenizer.json")
        save_file(weights, aside / "model.safetensors")
