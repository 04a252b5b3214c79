"""Texts, tables and datasets of the hub as documents, and these as sequences of tokens."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastllm.command import first_line
from fastllm.data.sources import (
    Texts,
    compression_of,
    find_texts,
    format_of,
    is_local,
    is_table,
)
from fastllm.files import replace_file, sha256

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

# A tokenizer needs hundreds of bytes for each character that it is given at once.
PIECE, GROUP = 2**16, 2**20  # characters
HELD_OUT = ("validation", "valid", "val", "dev")
# What the library takes for the name of a split.
SPLIT = re.compile(
    rf"(?<![a-z])(train(?:ing)?|test(?:ing)?|eval(?:uation)?|{'|'.join(HELD_OUT)})(?![a-z])", re.I
)


@dataclass(frozen=True)
class Corpus:
    """The documents that some words name, still unread.

    Attributes:
        words: texts and tables, or a dataset on the hub or in a folder, which may be followed by a
            configuration.
        text_column: the column that holds the text.
        texts: the files; None if the `datasets` library reads them.
        held_out: the files of the validation split.
    """

    words: list[str]
    text_column: str
    texts: Texts | None = None
    held_out: Texts | None = None


class Documents(NamedTuple):
    """Documents to tokenize.

    Attributes:
        are_lines: lines of text with their ends, which follow each other without an end token.
    """

    rows: Dataset
    text_column: str
    are_lines: bool = False


def find_corpus(words: list[str], text_column: str = "text") -> Corpus:
    """Finds files as `find_texts` does.

    A folder whose files are all named after splits (train-1.jsonl, validation/a.txt) has these
    splits. A folder is a downloaded dataset if a configuration follows it, or if its card describes
    one.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file is not what its name says, or no text.
    """
    folder = Path(words[0])
    is_folder = folder.is_dir() and (len(words) == 1 or not is_local(words[1]))
    if not is_local(words[0]) or (is_folder and (len(words) == 2 or _has_card(folder))):
        return Corpus(words, text_column)
    texts, held_out = find_texts(words, text_column), None
    if is_folder:
        found = (SPLIT.search(str(file.relative_to(folder))) for file in texts.files)
        splits = {
            file: match and match[0].lower() for file, match in zip(texts.files, found, strict=True)
        }
        train, validation = (
            tuple(file for file, split in splits.items() if split in names)
            for names in (("train", "training"), HELD_OUT)
        )
        if train and None not in splits.values():
            held_out = replace(texts, files=validation) if validation else None
            texts = replace(texts, files=train)
    for part in (texts, held_out):
        if part is not None:
            part.check()
    return Corpus(words, text_column, texts, held_out)


def _has_card(folder: Path) -> bool:
    card = folder / "README.md"
    if not card.is_file():
        return False
    text = card.read_text(encoding="utf-8", errors="replace")
    return re.match(r"---\n(.*\n)*?(configs|dataset_info):", text) is not None


def load_documents(corpus: Corpus, max_samples: int = 0) -> tuple[list[Documents], list[Documents]]:
    """The documents to train on, and those of the validation split.

    Each line of a text and each row of a table or dataset is a document.

    Args:
        max_samples: at most this many documents, the first ones; 0 for all. With a limit, datasets
            of the hub are streamed, and only these documents are downloaded.

    Raises:
        ValueError: the dataset cannot be found or read; the message says why and what to do.
    """
    if corpus.texts is not None:
        parts = (corpus.texts, corpus.held_out)
        train, held_out = (_read_documents(part, max_samples) if part else [] for part in parts)
    else:
        splits = _load_dataset(corpus.words, max_samples)
        train, held_out = (
            [Documents(rows, corpus.text_column)] if rows is not None else [] for rows in splits
        )
    return train, held_out


def _read_documents(texts: Texts, max_samples: int) -> list[Documents]:
    """The documents of neighbouring files of one kind, in Arrow files of the library's cache."""
    import datasets
    import pyarrow

    parts: list[Documents] = []
    left = max_samples or None
    for are_rows, files in groupby(texts.files, is_table):
        part = replace(texts, files=tuple(files))
        documents = islice(part.rows() if are_rows else part.lines(), left)
        digest = hashlib.sha256(f"{part.text_column}\0{left}\0".encode())
        for file in part.files:
            kind = format_of(file) + compression_of(file.name)
            digest.update(f"{kind}\0{sha256(file)}\0".encode())
        path = _cache() / digest.hexdigest() / "documents.arrow"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            schema = pyarrow.schema({"text": pyarrow.large_string()})
            with replace_file(path) as stream, pyarrow.ipc.new_stream(stream, schema) as writer:
                while batch := list(islice(documents, 1_000)):
                    writer.write_table(pyarrow.table({"text": batch}, schema))
        rows = datasets.Dataset.from_file(str(path))
        parts.append(Documents(rows, "text", are_lines=not are_rows))
        if left is not None:
            left -= len(rows)
    return parts


