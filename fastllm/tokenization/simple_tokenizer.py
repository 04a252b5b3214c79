"""A tokenizer with one token for each distinct character of a text, and one for padding."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastllm.files import replace_file
from fastllm.tokenization.base import (
    PAD,
    check_text,
    check_tokens,
    read_json,
    smallest_token_dtype,
)

# Characters converted at a time: the code points (4 bytes each) and indices stay in L2 cache.
BLOCK = 1 << 16


def _code_point_blocks(text: str) -> Iterator[npt.NDArray[np.uint32]]:
    # "surrogatepass": a Python string may hold a lone surrogate like any other character.
    for start in range(0, len(text), BLOCK):
        block = text[start : start + BLOCK].encode("utf-32-le", "surrogatepass")
        yield np.frombuffer(block, dtype="<u4")


class SimpleCharacterTokenizer:
    """Characters to ids and back; ids follow the sorted characters, and padding comes last.

    Args:
        corpus: strings whose distinct characters make up the vocabulary.

    Attributes:
        chars: the vocabulary, sorted, with "<PAD>" last.
        stoi, itos: character to id, id to character.
        vocab_size: the number of ids, padding included.
        pad_char, pad_token_id: "<PAD>" and its id, to which no text except "<PAD>" itself encodes.
        token_dtype: the smallest integer type that holds every id.
        is_lossless: whether decoding restores every text.
        may_be_cut: whether a text cut between words encodes to the same ids, piece by piece.
        start_tokens: ids before every prompt: none.
        end_tokens: ids any of which ends a text: none, unless the files of a model name one.

    Raises:
        TypeError: `corpus` is not a list of strings.
    """

    is_lossless = True
    may_be_cut = True
    start_tokens: Sequence[int] = ()
    end_tokens: frozenset[int] = frozenset()

    def __init__(self, corpus: list[str]) -> None:
        if not isinstance(corpus, list):
            raise TypeError(f"Corpus must be a list of strings, not {type(corpus).__name__}")
        for item in corpus:
            if not isinstance(item, str):
                raise TypeError(
                    f"All items in the corpus must be strings, not {type(item).__name__}"
                )
        self._set_vocabulary(corpus)

    def _set_vocabulary(self, pieces: Iterable[str]) -> None:
        seen = np.zeros(0x110000, dtype=bool)
        for piece in pieces:
            for codes in _code_point_blocks(piece):
                seen[codes] = True
        codes_in_use = np.flatnonzero(seen)
        self.chars = [chr(code) for code in codes_in_use.tolist()] + [PAD]
        self.stoi = {char: i for i, char in enumerate(self.chars)}
        self.itos = dict(enumerate(self.chars))
        self.vocab_size = len(self.chars)
        self.pad_char = PAD
        self.pad_token_id = self.vocab_size - 1
        self.token_dtype = smallest_token_dtype(self.vocab_size)
        # Code points outside the vocabulary map to the padding id, which no character has. So does
        # the last entry, which stands for all code points beyond the table.
        last_code = int(codes_in_use[-1]) if codes_in_use.size else -1
        self._id_of_code = np.full(last_code + 2, self.pad_token_id, dtype=self.token_dtype)
        self._id_of_code[codes_in_use] = np.arange(self.pad_token_id)

    @classmethod
    def from_pieces(cls, pieces: Iterable[str]) -> SimpleCharacterTokenizer:
        """Builds the tokenizer of a text in pieces, which may be larger than memory."""
        tokenizer = cls([])
        tokenizer._set_vocabulary(pieces)
        return tokenizer

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> SimpleCharacterTokenizer:
        """Loads a tokenizer that `save` wrote.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: `save` did not write the file, or it is damaged.
        """
        data = read_json(path)
        if not isinstance(data, dict) or data.get("type") != "character":
            raise ValueError(f'{path} is not a character tokenizer: it has no "type": "character"')
        chars = data.get("chars")
        if not isinstance(chars, list) or not all(isinstance(char, str) for char in chars):
            raise ValueError(f'{path} is damaged: "chars" is not a list of strings')
        if not chars or chars[-1] != PAD:
            raise ValueError(f'{path} is damaged: "chars" does not end with {PAD}')
        for char in chars[:-1]:
            if len(char) != 1:
                raise ValueError(f"{path} is damaged: {char!r} is not one character")
        for char, following in itertools.pairwise(chars[:-1]):
            if char >= following:
                raise ValueError(
                    f"{path} is damaged: {following!r} follows {char!r}; the characters must be "
                    "sorted and distinct"
                )
        return cls(chars[:-1])

    def encode(self, text: str) -> list[int]:
        """The ids of the characters of `text`; "<PAD>" gives the padding id alone.

        Raises:
            TypeError: `text` is not a string.
            KeyError: a character is not in the vocabulary.
        """
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    def encode_array(self, text: str) -> npt.NDArray[Any]:
        """Like `encode`, but returns an array of `token_dtype`."""
        check_text(text)
        if text == PAD:
            return np.array([self.pad_token_id], dtype=self.token_dtype)
        ids = np.empty(len(text), dtype=self.token_dtype)
        start = 0
        for codes in _code_point_blocks(text):
            block = ids[start : start + len(codes)]
            self._id_of_code.take(codes, out=block, mode="clip")
            unknown = block == self.pad_token_id
            if unknown.any():
                char = text[start + int(unknown.argmax())]
                raise KeyError(
                    f"Character {char!r} not found in the vocabulary of {self.vocab_size} tokens; "
                    "leave it out, or build the tokenizer from a text that contains it"
                )
            start += len(codes)
        return ids

    def decode(self, tokens: list[int]) -> str:
        """The text of a list of ids.

        Raises:
            TypeError: `tokens` is not a list of integers.
            KeyError: an id is not in the vocabulary.
        """
        check_tokens(tokens)
        try:
            return "".join([self.itos[token] for token in tokens])
        except KeyError as error:
            raise KeyError(
                f"Token ID '{error.args[0]}' not found; the ids of this tokenizer are "
                f"0 to {self.vocab_size - 1}"
            ) from None

    def _to_json(self) -> str:
        return json.dumps({"type": "character", "chars": self.chars})

    @property
    def fingerprint(self) -> str:
        """A digest that is equal only for tokenizers that encode every text alike."""
        return hashlib.sha256(self._to_json().encode()).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the vocabulary as JSON; an existing file is replaced atomically."""
        with replace_file(path) as file:
            file.write(self._to_json().encode())
