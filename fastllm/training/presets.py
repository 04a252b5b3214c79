"""Settings that suit each other: what `train --preset` stands for."""

from collections.abc import Collection
from typing import Any, Literal, NamedTuple

PresetName = Literal["tiny", "small", "medium", "demo"]


class Preset(NamedTuple):
    """A size of model, and a run that suits it.

    Attributes:
        expect: parameters and time, for people.
        settings: values of settings, which flags override.
    """

    expect: str
    settings: dict[str, Any]


# Subwords: words are spelt well long before a model of characters spells them. A batch has 2,048
# tokens in all presets; they need 1,000 steps until a megabyte of text has been read five times.
_SUBWORDS = {
    "tokenizer": "bpe",
    "tie_word_embeddings": True,
    "lr_schedule": "cosine",
    "warmup_steps": 100,
    "optimizer": "adamw",
    "weight_decay": 0.1,
    "beta2": 0.99,
    "dropout": 0.0,
    "eval_interval": 250,
    "precision": "auto",
}
_TINY = {
    "vocab_size": 512, "max_seq_len": 64, "hidden_size": 64, "num_layers": 2, "num_heads": 2,
    "batch_size": 32, "max_steps": 500, "lr": 5e-3,
}  # fmt: skip
_SMALL = {
    "vocab_size": 2048, "max_seq_len": 64, "hidden_size": 128, "num_layers": 4, "num_heads": 4,
    "batch_size": 32, "max_steps": 1000, "lr": 3e-3,
}  # fmt: skip
_MEDIUM = {
    "vocab_size": 4096, "max_seq_len": 256, "hidden_size": 384, "num_layers": 6, "num_heads": 6,
    "batch_size": 8, "max_steps": 5000, "lr": 1e-3,
}  # fmt: skip
# Times from the CPU time of a step in fp32, with AVX-512.
PRESETS: dict[str, Preset] = {
    "tiny": Preset("0.1 million parameters, 10 seconds on two cores", {**_SUBWORDS, **_TINY}),
    "small": Preset("1 million parameters, a minute on two cores", {**_SUBWORDS, **_SMALL}),
    "medium": Preset(
        "12 million parameters, 40 minutes on two cores, less on more", {**_SUBWORDS, **_MEDIUM}
    ),
    "demo": Preset(
        "0.1 million parameters, a few seconds", {**_SUBWORDS, **_TINY, "max_steps": 200}
    ),
}
DEFAULT_PRESET: PresetName = "small"
# Who gives one of these chooses the run by hand, from the defaults of the flags.
BY_HAND = frozenset(
    """
    tokenizer vocab_size max_seq_len overlap epochs max_steps log_interval device
    hidden_size num_layers num_heads num_kv_heads head_dim mlp_intermediate_size dropout norm
    norm_first pos_encoding rope_base activation mlp qk_norm window tie_word_embeddings lm_head_bias
    batch_size grad_accum lr lr_schedule warmup_steps min_lr optimizer muon_lr weight_decay beta1
    beta2 max_grad_norm launcher parallel
    """.split()
)


def is_by_hand(given: Collection[str]) -> bool:
    """Whether the settings that were given choose a run without a preset."""
    return "preset" in given or not BY_HAND.isdisjoint(given)
