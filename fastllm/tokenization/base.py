"""Shared by the tokenizers: argument checks, the width of a token, places to cut text."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PAD = "<PAD>"
# Any character, as the tokenizers library cuts the texts of an exported character tokenizer.
CHARACTER = r"[\s\S]"

# Cutting a text at the end of a match does not change its tokens. A match ends between "\n" and a
# non-space, or between a non-space and " x", where byte-level BPE (GPT-2's pattern and GPT-4's) and
# BERT's pre-tokenizer all start a new word.
BETWEEN_WORDS = re.compile(r"\S\n(?=\S)|\S(?= \S)")


class SpecialTokens(NamedTuple):
    """The ids to which a model gives a meaning of their own.

    Attributes:
        pad: fills up sequences.
        start: what the model expects before a prompt.
        end: any of these ends a text.
    """

    pad: int
    start: Sequence[int] = ()
    end: frozenset[int] = frozenset()


def smallest_token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest of uint8, uint16 and int32 that holds every id below `vocab_size`."""
    if vocab_size <= 2**8:
        return np.dtype(np.uint8)
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)


def check_text(text: object) -> None:
    """Raises a TypeError unless `text` is a string."""
    if not isinstance(text, str):
        raise TypeError(f"Input text must be a string, not {type(text).__name__}")


def check_tokens(tokens: object) -> None:
    """Raises a TypeError unless `tokens` is a list of integers (Python's or numpy's)."""
    if not isinstance(tokens, list):
        raise TypeError(
            f"Input tokens must be a list of integers, not {type(tokens).__name__}; "
            "arrays and tensors have tolist()"
        )
    for token in tokens:
        if not isinstance(token, (int, np.integer)):
            raise TypeError(
                f"All items in the tokens list must be integers, not {type(token).__name__}"
            )


def read_text_file(path: str | os.PathLike[str]) -> str:
    """Reads a UTF-8 file without its byte-order mark.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not UTF-8.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return Path(path).read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: byte {error.start} is not UTF-8") from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file. Raises FileNotFoundError, or ValueError if it is not JSON."""
    text = read_text_file(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON, or is truncated: {error}") from error
