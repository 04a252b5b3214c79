"""Datasets of token chunks, and batches of them for PyTorch."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from fastllm.data.sources import StrPath, Texts, find_texts
from fastllm.data.tokens import (
    TextTokenizer,
    TokenHeader,
    Tokens,
    encode_texts,
    map_texts,
    map_tokens,
)

Sample = dict[str, Tensor]

# A batch takes milliseconds: a worker process that takes this long does not answer any more.
WORKER_TIMEOUT_S = 60


class Chunks(Sequence[list[int]]):
    """The unpadded chunks of a token array: lists of ints, made on access."""

    def __init__(self, tokens: Tokens, max_seq_len: int, stride: int) -> None:
        self._tokens = tokens
        self._max_seq_len = max_seq_len
        self._starts = range(0, len(tokens), stride)

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[int]]: ...
    def __getitem__(self, index: int | slice) -> list[int] | list[list[int]]:
        if isinstance(index, slice):
            return [self._chunk(start) for start in self._starts[index]]
        return self._chunk(self._starts[index])

    def _chunk(self, start: int) -> list[int]:
        chunk: list[int] = self._tokens[start : start + self._max_seq_len].tolist()
        return chunk

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


class Batch(Sequence[Sample]):
    """The samples of one gathered batch, for any collate function; `input_ids` is [B, S]."""

    def __init__(self, input_ids: Tensor) -> None:
        self.input_ids = input_ids

    def __len__(self) -> int:
        return len(self.input_ids)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Batch: ...
    def __getitem__(self, index: int | slice) -> Sample | Batch:
        if isinstance(index, slice):
            return Batch(self.input_ids[index])
        return _sample(self.input_ids[index])


def _sample(input_ids: Tensor) -> Sample:
    # A copy, so that masking labels in place leaves the inputs alone.
    return {"input_ids": input_ids, "labels": input_ids.clone()}


class TextDataset(Dataset[Sample]):
    """A text file as chunks of `max_seq_len` tokens.

    Chunks start every `max_seq_len - overlap` tokens; those that reach past the end are padded. A
    sample is {"input_ids", "labels"}, two equal long tensors [max_seq_len] that share no memory
    (the loss shifts the labels to the next token). With `overlap=1` every token except the first is
    predicted once per pass; with 0 the first token of each chunk is never predicted.

    Args:
        file_path: a UTF-8 text, or .jsonl, .csv or .parquet, each also compressed (.gz, .xz, .zst);
            a folder with such files; a pattern; several of these; or what `find_texts` found.
        tokenizer: one from fastllm.tokenization, or any object with `encode(text) -> list[int]` and
            `pad_token_id` (and `vocab_size`, which makes the array compact).
        max_seq_len: tokens in a chunk.
        overlap: tokens that a chunk shares with the previous one.
        padding_value: fills up the last chunks; by default the tokenizer's `pad_token_id`.
        min_line_length: drop lines with fewer characters.
        dedup_lines: drop repeated lines.
        token_file: write the tokens to this file and map it instead of holding them in memory, for
            texts larger than memory. The file is reused as long as text, cleaning and tokenizer
            stay the same.
        text_column: the column of .jsonl, .csv and .parquet files that holds the text.

    Attributes:
        tokens: the token ids, an integer array [count].
        text_sha256: the text's digest, from the token file; None without one.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: an argument is out of range, or a file holds no text; the message says why.
        KeyError: the tokenizer lacks a character of the text.
        OSError: the token file cannot be written.
    """

    tokens: Tokens
    text_sha256: str | None
    file_path: StrPath | Sequence[StrPath] | Texts | None
    # The mapped token file, and the index in it of this dataset's first token.
    _mapped: tuple[str, TokenHeader] | None
    _first: int

    def __init__(
        self,
        file_path: StrPath | Sequence[StrPath] | Texts,
        tokenizer: TextTokenizer,
        max_seq_len: int,
        overlap: int = 0,
        padding_value: int | None = None,
        *,
        min_line_length: int = 0,
        dedup_lines: bool = False,
        token_file: str | os.PathLike[str] | None = None,
        text_column: str = "text",
    ) -> None:
        self._configure(tokenizer, max_seq_len, overlap, padding_value)
        self.file_path = file_path
        texts = file_path if isinstance(file_path, Texts) else find_texts(file_path, text_column)
        if token_file is None:
            self.tokens = encode_texts(texts, tokenizer, min_line_length, dedup_lines)
        else:
            self.tokens, header = map_texts(
                texts, tokenizer, token_file, min_line_length, dedup_lines
            )
            self.text_sha256 = header.text_sha256
            self._mapped = (os.path.abspath(token_file), header)

    @classmethod
    def from_tokens(
        cls,
        tokens: npt.ArrayLike,
        tokenizer: TextTokenizer,
        max_seq_len: int,
        overlap: int = 0,
        padding_value: int | None = None,
    ) -> TextDataset:
        """A dataset over existing token ids [count]; an array is not copied.

        Raises:
            ValueError: `tokens` is not one-dimensional and integer, or an argument is out of range.
        """
        dataset = cls.__new__(cls)
        dataset._configure(tokenizer, max_seq_len, overlap, padding_value)
        dataset.file_path = None
        dataset.tokens = np.asarray(tokens)
        if dataset.tokens.ndim != 1 or not np.issubdtype(dataset.tokens.dtype, np.integer):
            raise ValueError(
                "tokens must be a one-dimensional array of integers, not "
                f"{dataset.tokens.dtype} {list(dataset.tokens.shape)}"
            )
        return dataset

    def _configure(
        self, tokenizer: TextTokenizer, max_seq_len: int, overlap: int, padding_value: int | None
    ) -> None:
        if max_seq_len < 1:
            raise ValueError(f"max_seq_len must be at least 1, not {max_seq_len}")
        if overlap < 0:
            raise ValueError(f"overlap must be at least 0, not {overlap}")
        if overlap >= max_seq_len:
            raise ValueError(
                f"overlap must be less than max_seq_len, but {overlap} >= {max_seq_len}"
            )
        if padding_value is None:
            padding_value = getattr(tokenizer, "pad_token_id", None)
        if not isinstance(padding_value, (int, np.integer)):
            raise ValueError(
                f"padding_value must be an integer, not {padding_value!r}; give one, or a "
                "tokenizer with a pad_token_id"
            )
        self.tokenizer = tokenizer
        self.max_seq_len = max_seq_len
        self.overlap = overlap
        self.padding_value = int(padding_value)
        self.text_sha256 = None
        self._mapped = None
        self._first = 0

    @property
    def sequences(self) -> Chunks:
        """The unpadded chunks: a sequence of lists of ints, made on access."""
        return Chunks(self.tokens, self.max_seq_len, self.max_seq_len - self.overlap)

    def __len__(self) -> int:
        return len(range(0, len(self.tokens), self.max_seq_len - self.overlap))

    def __getitem__(self, index: int) -> Sample:
        return _sample(self._gather([operator.index(index)])[0])

    def __getitems__(self, indices: Sequence[int]) -> Sequence[Sample]:
        """The samples of a batch in one gather; PyTorch's DataLoader calls it instead of [i]."""
        if type(self).__getitem__ is not TextDataset.__getitem__:
            return [self[index] for index in indices]
        return Batch(self._gather(indices))

    def _gather(self, indices: Sequence[int]) -> Tensor:
        """The padded chunks, long [len(indices), max_seq_len]."""
        chunk = np.array(indices, dtype=np.int64)
        count = len(self)
        outside = (chunk < -count) | (chunk >= count)
        if outside.any():
            raise IndexError(
                f"index {chunk[outside][0]} is out of range for a dataset of {count} chunks"
            )
        start = (chunk % max(count, 1)) * (self.max_seq_len - self.overlap)
        position = start[:, None] + np.arange(self.max_seq_len)
        ids = self.tokens.take(position, mode="clip").astype(np.int64)
        past_end = position >= len(self.tokens)
        if past_end.any():
            ids[past_end] = self.padding_value
        return torch.from_numpy(ids)

    def split(self, val_fraction: float) -> tuple[TextDataset, TextDataset]:
        """The first 1 - `val_fraction` of the tokens for training, the rest for validation.

        Both share this dataset's tokens. The validation chunks overlap by one, so that every token
        except the first is predicted once.

        Raises:
            ValueError: `val_fraction` is not between 0 and 1, one part would have fewer than the
                two tokens that a prediction needs, or `max_seq_len` is 1.
        """
        if self.max_seq_len < 2:
            raise ValueError("max_seq_len must be at least 2 to predict anything, not 1")
        total = len(self.tokens)
        cut = split_point(total, val_fraction)
        return self._slice(0, cut, self.overlap), self._slice(cut, total, 1)

    def _slice(self, start: int, stop: int, overlap: int) -> TextDataset:
        part = type(self).__new__(type(self))
        part.__dict__.update(self.__dict__)
        part.tokens = self.tokens[start:stop]
        part.overlap = overlap
        part._first = self._first + start
        return part

    def __getstate__(self) -> dict[str, Any]:
        # Pickling would copy the mapped tokens; a worker process maps the token file itself.
        state = self.__dict__.copy()
        if self._mapped is not None:
            state["tokens"] = len(self.tokens)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._mapped is not None:
            self.tokens = map_tokens(*self._mapped)[self._first : self._first + state["tokens"]]


