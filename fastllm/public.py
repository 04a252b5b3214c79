"""What `fastllm` offers; its modules need PyTorch."""

import fastllm.optim as optim
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

__all__ = [
    "MLP",
    "DecoderModel",
    "EmbeddingLayer",
    "MultiHeadAttention",
    "PositionalEncoding",
    "SimpleCharacterTokenizer",
    "TextDataset",
    "TransformerBlock",
    "create_dataloader",
    "implementations",
    "optim",
    "use",
]
