"""The formats that `python -m fastllm.export` writes: for transformers, ONNX and llama.cpp."""

import json
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from fastllm.flags import Format, Quantization
from fastllm.integrations.gguf import find_architecture, save_gguf
from fastllm.integrations.gguf_tokenizer import gguf_vocabulary
from fastllm.integrations.hf_tokenizer import (
    CONFIG_FILE,
    begin_and_end,
    save_hf_tokenizer,
    tokenizer_json,
)
from fastllm.integrations.onnx import check_onnx, onnx_logits, save_onnx
from fastllm.models.config import DecoderConfig
from fastllm.models.decoder import DecoderModel, check_as_built
from fastllm.models.gpt2 import convert_to_gpt2
from fastllm.models.huggingface import write_settings
from fastllm.tokenization import Tokenizer

PACKAGES: dict[Format, list[str]] = {
    "hf": ["tokenizers"],
    "onnx": ["tokenizers", "onnx", "onnxscript", "onnxruntime"],
    "gguf": ["tokenizers", "gguf"],
}
GENERATION_FILE = "generation_config.json"
FILES: dict[Format, list[str]] = {
    "hf": ["config.json", GENERATION_FILE, "model.safetensors", "tokenizer.json", CONFIG_FILE],
    "onnx": ["model.onnx", "tokenizer.json", CONFIG_FILE],
    "gguf": ["model.gguf"],
}
LONGEST_CHECK = 256  # tokens; the logits of longer sequences may not fit into memory


class ExportError(Exception):
    """The written files do not compute what the model computes."""


def check_packages(format: Format) -> None:
    """Raises an `ImportError` that names the missing packages and how to install them."""
    missing = [name for name in PACKAGES[format] if find_spec(name) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} missing: pip install '.[export]'")


def expressible(model: DecoderModel) -> DecoderModel:
    """The model itself if Hugging Face has its architecture, otherwise an equal one that it has.

    Raises:
        ValueError: there is none; the message gives the reason.
    """
    try:
        write_settings(model.config)
    except ValueError:
        if model.config.pos_encoding in ("learned", "sinusoidal"):
            return convert_to_gpt2(model)
        return _with_plain_embeddings(model)
    check_as_built(model)
    return model


@torch.no_grad()
def _with_plain_embeddings(model: DecoderModel) -> DecoderModel:
    """An equal model whose embeddings are not scaled, with one projection for queries, keys and
    values, or with three.

    Raises:
        ValueError: Hugging Face does not have that one either.
    """
    check_as_built(model)
    config, scale = model.config, model.config.embedding_scale
    for separate in (config.separate_qkv, True):
        plain = DecoderConfig(
            **{**config.model_dump(), "embedding_scale": 1.0, "separate_qkv": separate}
        )
        try:
            write_settings(plain)
            break
        except ValueError as error:
            reason = error
    else:
        raise reason
    rows = [config.head_dim * n for n in (config.num_heads, *[config.num_kv_heads] * 2)]
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("embedding_layer."):
            tensor = tensor * scale
        elif name.startswith("final_norm.") and config.tie_word_embeddings:
            tensor = tensor / scale
        if "qkv_proj" in name and separate:
            for part, each in zip("qkv", tensor.split(rows), strict=True):
                state[name.replace("qkv_proj", f"{part}_proj")] = each
        elif not (name == "lm_head.weight" and config.tie_word_embeddings):
            state[name] = tensor
    result = DecoderModel.from_config(plain, dtype=model.lm_head.weight.dtype)
    result.load_state_dict(state)
    return result.train(model.training)


def check_expressible(model: DecoderModel, tokenizer: Tokenizer, format: Format) -> None:
    """Raises a `ValueError` with the reason if the format cannot express the model."""
    if format == "onnx":
        check_onnx(model)
    elif format == "hf":
        expressible(model)
    else:
        find_architecture(expressible(model).config)
        gguf_vocabulary(tokenizer, model.vocab_size)
        return
    tokenizer_json(tokenizer)


def write_model(
    model: DecoderModel,
    tokenizer: Tokenizer,
    format: Format,
    folder: Path,
    name: str,
    quantization: Quantization | None = None,
) -> float:
    """Writes the format's `FILES` and returns the largest difference of a logit.

    The logits are those of the written files on random tokens.

    Raises:
        ExportError: a logit differs by more than rounding, without a quantization.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(model.max_seq_len, LONGEST_CHECK)
    ids = torch.randint(model.vocab_size, (2, length), generator=generator)
    if format == "onnx":
        save_onnx(model, folder / "model.onnx")
        theirs = onnx_logits(folder / "model.onnx", ids)
    elif format == "hf":
        save_hf_model(model, tokenizer, folder)
        theirs = _logits(DecoderModel.from_pretrained(folder).eval(), ids)
    else:
        file = folder / "model.gguf"
        save_gguf(expressible(model), tokenizer, file, name, quantization)
        theirs = _logits(DecoderModel.from_pretrained(file).eval(), ids)
    if format != "gguf":
        save_hf_tokenizer(tokenizer, folder, model.max_seq_len)
    ours = _logits(model, ids)
    difference = (ours - theirs).abs().max().item()
    scale = max(1.0, ours.abs().max().item())
    if not quantization and not difference <= 1e-4 * scale:  # NaN fails too
        raise ExportError(
            "the written files do not compute what this model does: a logit differs by "
            f"{difference:.3g}. Please report this, with the run's config.json"
        )
    return difference


def save_hf_model(model: DecoderModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a model for transformers, with the tokens that begin and end its texts."""
    begin, end = begin_and_end(tokenizer)
    tokens = {
        "bos_token_id": begin,
        "eos_token_id": end if len(end) > 1 else end[0],
        "pad_token_id": tokenizer.pad_token_id,
    }
    expressible(model).save_pretrained(folder, **tokens)
    text = json.dumps(tokens, indent=2) + "\n"
    (folder / GENERATION_FILE).write_text(text, encoding="utf-8")


@torch.no_grad()
def _logits(model: DecoderModel, ids: Tensor) -> Tensor:
    return model(ids)
