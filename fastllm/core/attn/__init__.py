"""Attention modules."""

from fastllm.core.attn.mha import KeyValueCache, MultiHeadAttention

__all__ = ["KeyValueCache", "MultiHeadAttention"]
