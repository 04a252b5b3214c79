"""The tokens of a text file as one compact integer array, in memory or in a mapped token file.

A token file is a header of `HEADER_BYTES` bytes (a JSON object, padded with spaces) followed by the
ids as little-endian integers. The header records what the tokens were made from: the file is reused
as long as the text's content, the cleaning and the tokenizer are the same.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeGuard

import numpy as np
import numpy.typing as npt

from fastllm.data.sources import Texts
from fastllm.data.text import clean_lines, cut_between_words
from fastllm.files import replace_file, sha256
from fastllm.tokenization import SimpleCharacterTokenizer, SubwordTokenizer
from fastllm.tokenization.base import smallest_token_dtype

HEADER_BYTES = 4096
FORMAT = "fastllm tokens 1"

Tokens = npt.NDArray[Any]


class TextTokenizer(Protocol):
    """The interface that a dataset needs; `vocab_size` is used if the tokenizer has it."""

    def encode(self, text: str, /) -> list[int]: ...


@dataclass(frozen=True)
class TokenHeader:
    """A token file's contents, and the text, cleaning and tokenizer they were made with."""

    format: str
    dtype: str
    count: int
    ids_sha256: str
    text_sha256: str
    min_line_length: int
    dedup_lines: bool
    tokenizer: str


def encode_texts(
    texts: Texts,
    tokenizer: TextTokenizer,
    min_line_length: int = 0,
    dedup_lines: bool = False,
) -> Tokens:
    """The tokens [count] of texts, in memory; raises the errors of reading and of encoding."""
    pieces = clean_lines(texts.pieces(), min_line_length, dedup_lines)
    ids = io.BytesIO()
    _write_ids(pieces, tokenizer, ids)
    return np.frombuffer(ids.getbuffer(), dtype=_token_dtype(tokenizer))


def map_texts(
    texts: Texts,
    tokenizer: TextTokenizer,
    token_file: str | os.PathLike[str],
    min_line_length: int = 0,
    dedup_lines: bool = False,
) -> tuple[Tokens, TokenHeader]:
    """The tokens [count] of texts, mapped from `token_file`, and the token file's header.

    `token_file` is written first unless it already holds exactly these tokens. It is replaced
    atomically: an interrupted process leaves the old file. Changes to a tokenizer from outside this
    package cannot be detected, so for such a tokenizer the file is written every time.

    Raises:
        OSError: the file cannot be written.
        ValueError: `token_file` is a text file itself; reading and encoding raise as well.
    """
    token_file = Path(token_file)
    if token_file.exists() and any(os.path.samefile(file, token_file) for file in texts.files):
        raise ValueError(f"token_file {token_file} is the text file itself; choose another name")
    wanted = TokenHeader(
        format=FORMAT,
        dtype=_token_dtype(tokenizer).str,
        count=0,
        ids_sha256="",
        text_sha256=texts.content.sha256,
        min_line_length=min_line_length,
        dedup_lines=dedup_lines,
        tokenizer=tokenizer.fingerprint if _is_builtin(tokenizer) else "",
    )
    found = read_header(token_file)
    if wanted.tokenizer and found is not None:
        same = replace(wanted, count=found.count, ids_sha256=found.ids_sha256)
        if found == same and sha256(token_file, HEADER_BYTES) == found.ids_sha256:
            return map_tokens(token_file, found), found
    pieces = clean_lines(texts.pieces(), min_line_length, dedup_lines)
    try:
        token_file.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(token_file) as file:
            file.write(bytes(HEADER_BYTES))
            count, digest = _write_ids(pieces, tokenizer, file)
            header = replace(wanted, count=count, ids_sha256=digest)
            file.seek(0)
            file.write(json.dumps(asdict(header)).encode().ljust(HEADER_BYTES - 1) + b"\n")
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write the token file: {error.strerror}; free some space or use another place",
            os.fspath(token_file),
        ) from error
    return map_tokens(token_file, header), header


def map_tokens(token_file: str | os.PathLike[str], header: TokenHeader) -> Tokens:
    """Maps the tokens [count] of a token file whose header is known.

    Raises:
        ValueError: the file no longer has this header.
    """
    if read_header(token_file) != header:
        raise ValueError(
            f"token file {token_file} was changed or removed while in use; build the dataset again"
        )
    return np.memmap(
        token_file, dtype=header.dtype, mode="r", offset=HEADER_BYTES, shape=(header.count,)
    )


def _is_builtin(tokenizer: object) -> TypeGuard[SimpleCharacterTokenizer | SubwordTokenizer]:
    # A subclass may encode differently, which would make its parent's fast path wrong.
    return type(tokenizer) in (SimpleCharacterTokenizer, SubwordTokenizer)


def _vocab_size(tokenizer: TextTokenizer) -> int:
    vocab_size = getattr(tokenizer, "vocab_size", None)
    return int(vocab_size) if isinstance(vocab_size, (int, np.integer)) else 2**31


def _token_dtype(tokenizer: TextTokenizer) -> np.dtype[Any]:
    dtype: np.dtype[Any] = smallest_token_dtype(_vocab_size(tokenizer)).newbyteorder("<")
    return dtype


def _encode(piece: str, tokenizer: TextTokenizer) -> Tokens:
    if _is_builtin(tokenizer):
        return tokenizer.encode_array(piece)
    ids = np.array(tokenizer.encode(piece), dtype=np.int64)
    vocab_size = _vocab_size(tokenizer)
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:
        raise ValueError(
            f"{type(tokenizer).__name__} gave the token id {outside[0]}; "
            f"its vocab_size allows 0 to {vocab_size - 1}"
        )
    return ids


def _write_ids(pieces: Iterable[str], tokenizer: TextTokenizer, file: BinaryIO) -> tuple[int, str]:
    """Writes the whole text's tokens to `file`; returns their number and SHA-256."""
    dtype = _token_dtype(tokenizer)
    if _is_builtin(tokenizer) and tokenizer.may_be_cut:
        pieces = cut_between_words(pieces)
    else:
        pieces = ["".join(pieces)]  # tokens may depend on the surrounding text
    count, digest = 0, hashlib.sha256()
    for piece in pieces:
        ids = _encode(piece, tokenizer).astype(dtype, copy=False)
        file.write(ids.data)
        digest.update(ids.data)
        count += len(ids)
    return count, digest.hexdigest()


def read_header(token_file: str | os.PathLike[str]) -> TokenHeader | None:
    """The header of a complete token file; None for any other file."""
    try:
        with open(token_file, "rb") as file:
            header = TokenHeader(**json.loads(file.read(HEADER_BYTES)))
            size = os.fstat(file.fileno()).st_size
        complete_size = HEADER_BYTES + header.count * np.dtype(header.dtype).itemsize
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return header if size == complete_size else None