def split_point(total: int, val_fraction: float) -> int:
    """How many of so many tokens are for training; the others are for validation.

    Raises:
        ValueError: `val_fraction` is not between 0 and 1, or leaves fewer than two tokens.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must be between 0 and 1, not {val_fraction}")
    cut = int(total * (1 - val_fraction))
    for name, count in (("training", cut), ("validation", total - cut)):
        if count < 2:
            raise ValueError(
                f"val_fraction {val_fraction} of {total} tokens leaves {count} for {name}, but at "
                "least 2 are needed; use a longer text or another val_fraction"
            )
    return cut


def collate(samples: Sequence[Sample]) -> Sample:
    if isinstance(samples, Batch):
        return _sample(samples.input_ids)
    batch: Sample = default_collate(list(samples))
    return batch


def collate_ids(samples: Any) -> npt.NDArray[np.int64]:
    """The token ids of a `Batch`, [B, S], as an array.

    Worker processes send it through a pipe; a tensor would go through shared memory, of which
    containers have little.
    """
    ids: npt.NDArray[np.int64] = samples.input_ids.numpy()
    return ids


def create_dataloader(
    dataset: TextDataset,
    batch_size: int,
    shuffle: bool = True,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[Sample]:
    """A DataLoader of batches {"input_ids", "labels"}, long tensors [batch_size, max_seq_len].

    A worker process that sends nothing for `WORKER_TIMEOUT_S` seconds raises a `RuntimeError`.

    Raises:
        TypeError: `dataset` is not a TextDataset.
        ValueError: `batch_size` is below 1 or `num_workers` below 0.
    """
    if not isinstance(dataset, TextDataset):
        raise TypeError(f"dataset must be a TextDataset, not {type(dataset).__name__}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if num_workers < 0:
        raise ValueError(f"num_workers must be at least 0, not {num_workers}")
    return DataLoader(
        dataset,
        batch_size=batch_size,
        # PyTorch refuses to shuffle an empty dataset.
        shuffle=shuffle and len(dataset) > 0,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=collate,
        timeout=WORKER_TIMEOUT_S if num_workers else 0,
    )
