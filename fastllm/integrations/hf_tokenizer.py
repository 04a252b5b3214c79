"""Tokenizers in the format of transformers' `AutoTokenizer`: tokenizer.json and its settings."""

import json
from pathlib import Path
from typing import Any

from fastllm.tokenization import SimpleCharacterTokenizer, Tokenizer
from fastllm.tokenization.base import CHARACTER, PAD

CONFIG_FILE = "tokenizer_config.json"


def save_hf_tokenizer(tokenizer: Tokenizer, folder: Path, max_seq_len: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json.

    `AutoTokenizer` then encodes every text to the same ids as this tokenizer, after its
    `start_tokens`, and decodes ids to the same text. The character tokenizer has one exception:
    "<PAD>" alone encodes to five characters there, as it does inside a text. (The tokenizers
    library alone takes it for padding everywhere, unless `encode_special_tokens` is set.)

    Args:
        max_seq_len: the longest text for transformers, in tokens.

    Raises:
        ValueError: the vocabulary has a lone surrogate, which UTF-8 cannot encode.
    """
    data = tokenizer_json(tokenizer)
    names = {token["id"]: token["content"] for token in data["added_tokens"]}
    names |= {id: token for token, id in data["model"]["vocab"].items()}
    begin, end = begin_and_end(tokenizer)
    if tokenizer.start_tokens:
        from tokenizers.processors import TemplateProcessing

        start = [(names[id], id) for id in tokenizer.start_tokens]
        texts = " ".join(name for name, _ in start)
        template = TemplateProcessing(f"{texts} $A", f"{texts} $A $B", start)
        data["post_processor"] = json.loads(template.__getstate__())
    config = {
        # This class uses the file as it is; the model's own class splits text as GPT-2 does.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[begin],
        "eos_token": names[end[0]],
        "pad_token": names[tokenizer.pad_token_id],
        "model_max_length": max_seq_len,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": isinstance(tokenizer, SimpleCharacterTokenizer),
    }
    for name, content in (("tokenizer.json", data), (CONFIG_FILE, config)):
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def begin_and_end(tokenizer: Tokenizer) -> tuple[int, list[int]]:
    """The id that begins a text, and those that end it; models of `train` know only padding."""
    end = sorted(tokenizer.end_tokens) or [tokenizer.pad_token_id]
    return next(iter(tokenizer.start_tokens), end[0]), end


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of the tokenizers library's tokenizer.json; raises like `save_hf_tokenizer`."""
    if isinstance(tokenizer, SimpleCharacterTokenizer):
        check_utf8(tokenizer)
        text = character_tokenizer_json(tokenizer)
    else:
        text = tokenizer.to_json()
    # A post_processor puts special tokens around a text.
    return {**json.loads(text), "post_processor": None}


def check_utf8(tokenizer: SimpleCharacterTokenizer) -> None:
    """Raises a `ValueError` if UTF-8 cannot encode a character of the vocabulary."""
    surrogates = [char for char in tokenizer.chars if "\ud800" <= char <= "\udfff"]
    if surrogates:
        raise ValueError(
            f"the vocabulary has the lone surrogate {surrogates[0]!r}, which UTF-8 cannot encode"
        )


def character_tokenizer_json(tokenizer: SimpleCharacterTokenizer) -> str:
    """The content of the tokenizers library's tokenizer.json for a character tokenizer."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as LibraryTokenizer

    # Without a token for unknown characters, a character without an id raises an error.
    result = LibraryTokenizer(models.WordLevel(tokenizer.stoi))
    result.pre_tokenizer = pre_tokenizers.Split(Regex(CHARACTER), "isolated")
    result.decoder = decoders.Fuse()
    result.add_special_tokens([AddedToken(PAD, special=True, normalized=False)])
    return result.to_str()
