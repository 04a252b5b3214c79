"""fastllm: small language models trained, fine-tuned and run fast on the machine at hand."""

from fastllm import optim
from fastllm.core.attn.mha import MultiHeadAttention
from fastllm.core.embedding import EmbeddingLayer
from fastllm.core.mlp import MLP
from fastllm.core.positional_encoding import PositionalEncoding
from fastllm.core.transformer_block import TransformerBlock
from fastllm.data.loader import TextDataset, create_dataloader
from fastllm.models.decoder import DecoderModel
from fastllm.ops import implementations
from fastllm.ops.dispatch import use
from fastllm.tokenization.simple_tokenizer import SimpleCharacterTokenizer
from fastllm.version import __version__

__all__ = [
    "MLP",
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
    "optim",
    "use",
]