def _load_dataset(words: list[str], max_samples: int) -> tuple[Dataset, Dataset | None]:
    """The training split of a dataset, and its validation split."""
    import datasets

    folder = Path(words[0])
    try:
        source = str(_stage(_files_in(folder))) if folder.is_dir() else words[0]
        loaded = datasets.load_dataset(source, *words[1:], streaming=max_samples > 0)
        train = loaded["train" if "train" in loaded else next(iter(loaded))]
        held_out = next((loaded[name] for name in HELD_OUT if name in loaded), None)
        if held_out is not None:
            held_out = _first(held_out, max_samples)
        return _first(train, max_samples), held_out
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        if folder.is_dir() or isinstance(error, datasets.exceptions.DatasetGenerationError):
            reason = first_line(error.__cause__ or error)
            raise ValueError(f"{' '.join(words)} cannot be read as a dataset: {reason}") from error
        raise ValueError(
            f"dataset {' '.join(words)} is not a file or folder here, and the hub does not provide "
            f"it: {first_line(error)}. On a machine with a network, run `hf download {words[0]} "
            "--repo-type dataset --local-dir DIR`; then give --dataset DIR"
        ) from error


def _cache() -> Path:
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE).absolute() / "fastllm"


def _files_in(folder: Path) -> dict[str, Path]:
    """The files of a dataset's folder, by names in which nothing looks like a pattern or a URL."""
    found = {}
    for number, path in enumerate(sorted(folder.rglob("*"))):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            name = re.sub(r"[\[\]*?:]", "_", relative.as_posix())
            if name != relative.as_posix():
                name = f"{name.removesuffix(path.suffix)}-{number}{path.suffix}"
            found[name] = path
    return found


def _stage(files: dict[str, Path]) -> Path:
    """A folder with links to these files, by their names there; its own name is their digest.

    The library takes paths for patterns and URLs, and knows a file again by its path and time. In
    this folder of its cache, a path is a path, and another content is another path.
    """
    digest = hashlib.sha256()
    for name, path in files.items():
        digest.update(f"{name}\0{sha256(path)}\0".encode())
    folder = _cache() / digest.hexdigest()
    for name, path in files.items():
        link, target = folder / name, path.absolute()
        if link.is_symlink() and Path(os.readlink(link)) == target:
            continue
        link.parent.mkdir(parents=True, exist_ok=True)
        partial_link = link.with_name(f".{os.getpid()}-{link.name}")
        try:
            partial_link.symlink_to(target)
        except OSError:  # no links on this disk
            shutil.copyfile(target, partial_link)
        partial_link.replace(link)
    return folder


def _first(rows: Dataset | IterableDataset, count: int) -> Dataset:
    from datasets import Dataset

    if isinstance(rows, Dataset):
        return rows.select(range(min(count, len(rows)))) if count else rows
    return Dataset.from_generator(partial(_iterate, rows.take(count)), features=rows.features)


def _iterate(rows: IterableDataset) -> Iterator[dict[str, Any]]:
    yield from rows


def tokenize(
    parts: list[Documents],
    tokenizer: PreTrainedTokenizerBase,
    max_seq_len: int,
    *,
    packing: bool = True,
    end_token: bool | None = None,
    masked: bool = False,
    min_length: int = 0,
    num_proc: int = 1,
) -> Dataset:
    """A dataset with one column, `input_ids`: sequences of 2 to `max_seq_len` tokens.

    Args:
        packing: documents are joined and cut into sequences of `max_seq_len`, a thousand documents
            at a time (ten thousand lines); the last sequence of each such group may be shorter.
            Otherwise each document is a sequence, truncated to `max_seq_len`.
        end_token: end each document with the tokenizer's end token, or else its separator; by
            default all but lines.
        masked: for a masked language model, whose sequences begin and end with special tokens.
        min_length: drop documents with fewer characters.
        num_proc: processes to use.

    Raises:
        ValueError: there is no such column, it contains no text, or no sequence is left.
    """
    from datasets import concatenate_datasets

    options = {
        "tokenizer": tokenizer,
        "max_seq_len": max_seq_len,
        "packing": packing,
        "masked": masked,
        "min_length": min_length,
    }
    found = []
    for part in parts:
        if len(part.rows):
            ends = not part.are_lines if end_token is None else end_token
            found.append(_tokenize_part(part, ends, num_proc, options))
    found = [sequences for sequences in found if len(sequences)]
    if not found:
        least = f" of at least {min_length} characters" if min_length else ""
        raise ValueError(f"the dataset has no text{least} to train on")
    return concatenate_datasets(found)


