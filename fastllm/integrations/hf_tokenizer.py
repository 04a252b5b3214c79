"""Tokenizers as transformers' `AutoTokenizer` loads them: tokenizer.json and its settings."""

import json
from pathlib import Path
from typing import Any

from fastllm.tokenization import SimpleCharacterTokenizer, Tokenizer
from fastllm.tokenization.base import PAD

CONFIG = "tokenizer_config.json"


def save(tokenizer: Tokenizer, folder: Path, max_seq_len: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json.

    What `AutoTokenizer` makes of them gives every text the ids that this tokenizer gives it, and no
    special tokens around them; ids become the same text. With characters there is one exception:
    "<PAD>" alone is five characters there, as it is inside a text. (The tokenizers library by
    itself takes it for padding everywhere, unless its `encode_special_tokens` is set.)

    Args:
        max_seq_len: what transformers takes for the longest text, in tokens.

    Raises:
        ValueError: a character is half of a surrogate pair, for which JSON has no place.
    """
    data = describe(tokenizer)
    names = {token["id"]: token["content"] for token in data["added_tokens"]}
    names |= {id: token for token, id in data["model"]["vocab"].items()}
    config = {
        # Of the class that takes the file as it is; the model's own would split text as GPT-2 does.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": names[tokenizer.pad_token_id],
        "model_max_length": max_seq_len,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": isinstance(tokenizer, SimpleCharacterTokenizer),
    }
    for name, content in (("tokenizer.json", data), (CONFIG, config)):
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def describe(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of a tokenizer.json of the tokenizers library; raises as `save` does."""
    if isinstance(tokenizer, SimpleCharacterTokenizer):
        check_characters(tokenizer)
        text = _of_characters(tokenizer)
    else:
        text = tokenizer.to_json()
    # It would put special tokens around a text.
    return {**json.loads(text), "post_processor": None}


def check_characters(tokenizer: SimpleCharacterTokenizer) -> None:
    """Raises a `ValueError` where a character is none in UTF-8."""
    halves = [char for char in tokenizer.chars if "\ud800" <= char <= "\udfff"]
    if halves:
        raise ValueError(
            f"the character {halves[0]!r} of the vocabulary is half of a surrogate pair, which is "
            "no character in UTF-8"
        )


def _of_characters(tokenizer: SimpleCharacterTokenizer) -> str:
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as LibraryTokenizer

    # A character that has no id raises an error, since there is no token for unknown ones.
    result = LibraryTokenizer(models.WordLevel(tokenizer.stoi))
    result.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    result.decoder = decoders.Fuse()
    result.add_special_tokens([AddedToken(PAD, special=True, normalized=False)])
    return result.to_str()
