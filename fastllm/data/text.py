"""Text files as pieces: read, cleaned and cut without holding the whole text in memory."""

from __future__ import annotations

import codecs
import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from fastllm.tokenization.base import BETWEEN_WORDS

PIECE_BYTES = 1 << 20


def read_text(path: str | os.PathLike[str], piece_bytes: int = PIECE_BYTES) -> Iterator[str]:
    """Yields the text of a UTF-8 file in pieces of about `piece_bytes` bytes.

    A byte-order mark is dropped; CRLF and CR become LF, as in Python's text mode.

    Raises:
        FileNotFoundError: the file does not exist.
        IsADirectoryError: `path` is a folder.
        ValueError: the file is not UTF-8; the message gives the offset of the first bad byte.
    """
    if piece_bytes < 1:
        raise ValueError(f"piece_bytes must be at least 1, not {piece_bytes}")
    if not os.path.exists(path):
        raise FileNotFoundError(f"text file {path} does not exist")
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path} is a folder; name a text file")
    with open(path, "rb") as file:
        yield from decode_text(path, file, piece_bytes=piece_bytes)


def decode_text(
    path: str | os.PathLike[str],
    file: BinaryIO,
    start: bytes = b"",
    piece_bytes: int = PIECE_BYTES,
) -> Iterator[str]:
    """The text of an open file, as `read_text` yields it.

    Args:
        path: for error messages.
        start: what was read from the file already.
    """
    utf8 = codecs.getincrementaldecoder("utf-8")()
    line_ends = io.IncrementalNewlineDecoder(utf8, translate=True)
    data = start or file.read(len(codecs.BOM_UTF8))
    offset = len(data)
    if data.startswith(codecs.BOM_UTF8):
        data = data[len(codecs.BOM_UTF8) :]
    at_end = False
    while not at_end:
        more = file.read(piece_bytes)
        at_end = not more
        data += more
        offset += len(more)
        waiting = len(utf8.getstate()[0])
        try:
            piece = line_ends.decode(data, final=at_end)
        except UnicodeDecodeError as error:
            bad = offset - len(data) - waiting + error.start
            raise ValueError(
                f"{path} is not UTF-8: bad byte 0x{error.object[error.start]:02x} at offset "
                f"{bad} ({error.reason}); convert it, for example with "
                "iconv -f WINDOWS-1252 -t UTF-8"
            ) from error
        data = b""
        if piece:
            yield piece


def clean_lines(
    pieces: Iterable[str], min_line_length: int = 0, dedup_lines: bool = False
) -> Iterator[str]:
    """Yields the text without short or repeated lines.

    With both settings off the pieces pass through untouched. Otherwise each line is held in memory
    as a whole.

    Args:
        pieces: the text; lines end with LF and may run across pieces.
        min_line_length: drop lines with fewer characters than this, not counting the LF.
        dedup_lines: drop lines equal to an earlier one, except blank lines. Costs about 120 bytes
            of memory for each distinct line.

    Raises:
        ValueError: `min_line_length` is negative.
    """
    if min_line_length < 0:
        raise ValueError(f"min_line_length must be at least 0, not {min_line_length}")
    if min_line_length == 0 and not dedup_lines:
        return iter(pieces)
    return _clean_lines(pieces, min_line_length, dedup_lines)


def _clean_lines(pieces: Iterable[str], min_line_length: int, dedup_lines: bool) -> Iterator[str]:
    seen: set[bytes] = set()

    def keep(line: str) -> bool:
        if len(line) < min_line_length:
            return False
        if dedup_lines and line and not line.isspace():
            content = line.encode("utf-8", "surrogatepass")
            digest = hashlib.blake2b(content, digest_size=16).digest()
            if digest in seen:
                return False
            seen.add(digest)
        return True

    unfinished: list[str] = []
    for piece in pieces:
        head, line_end, tail = piece.rpartition("\n")
        if not line_end:
            unfinished.append(piece)
            continue
        lines = ("".join(unfinished) + head).split("\n")
        unfinished = [tail]
        kept = "".join([line + "\n" for line in lines if keep(line)])
        if kept:
            yield kept
    last = "".join(unfinished)
    if last and keep(last):
        yield last


def cut_between_words(pieces: Iterable[str], most_chars: int = 4 * PIECE_BYTES) -> Iterator[str]:
    """Yields the same text, cut only at places that do not change a subword tokenizer's tokens.

    Cuts are between two words: after a line end or before a space. A stretch of text without such a
    place is cut when it reaches `most_chars`. A text that comes in one piece stays in one piece.
    """
    text = ""
    for piece in pieces:
        if text:
            # The tail nearly always has a place to cut; only texts without spaces are searched
            # as a whole.
            cut = BETWEEN_WORDS.search(text, max(0, len(text) - 4096)) or BETWEEN_WORDS.search(text)
            if cut is not None or len(text) >= most_chars:
                end = len(text) if cut is None else cut.end()
                yield text[:end]
                text = text[end:]
        text += piece
    if text:
        yield text
