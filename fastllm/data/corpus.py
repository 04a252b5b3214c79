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
    """The format of the files that `words` name, by their suffix; None for a name or a folder.

    Raises:
        ValueError: the files are of several formats, or of one that is not known.
        FileNotFoundError: one of them does not exist.
    """
    formats = [FORMATS.get(Path(word).suffix) for word in words]
    if not any(formats) and not any(Path(word).is_file() for word in words):
        return None
    for word, known in zip(words, formats, strict=True):
        if known is None:
            raise ValueError(f"{word} is of no known format; files may be {', '.join(FORMATS)}")
        if not Path(word).is_file():
            raise FileNotFoundError(f"file {word} does not exist")
    if len(set(formats)) > 1:
        raise ValueError(f"{' '.join(words)} are files of several formats; one at a time is read")
    return formats[0]


def load_documents(words: list[str], max_samples: int = 0) -> tuple[Dataset, Dataset | None]:
    """What there is to train on, and the part that the dataset itself holds out, if any.

    Args:
        words: one or several files (of text each line, of other formats each row is a document); or
            the name of a dataset on the hub or its folder, with or without a configuration's name.
        max_samples: at most so many documents, the first ones. Those of the hub are then streamed,
            so that no more than these are downloaded. 0 for all.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: the dataset cannot be had or read; the message says why and what to do.
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
            f"dataset {' '.join(words)} is no file or folder here, and the hub does not give it: "
            f"{reason}. Where there is a network, `hf download {words[0]} --repo-type dataset "
            "--local-dir DIR` brings it; then give --dataset DIR"
        ) from error


def _first(rows: Dataset | IterableDataset, count: int) -> Dataset:
    from datasets import Dataset

    if isinstance(rows, Dataset):
        return rows.select(range(min(count, len(rows)))) if count else rows
    return Dataset.from_generator(partial(_iterate, rows.take(count)), features=rows.features)


def _iterate(rows: IterableDataset) -> Iterator[dict[str, Any]]:
    yield from rows


def tokenise(
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
    """A dataset whose only column, `input_ids`, has sequences of 2 to `max_seq_len` tokens.

    Args:
        packing: documents are joined and cut into sequences of `max_seq_len`, a thousand documents
            at a time (ten thousand lines); the last sequence of each such group may be shorter.
            Otherwise each document is a sequence, cut off at `max_seq_len`.
        end_token: the tokenizer's end token (else its separator) follows each document.
        masked: for a masked language model, whose sequences begin and end with special tokens.
        min_length: leave out documents of fewer characters.
        num_proc: processes that work on it.

    Raises:
        ValueError: there is no such column, or no text in it; or no sequence is left.
    """
    if text_column not in documents.column_names:
        raise ValueError(
            f"the dataset has no column {text_column!r} but {', '.join(documents.column_names)}; "
            "name the one with the text by --text_column"
        )
    kind = getattr(documents.features[text_column], "dtype", "lists or records")
    if kind not in ("string", "large_string", "null"):
        raise ValueError(f"column {text_column!r} of the dataset holds {kind}, not text")
    end = None
    if end_token:
        end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        if end is None:
            raise ValueError("the tokenizer has no end token to join documents: --no-end_token")
    sequences = documents.map(
        _tokenise_batch,
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
        desc="tokenising",
    )
    if not len(sequences):
        least = f" of {min_length} characters or more" if min_length else ""
        raise ValueError(f"the dataset has no text{least} to learn from")
    return sequences


def _tokenise_batch(
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
    # Lines of one text are joined as they are; documents begin as the tokenizer wants them to.
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
