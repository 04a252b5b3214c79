"""Continuing prompts with a trained model."""

from fastllm.generation.decoding import generate_batch, generate_tokens
from fastllm.generation.text_stream import TextStream, generate_text

__all__ = ["TextStream", "generate_batch", "generate_text", "generate_tokens"]
