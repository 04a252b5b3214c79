"""fastllm: small language models trained, fine-tuned and run fast on the machine at hand."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastllm.version import __version__

if TYPE_CHECKING:
    from fastllm.integrations.any_model import load_model
    from fastllm.models.config import DecoderConfig
    from fastllm.public import *
    from fastllm.training.saved_model import save_model

__all__ = [
    "MLP",
    "DecoderConfig",
    "DecoderModel",
    "EmbeddingLayer",
    "MultiHeadAttention",
    "PositionalEncoding",
    "SimpleCharacterTokenizer",
    "TextDataset",
    "TransformerBlock",
    "__version__",
    "create_dataloader",
    "implementations",
    "load_model",
    "optim",
    "save_model",
    "use",
]

# These check settings, with a library that the rest does not need.
CHECKING_SETTINGS = {
    "DecoderConfig": "fastllm.models.config",
    "load_model": "fastllm.integrations.any_model",
    "save_model": "fastllm.training.saved_model",
}


def __getattr__(name: str) -> Any:
    """Imports what is used, when it is used: a command's help needs no PyTorch."""
    if name in CHECKING_SETTINGS:
        return getattr(import_module(CHECKING_SETTINGS[name]), name)
    public = import_module("fastllm.public")
    globals().update({each: getattr(public, each) for each in public.__all__})
    if name not in globals():
        raise AttributeError(f"module 'fastllm' has no attribute {name!r}")
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
