"""The formats that `python -m fastllm.export` writes: for transformers, ONNX and llama.cpp."""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from fastllm.flags import Format
from fastllm.integrations.gguf import check_gguf, save_gguf
from fastllm.integrations.hf_tokenizer import CONFIG_FILE, save_hf_tokenizer, tokenizer_json
from fastllm.integrations.onnx import check_onnx, onnx_logits, save_onnx
from fastllm.models.decoder import DecoderModel
from fastllm.models.gpt2 import check_gpt2, convert_to_gpt2
from fastllm.tokenization import Tokenizer

PACKAGES: dict[Format, list[str]] = {
    "hf": ["tokenizers"],
    "onnx": ["tokenizers", "onnx", "onnxscript", "onnxruntime"],
    "gguf": ["tokenizers", "gguf"],
}
FILES: dict[Format, list[str]] = {
    "hf": ["config.json", "model.safetensors", "tokenizer.json", CONFIG_FILE],
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


def check_expressible(model: DecoderModel, tokenizer: Tokenizer, format: Format) -> None:
    """Raises a `ValueError` with the reason if the format cannot express the model."""
    if format == "gguf":
        check_gguf(model, tokenizer)
        return
    if format == "hf":
        check_gpt2(model, convertible=True)
    else:
        check_onnx(model)
    tokenizer_json(tokenizer)


def write_model(
    model: DecoderModel, tokenizer: Tokenizer, format: Format, folder: Path, name: str
) -> float:
    """Writes the format's `FILES` and returns the largest difference of a logit.

    The logits are those of the written files on random tokens, except that for GGUF the converted
    weights are run by fastllm.

    Raises:
        ExportError: a logit differs by more than rounding.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(model.max_seq_len, LONGEST_CHECK)
    ids = torch.randint(model.vocab_size, (2, length), generator=generator)
    if format == "onnx":
        save_onnx(model, folder / "model.onnx")
        theirs = onnx_logits(folder / "model.onnx", ids)
    elif format == "hf":
        convert_to_gpt2(model).save_gpt2(folder)
        theirs = _logits(DecoderModel.from_gpt2(folder).eval(), ids)
    else:
        save_gguf(model, tokenizer, folder / "model.gguf", name)
        theirs = _logits(convert_to_gpt2(model), ids)
    if format != "gguf":
        save_hf_tokenizer(tokenizer, folder, model.max_seq_len)
    return _largest_difference(_logits(model, ids), theirs)


@torch.no_grad()
def _logits(model: DecoderModel, ids: Tensor) -> Tensor:
    return model(ids)


def _largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """Raises an `ExportError` if the difference is more than 1e-4 of the scale."""
    difference = (ours - theirs).abs().max().item()
    scale = max(1.0, ours.abs().max().item())
    if not difference <= 1e-4 * scale:  # NaN fails too
        raise ExportError(
            "the written files do not compute what this model does: a logit differs by "
            f"{difference:.3g}. Please report this, with the run's config.json"
        )
    return difference
