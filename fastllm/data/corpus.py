"""Datasets of the `datasets` library, from the hub or from files, as sequences of tokens."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from array import array
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastllm.command import first_line
from fastllm.files import sha256

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# A tokenizer needs hundreds of bytes for each character that it is given at once.
PIECE, GROUP = 2**16, 2**20  # characters
HELD_OUT = ("validation", "valid", "val", "dev")


def file_format(words: list[str]) -> str | None:
    """The format of the files `words`, by their suffix; None if they name a dataset or a folder.

    Raises:
        ValueError: the files have several formats, or an unknown one.
        FileNotFoundError: one of them does not exist.
    """
    formats = [FORMATS.get(Path(word).suffix) for word in words]
    if not any(formats) and not any(Path(word).is_file() for word in words):
        return None
    for word, known in zip(words, formats, strict=True):
        if known is None:
            raise ValueError(f"{word} has an unknown format; files may be {', '.join(FORMATS)}")
        if not Path(word).is_file():
            raise FileNotFoundError(f"file {word} does not exist")
    if len(set(formats)) > 1:
        raise ValueError(f"{' '.join(words)} have several formats; give files of one format")
    return formats[0]


def load_documents(words: list[str], max_samples: int = 0) -> tuple[Dataset, Dataset | None]:
    """The documents to train on, and the validation split of the dataset, if it has one.

    Args:
        words: one or several files, where each line of text or each row of another format is a
            document; or a dataset on the hub or its folder, optionally with a configuration.
        max_samples: at most this many documents, the first ones; 0 for all. With a limit, datasets
            of the hub are streamed, and only these documents are downloaded.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: the dataset cannot be found or read; the message says why and what to do.
    """
    import datasets

    kind = file_format(words)
    try:
        if kind:
            options = {"keep_linebreaks": True} if kind == "text" else {}
            files = [_stage({f"data{Path(word).suffix}": Path(word)}) for word in words]
            rows = datasets.load_dataset(
                kind, data_files=[str(next(file.iterdir())) for file in files], split="train",
                **options,
            )  # fmt: skip
            return _first(rows, max_samples), None
        folder = Path(words[0])
        source = str(_stage(_files_in(folder))) if folder.is_dir() else words[0]
        loaded = datasets.load_dataset(source, *words[1:], streaming=max_samples > 0)
        train = loaded["train" if "train" in loaded else next(iter(loaded))]
        held_out = next((loaded[name] for name in HELD_OUT if name in loaded), None)
        if held_out is not None:
            held_out = _first(held_out, max_samples)
        return _first(train, max_samples), held_out
    except datasets.exceptions.DatasetGenerationError as error:
        reason = first_line(error.__cause__ or error)
        raise ValueError(
            f"{' '.join(words)} cannot be read as {kind or 'a dataset'}: {reason}"
        ) from error
    except (OSError, ValueError) as error:
        if kind:
            raise
        reason = first_line(error)
        if Path(words[0]).is_dir():
            raise ValueError(f"{' '.join(words)} cannot be read as a dataset: {reason}") from error
        raise ValueError(
            f"dataset {' '.join(words)} is not a file or folder here, and the hub does not provide "
            f"it: {reason}. On a machine with a network, run `hf download {words[0]} --repo-type "
            "dataset --local-dir DIR`; then give --dataset DIR"
        ) from error


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
    import datasets

    digest = hashlib.sha256()
    for name, path in files.items():
        digest.update(f"{name}\0{sha256(path)}\0".encode())
    folder = Path(datasets.config.HF_DATASETS_CACHE).absolute() / "fastllm" / digest.hexdigest()
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
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_len: int,
    *,
    text_column: str = "text",
    packing: bool = True,
    end_token: bool = True,
    masked: bool = False,
    min_length: int = 0,
    num_proc: int = 1,
) -> Dataset:
    """A dataset with one column, `input_ids`: sequences of 2 to `max_seq_len` tokens.

    Args:
        packing: documents are joined and cut into sequences of `max_seq_len`, a thousand documents
            at a time (ten thousand lines); the last sequence of each such group may be shorter.
            Otherwise each document is a sequence, truncated to `max_seq_len`.
        end_token: end each document with the tokenizer's end token, or else its separator.
        masked: for a masked language model, whose sequences begin and end with special tokens.
        min_length: drop documents with fewer characters.
        num_proc: processes to use.

    Raises:
        ValueError: there is no such column, it contains no text, or no sequence is left.
    """
    if text_column not in documents.column_names:
        raise ValueError(
            f"the dataset has no column {text_column!r}; choose the one with the text by "
            f"--text_column: {', '.join(documents.column_names)}"
        )
    kind = getattr(documents.features[text_column], "dtype", "lists or records")
    if kind not in ("string", "large_string", "null"):
        raise ValueError(f"column {text_column!r} of the dataset holds {kind}, not text")
    end = None
    if end_token:
        end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        if end is None:
            raise ValueError("the tokenizer has no end token to join documents; try --no-end_token")
    sequences = documents.map(
        _tokenize_batch,
        batched=True,
        batch_size=1_000 if end_token else 10_000,
        num_proc=num_proc if num_proc > 1 else None,
        remove_columns=documents.column_names,
        fn_kwargs={
            "tokenizer": tokenizer,
            "max_seq_len": max_seq_len,
            "text_column": text_column,
            "packing": packing,
            "end": end,
            "masked": masked,
            "min_length": min_length,
        },
        desc="tokenizing",
    )
    if not len(sequences):
        least = f" of at least {min_length} characters" if min_length else ""
        raise ValueError(f"the dataset has no text{least} to train on")
    return sequences


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