def _tokenize_part(
    documents: Documents, end_token: bool, num_proc: int, options: dict[str, Any]
) -> Dataset:
    rows, text_column, tokenizer = documents.rows, documents.text_column, options["tokenizer"]
    if text_column not in rows.column_names:
        raise ValueError(
            f"the dataset has no column {text_column!r}; choose the one with the text by "
            f"--text_column: {', '.join(rows.column_names)}"
        )
    kind = getattr(rows.features[text_column], "dtype", "lists or records")
    if kind not in ("string", "large_string", "null"):
        raise ValueError(f"column {text_column!r} of the dataset holds {kind}, not text")
    end = None
    if end_token:
        end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        if end is None:
            raise ValueError("the tokenizer has no end token to join documents; try --no-end_token")
    return rows.map(
        _tokenize_batch,
        batched=True,
        batch_size=1_000 if end_token else 10_000,
        num_proc=num_proc if num_proc > 1 else None,
        remove_columns=rows.column_names,
        fn_kwargs={**options, "text_column": text_column, "end": end},
        desc="tokenizing",
    )


def _tokenize_batch(
    batch: dict[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_seq_len: int,
    text_column: str,
    packing: bool,
    end: int | None,
    masked: bool,
    min_length: int,
) -> dict[str, list[NDArray[np.int64]]]:
    texts = [text for text in batch[text_column] if text and len(text) >= min_length]
    ids = _token_ids(texts, tokenizer)
    is_sequence = masked and not packing  # each document is one, with its special tokens
    # Lines of one text are joined as they are; documents get the tokenizer's start token.
    if is_sequence or (end is not None and not masked):
        before, after = _special_tokens(texts, tokenizer)
        room = max(0, max_seq_len - len(before) - len(after))
        ids = [before + (row[:room] if is_sequence else row) + after for row in ids]
        if is_sequence:
            bare = len(before) + len(after)
            return {"input_ids": [np.array(row) for row in ids if len(row) > max(bare, 1)]}
    if end is not None:
        ids = [row if row and row[-1] == end else row + array("q", [end]) for row in ids]
    if not packing:
        return {"input_ids": [np.array(row[:max_seq_len]) for row in ids if len(row) > 1]}
    first, last = [], []
    if masked and tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None:
        first, last = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
    room = max_seq_len - len(first) - len(last)
    joined = np.concatenate([np.array(row) for row in ids] or [np.zeros(0, np.int64)])
    pieces = (joined[i : i + room] for i in range(0, len(joined), room))
    rows = [np.concatenate([first, piece, last]).astype(np.int64) for piece in pieces]
    return {"input_ids": [row for row in rows if len(row) > 1]}


def _token_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[array[int]]:
    """The tokens of each text, without special ones."""
    ids = [array("q") for _ in texts]
    group: list[tuple[int, str]] = []

    def tokenize_group() -> None:
        encoded = tokenizer(
            [piece for _, piece in group],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        for (number, _), row in zip(group, encoded["input_ids"], strict=True):
            ids[number].extend(row)
        group.clear()

    characters = 0
    for number, text in enumerate(texts):
        for piece in _pieces(text):
            group.append((number, piece))
            characters += len(piece)
            if characters > GROUP:
                tokenize_group()
                characters = 0
    if group:
        tokenize_group()
    return ids


def _pieces(text: str) -> Iterator[str]:
    """A text in pieces of at most `PIECE` characters, cut before white space if there is any."""
    start = 0
    while len(text) - start > PIECE:
        end = max(text.rfind(space, start + 1, start + PIECE) for space in " \n")
        if end < 0:
            end = start + PIECE
        yield text[start:end]
        start = end
    yield text[start:]


def _special_tokens(
    texts: list[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[array[int], array[int]]:
    """The tokens that the tokenizer puts before and after a document."""
    for text in texts:
        bare = tokenizer(text[:100], add_special_tokens=False)["input_ids"]
        if bare:
            whole = tokenizer(text[:100])["input_ids"]
            starts = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
            start = next(starts, 0)
            return array("q", whole[:start]), array("q", whole[start + len(bare) :])
    return array("q"), array("q")
