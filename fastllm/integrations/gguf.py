"""GGUF, llama.cpp's file format: a model of GPT-2's architecture with its tokenizer.

llama.cpp computes every GELU by the tanh approximation, on a CPU from a table of fp16 numbers, and
by default keeps keys and values in fp16.
"""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastllm.integrations.hf_tokenizer import check_utf8, tokenizer_json
from fastllm.models.decoder import DecoderModel
from fastllm.models.gpt2 import (
    ACTIVATIONS,
    check_gpt2,
    config_json,
    convert_to_gpt2,
    tensor_names,
)
from fastllm.tokenization import SimpleCharacterTokenizer, Tokenizer

# GPT-2's names of GELU. The exact GELU is also accepted: it differs from the approximation by 5e-4
# at most, less than the table's rounding.
GELUS = [theirs for theirs, ours in ACTIVATIONS.items() if ours in ("gelu", "gelu_tanh")]

# GGUF's name for each of fastllm's tensors; {i} is the layer, {kind} is weight and bias.
TENSORS = {
    "embedding_layer.token_embeddings.weight": "token_embd.weight",
    "embedding_layer.positional_encoding.pos_embedding.weight": "position_embd.weight",
    "lm_head.weight": "output.weight",
    "final_norm.{kind}": "output_norm.{kind}",
    "transformer_blocks.{i}.norm1.{kind}": "blk.{i}.attn_norm.{kind}",
    "transformer_blocks.{i}.self_attn.qkv_proj.{kind}": "blk.{i}.attn_qkv.{kind}",
    "transformer_blocks.{i}.self_attn.out_proj.{kind}": "blk.{i}.attn_output.{kind}",
    "transformer_blocks.{i}.norm2.{kind}": "blk.{i}.ffn_norm.{kind}",
    "transformer_blocks.{i}.mlp.fc1.{kind}": "blk.{i}.ffn_up.{kind}",
    "transformer_blocks.{i}.mlp.fc2.{kind}": "blk.{i}.ffn_down.{kind}",
}


class Vocabulary(NamedTuple):
    """The tables of llama.cpp's byte-level BPE: each id's text and type, and merges in order."""

    tokens: list[str]
    types: Sequence[int]
    merges: list[str]


def check_gguf(model: DecoderModel, tokenizer: Tokenizer) -> None:
    """Raises a `ValueError` with the reason if llama.cpp cannot run the model as it is."""
    check_gpt2(model, convertible=True)
    activation = config_json(model)["activation_function"]
    if activation not in GELUS:
        raise ValueError(f"llama.cpp's GPT-2 supports only GELU, not {activation}")
    gguf_vocabulary(tokenizer)


def save_gguf(
    model: DecoderModel, tokenizer: Tokenizer, path: str | os.PathLike[str], name: str
) -> None:
    """Writes the model and its tokenizer in fp32.

    Args:
        name: the model's name in llama.cpp.

    Raises:
        ValueError: llama.cpp cannot run the model as it is; the message gives the reason, and
            nothing was written.
        ImportError: gguf is not installed.
    """
    from gguf import GGUFWriter, LlamaFileType

    check_gguf(model, tokenizer)
    model = convert_to_gpt2(model)
    tokens, types, merges = gguf_vocabulary(tokenizer)
    config, pad = config_json(model), tokenizer.pad_token_id
    writer = GGUFWriter(path, "gpt2")
    writer.add_name(name)
    writer.add_file_type(LlamaFileType.ALL_F32)
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(config["n_inner"])
    writer.add_block_count(config["n_layer"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    # Without the first two, llama.cpp takes token 11 for both and ends a text with it.
    writer.add_bos_token_id(pad)
    writer.add_eos_token_id(pad)
    writer.add_pad_token_id(pad)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    weights, names = model.state_dict(), tensor_names(TENSORS, config["n_layer"])
    if model.tie_word_embeddings:
        del weights["lm_head.weight"]
    for ours, tensor in weights.items():
        writer.add_tensor(names[ours], tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """The tokenizer as a byte-level BPE like GPT-2's, which encodes every text to the same ids.

    Each character becomes a token of all its bytes, whose merges join them from first to last. No
    byte that begins a character in UTF-8 occurs inside another one, so nothing else is joined.
    llama.cpp skips characters without a token, for which this package raises an error.

    Raises:
        ValueError: llama.cpp has no such tokenizer; the message gives the reason.
        ImportError: the tokenizers library is not installed.
    """
    if isinstance(tokenizer, SimpleCharacterTokenizer):
        check_utf8(tokenizer)
        return _character_vocabulary(tokenizer)
    return _subword_vocabulary(
        tokenizer_json(tokenizer), tokenizer.vocab_size, tokenizer.pad_token_id
    )


def _character_vocabulary(tokenizer: SimpleCharacterTokenizer) -> Vocabulary:
    from gguf import TokenType
    from tokenizers.pre_tokenizers import ByteLevel

    as_bytes = ByteLevel(add_prefix_space=False, use_regex=False)
    *chars, pad = tokenizer.chars
    spelt = [as_bytes.pre_tokenize_str(char)[0][0] for char in chars]
    merges = {
        f"{token[:end]} {token[end]}": None for token in spelt for end in range(1, len(token))
    }
    # llama.cpp requires a merge; this one never applies, because nothing produces its parts.
    return Vocabulary(
        [*spelt, pad],
        [TokenType.NORMAL] * len(chars) + [TokenType.CONTROL],
        [*merges] or [f"{pad} {pad}"],
    )


def _subword_vocabulary(data: dict[str, Any], vocab_size: int, pad_token_id: int) -> Vocabulary:
    from gguf import TokenType

    reason = _why_not_gpt2(data)
    if reason is not None:
        raise ValueError(f"llama.cpp cannot reproduce this tokenizer: {reason}")
    texts, types = {}, {}
    for token, id in data["model"]["vocab"].items():
        texts[id], types[id] = token, TokenType.NORMAL
    for token in data["added_tokens"]:
        texts[token["id"]] = token["content"]
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    merges = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in data["model"]["merges"]
    ]
    pad = texts[pad_token_id]
    ids = range(vocab_size)
    return Vocabulary(
        [texts.get(id, f"[unused{id}]") for id in ids],
        [types.get(id, TokenType.UNUSED) for id in ids],
        merges or [f"{pad} {pad}"],
    )


def _why_not_gpt2(data: dict[str, Any]) -> str | None:
    """Why a tokenizer.json is not of GPT-2's kind, byte-level BPE, or None."""
    model, words = data["model"], data["pre_tokenizer"]
    if model["type"] == "WordPiece":
        return "it has WordPiece only for BERT, in lower case"
    if model["type"] != "BPE":
        return f"it has no counterpart of a {model['type']} tokenizer"
    if words is None or words["type"] != "ByteLevel" or not words.get("use_regex", True):
        return "the tokenizer does not split text into words as GPT-2 does"
    if words["add_prefix_space"]:
        return "the tokenizer puts a space before every text"
    if data["normalizer"] is not None:
        return "the tokenizer normalizes texts first"
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(option):
            return f"GPT-2's BPE has no {option}"
    for token in data["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            return f"the token {token['content']!r} depends on the surrounding white space"
    return None
