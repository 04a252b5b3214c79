"""Datasets of the `datasets` library, from the hub or from files, as sequences of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
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
            rows = datasets.load_dataset(kind, data_files=words, split="train", **options)
            return _first(rows, max_samples), None
        loaded = datasets.load_dataset(*words, streaming=max_samples > 0)
        train = loaded["train" if "train" in loaded else next(iter(loaded))]
        held_out = next((loaded[name] for name in HELD_OUT if name in loaded), None)
        if held_out is not None:
            held_out = _first(held_out, max_samples)
        return _first(train, max_samples), held_out
    except datasets.exceptions.DatasetGenerationError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ValueError(
            f"{' '.join(words)} cannot be read as {kind or 'a dataset'}: {reason}"
        ) from error
    except (OSError, ValueError) as error:
        if kind:
            raise
        reason = str(error).strip().splitlines()[0]
        if Path(words[0]).is_dir():
            raise ValueError(f"{' '.join(words)} cannot be read as a dataset: {reason}") from error
        raise ValueError(
            f"dataset {' '.join(words)} is not a file or folder here, and the hub does not provide "
            f"it: {reason}. On a machine with a network, run `hf download {words[0]} --repo-type "
            "dataset --local-dir DIR`; then give --dataset DIR"
        ) from error


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
) -> dict[str, list[list[int]]]:
    texts = [text for text in batch[text_column] if text and len(text) >= min_length]
    if not texts:
        return {"input_ids": []}
    if masked and not packing:
        ids = tokenizer(texts, truncation=True, max_length=max_seq_len)["input_ids"]
        bare = tokenizer.num_special_tokens_to_add()
        return {"input_ids": [row for row in ids if len(row) > max(bare, 1)]}
    # Lines of one text are joined as they are; documents get the tokenizer's start token.
    ids = tokenizer(texts, add_special_tokens=end is not None and not masked)["input_ids"]
    if end is not None:
        ids = [row if row and row[-1] == end else [*row, end] for row in ids]
    if not packing:
        return {"input_ids": [row[:max_seq_len] for row in ids if len(row) > 1]}
    before, after = [], []
    if masked and tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None:
        before, after = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
    room = max_seq_len - len(before) - len(after)
    joined = list(chain.from_iterable(ids))
    pieces = [[*before, *joined[i : i + room], *after] for i in range(0, len(joined), room)]
    return {"input_ids": [piece for piece in pieces if len(piece) > 1]}
