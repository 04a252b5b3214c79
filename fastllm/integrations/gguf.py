"""GGUF, the file of llama.cpp: a model of GPT-2's architecture with its tokenizer.

llama.cpp computes any GELU by the tanh approximation, on a CPU from a table of fp16 numbers, and
by default keeps keys and values in fp16.
"""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastllm.integrations import hf_tokenizer
from fastllm.models import gpt2
from fastllm.models.decoder import DecoderModel
from fastllm.tokenization import SimpleCharacterTokenizer, Tokenizer

# The exact one differs from the approximation by 5e-4 at most, less than the table's rounding.
ACTIVATIONS = ("gelu", "gelu_new")

# In a block: GGUF's name of each of our layers.
LAYERS = {
    "norm1": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.out_proj": "attn_output",
    "norm2": "ffn_norm",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}


class Vocabulary(NamedTuple):
    """What llama.cpp's byte-level BPE needs: a text and a kind for each id, and merges in order."""

    tokens: list[str]
    types: Sequence[int]
    merges: list[str]


def check(model: DecoderModel, tokenizer: Tokenizer) -> None:
    """Raises a `ValueError` with the reason where llama.cpp cannot run the model as it is."""
    gpt2.check_gpt2(model, convertible=True)
    activation = gpt2.config_json(model)["activation_function"]
    if activation not in ACTIVATIONS:
        raise ValueError(f"llama.cpp's GPT-2 has no activation but GELU, and this is {activation}")
    vocabulary(tokenizer)


def save(
    model: DecoderModel, tokenizer: Tokenizer, path: str | os.PathLike[str], name: str
) -> None:
    """Writes the model and its tokenizer in fp32.

    Args:
        name: what llama.cpp calls the model.

    Raises:
        ValueError: llama.cpp cannot run the model as it is; the message says why, and nothing was
            written.
        ImportError: gguf is not installed.
    """
    from gguf import GGUFWriter, LlamaFileType

    check(model, tokenizer)
    model = gpt2.convert_to_gpt2(model)
    tokens, types, merges = vocabulary(tokenizer)
    settings, pad = gpt2.config_json(model), tokenizer.pad_token_id
    writer = GGUFWriter(path, "gpt2")
    writer.add_name(name)
    writer.add_file_type(LlamaFileType.ALL_F32)
    writer.add_context_length(settings["n_positions"])
    writer.add_embedding_length(settings["n_embd"])
    writer.add_feed_forward_length(settings["n_inner"])
    writer.add_block_count(settings["n_layer"])
    writer.add_head_count(settings["n_head"])
    writer.add_layer_norm_eps(settings["layer_norm_epsilon"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    # Left out, the first two would be token 11, and end a text with it.
    writer.add_bos_token_id(pad)
    writer.add_eos_token_id(pad)
    writer.add_pad_token_id(pad)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    weights, names = model.state_dict(), tensor_names(settings["n_layer"])
    if model.tie_word_embeddings:
        del weights["lm_head.weight"]
    for ours, tensor in weights.items():
        writer.add_tensor(names[ours], tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensor_names(num_layers: int) -> dict[str, str]:
    """GGUF's name of each of our tensors."""
    names = {
        "embedding_layer.token_embeddings.weight": "token_embd.weight",
        "embedding_layer.positional_encoding.pos_embedding.weight": "position_embd.weight",
        "lm_head.weight": "output.weight",
    }
    layers = {"final_norm": "output_norm"}
    for i in range(num_layers):
        layers |= {f"transformer_blocks.{i}.{o}": f"blk.{i}.{t}" for o, t in LAYERS.items()}
    for ours, theirs in layers.items():
        names |= {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}
    return names


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """The tokenizer as GPT-2's, which gives every text the same ids.

    A character is a token of all its bytes, and its merges join them from the first to the last:
    in UTF-8 no byte that begins a character is inside another, so that nothing else is joined.
    llama.cpp leaves out characters that have no token, where this package raises an error.

    Raises:
        ValueError: llama.cpp has no such tokenizer; the message says why.
        ImportError: the tokenizers library is not installed.
    """
    if isinstance(tokenizer, SimpleCharacterTokenizer):
        hf_tokenizer.check_characters(tokenizer)
        return _of_characters(tokenizer)
    return _of_subwords(
        hf_tokenizer.describe(tokenizer), tokenizer.vocab_size, tokenizer.pad_token_id
    )


def _of_characters(tokenizer: SimpleCharacterTokenizer) -> Vocabulary:
    from gguf import TokenType
    from tokenizers.pre_tokenizers import ByteLevel

    as_bytes = ByteLevel(add_prefix_space=False, use_regex=False)
    *chars, pad = tokenizer.chars
    spelt = [as_bytes.pre_tokenize_str(char)[0][0] for char in chars]
    merges = {
        f"{token[:end]} {token[end]}": None for token in spelt for end in range(1, len(token))
    }
    # llama.cpp wants a merge; this one never happens, since nothing makes its parts.
    return Vocabulary(
        [*spelt, pad],
        [TokenType.NORMAL] * len(chars) + [TokenType.CONTROL],
        [*merges] or [f"{pad} {pad}"],
    )


def _of_subwords(data: dict[str, Any], vocab_size: int, pad_token_id: int) -> Vocabulary:
    from gguf import TokenType

    reason = _why_not_gpt2(data)
    if reason is not None:
        raise ValueError(f"llama.cpp cannot tokenise as this tokenizer does: {reason}")
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
    """Why a tokenizer.json is not one of GPT-2's kind, byte-level BPE."""
    model, words = data["model"], data["pre_tokenizer"]
    if model["type"] == "WordPiece":
        return "WordPiece is there for BERT, in lower case"
    if model["type"] != "BPE":
        return f"a {model['type']} tokenizer has no counterpart there"
    if words is None or words["type"] != "ByteLevel" or not words.get("use_regex", True):
        return "it does not split text into words as GPT-2 does"
    if words["add_prefix_space"]:
        return "it puts a space before every text"
    if data["normalizer"] is not None:
        return "it changes a text before it looks for tokens"
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(option):
            return f"GPT-2's BPE has no {option}"
    for token in data["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            return f"the token {token['content']!r} depends on the white space around it"
    return None
