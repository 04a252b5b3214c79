"""Text to token ids and back: by character, or by subwords learnt from a text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeAlias

from fastllm.tokenization.base import CHARACTER, PAD, read_json
from fastllm.tokenization.simple_tokenizer import SimpleCharacterTokenizer
from fastllm.tokenization.subword_tokenizer import SubwordTokenizer

__all__ = ["SimpleCharacterTokenizer", "SubwordTokenizer", "Tokenizer", "load_tokenizer"]

Tokenizer: TypeAlias = SimpleCharacterTokenizer | SubwordTokenizer


def exported_characters(data: dict[str, Any]) -> list[str] | None:
    """The characters of a character tokenizer that was exported as a tokenizer.json, else None."""
    try:
        vocabulary, pattern = data["model"]["vocab"], data["pre_tokenizer"]["pattern"]["Regex"]
        chars = sorted(vocabulary, key=vocabulary.__getitem__)[:-1]
    except (KeyError, TypeError):
        return None
    if pattern != CHARACTER or data["model"].get("type") != "WordLevel":
        return None
    ids = {char: i for i, char in enumerate([*sorted(chars), PAD])}
    return chars if vocabulary == ids and all(len(char) == 1 for char in chars) else None


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Loads the tokenizer in a file or folder; the content decides which kind it is.

    Args:
        path: a file that `save` or an export wrote, a tokenizer.json of the tokenizers library, or
            a folder with `tokenizer.json`, with GPT-2's `vocab.json` and `merges.txt`, or with
            these two under their original names, `encoder.json` and `vocab.bpe`.

    Raises:
        FileNotFoundError: the file does not exist, or the folder holds no tokenizer.
        ValueError: the file is damaged, or not a tokenizer; the message gives the reason.
        ImportError: it is a subword tokenizer and the tokenizers library is not installed.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "tokenizer.json").exists():
            for vocabulary, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
                if (path / vocabulary).exists():
                    return SubwordTokenizer.from_gpt2(path / vocabulary, path / merges)
            raise FileNotFoundError(
                f"{path} holds no tokenizer: neither tokenizer.json nor vocab.json and merges.txt"
            )
        path = path / "tokenizer.json"
    data = read_json(path)
    if isinstance(data, dict) and data.get("type") == "character":
        return SimpleCharacterTokenizer.from_file(path)
    if isinstance(data, dict) and "model" in data:
        chars = exported_characters(data)
        if chars is not None:
            return SimpleCharacterTokenizer(chars)
        return SubwordTokenizer.from_file(path)
    raise ValueError(
        f'{path} is not a tokenizer: it has neither "type": "character" nor a "model"; '
        "to load GPT-2's vocab.json and merges.txt, name their folder"
    )
