"""Known architectures: for each name, a function from sizes to a `DecoderConfig`.

`vocab_size`, `hidden_size`, `num_layers` and `num_heads` must be given; any other field may be, and
overrides what the architecture sets.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

from fastllm.models.config import DecoderConfig

ArchitectureName = Literal["gpt2", "llama", "qwen3", "gemma3", "nanochat"]


def gpt2(**settings: Any) -> DecoderConfig:
    """Learned positions, layer norms, biases, GELU, tied embeddings (Radford et al. 2019)."""
    own = {
        "pos_encoding": "learned", "mlp": "gelu_tanh",
        "tie_word_embeddings": True, "lm_head_bias": False,
    }  # fmt: skip
    return DecoderConfig(**{**own, **settings})


# What Llama and its descendants share.
_LLAMA = {
    "norm": "rms", "pos_encoding": "rope", "mlp": "swiglu", "separate_qkv": True,
    "qkv_bias": False, "mlp_bias": False, "lm_head_bias": False,
}  # fmt: skip


def llama(**settings: Any) -> DecoderConfig:
    """Rotary positions, RMS norms, SwiGLU, no biases (Touvron et al. 2023)."""
    return DecoderConfig(**{**_LLAMA, **settings})


def qwen2(**settings: Any) -> DecoderConfig:
    """A Llama with biases of queries, keys and values, and a rotary base of a million."""
    own = {"qkv_bias": True, "out_bias": False, "rope_base": 1e6, "norm_eps": 1e-6}
    return DecoderConfig(**{**_LLAMA, **own, **settings})


def qwen3(**settings: Any) -> DecoderConfig:
    """A Llama with norms of queries and keys, and a rotary base of a million."""
    own = {"qk_norm": "weight", "rope_base": 1e6, "norm_eps": 1e-6}
    return DecoderConfig(**{**_LLAMA, **own, **settings})


def gemma2(**settings: Any) -> DecoderConfig:
    """A Llama with GeGLU, norms before and after each sublayer, capped scores and logits, a window
    of 4096 in every second layer, scaled and tied embeddings."""
    own = {
        "mlp": "geglu_tanh", "norm_order": "sandwich", "norm_offset": 1.0, "norm_eps": 1e-6,
        "attn_softcap": 50.0, "head_softcap": 30.0, "window": 4096, "window_pattern": (True, False),
        "tie_word_embeddings": True, "embedding_scale": math.sqrt(settings["hidden_size"]),
    }  # fmt: skip
    return DecoderConfig(**{**_LLAMA, **own, **settings})


def gemma3(**settings: Any) -> DecoderConfig:
    """A Gemma 2 without caps but with norms of queries and keys, five layers with a window of 512
    for each without."""
    own = {
        "attn_softcap": None, "head_softcap": None, "qk_norm": "weight", "window": 512,
        "window_pattern": (True,) * 5 + (False,), "rope_base": 1e6, "local_rope_base": 1e4,
    }  # fmt: skip
    return gemma2(**{**own, **settings})


def olmo2(**settings: Any) -> DecoderConfig:
    """A Llama with norms of the sublayers' outputs only, and of all queries and all keys."""
    own = {"norm_order": "output", "qk_norm": "all_heads"}
    return DecoderConfig(**{**_LLAMA, **own, **settings})


def stablelm(**settings: Any) -> DecoderConfig:
    """A Llama with layer norms, and rotary positions of a quarter of each head."""
    own = {"norm": "layer", "rope_fraction": 0.25, "out_bias": False}
    return DecoderConfig(**{**_LLAMA, **own, **settings})


def gpt_neox(**settings: Any) -> DecoderConfig:
    """Parallel sublayers, rotary positions of a quarter of each head, layer norms, biases."""
    own = {
        "norm_order": "parallel", "pos_encoding": "rope", "rope_fraction": 0.25,
        "lm_head_bias": False,
    }  # fmt: skip
    return DecoderConfig(**{**own, **settings})


def gpt_neo(**settings: Any) -> DecoderConfig:
    """A GPT-2 with scores that are not scaled, and a window of 256 in every second layer."""
    own = {
        "separate_qkv": True, "qkv_bias": False, "out_bias": True, "attn_scale": 1.0, "window": 256,
        "window_pattern": (False, True),
    }  # fmt: skip
    return gpt2(**{**own, **settings})


def nanochat(**settings: Any) -> DecoderConfig:
    """A Llama with ReLU² in place of the gated MLP, norms without weights, also of queries and
    keys, and logits capped at 15. nanochat's norm of the embeddings is left out."""
    own = {"mlp": "relu_squared", "norm_weight": False, "qk_norm": "no_weight", "head_softcap": 15}
    return DecoderConfig(**{**_LLAMA, **own, **settings})


ARCHITECTURES: dict[ArchitectureName, Callable[..., DecoderConfig]] = {
    "gpt2": gpt2,
    "llama": llama,
    "qwen3": qwen3,
    "gemma3": gemma3,
    "nanochat": nanochat,
}
