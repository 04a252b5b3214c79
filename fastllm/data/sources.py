"""Files with text: which ones are meant, what is in them, and their text as a stream of pieces."""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import json
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

from fastllm.data.text import PIECE_BYTES, decode_text

StrPath = str | os.PathLike[str]

COMPRESSED = (".gz", ".xz", ".zst")
TABLES = (".jsonl", ".csv", ".parquet", ".json")
# What is read from a folder: a .json there may be anything.
IN_FOLDERS = (".txt", ".md", ".jsonl", ".csv", ".parquet")
# What a file is that begins with these bytes.
NOT_TEXT = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"BM": "a BMP image",
    b"RIFF": "a picture, sound or film",
    b"%PDF": "a PDF document",
    b"{\\rtf": "an RTF document",
    b"\xd0\xcf\x11\xe0": "an old Office document",
    b"PK\x03\x04": "a ZIP archive, as .docx, .odt and .epub are",
    b"\x1f\x8b": "compressed by gzip, without the ending .gz",
    b"\xfd7zXZ": "compressed by xz, without the ending .xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd, without the ending .zst",
    b"BZh": "compressed by bzip2",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"ID3": "a sound file",
    b"OggS": "a sound file",
    b"\x7fELF": "a program",
    b"MZ": "a program",
    b"PAR1": "a Parquet file, without the ending .parquet",
    b"GGUF": "a model in GGUF",
    b"SQLite format 3": "an SQLite database",
    b"\xff\xfe": "text in UTF-16: convert it with iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "text in UTF-16: convert it with iconv -f UTF-16 -t UTF-8",
}
OFFICE = {".docx": "a Word document", ".odt": "an OpenDocument text", ".epub": "an EPUB book",
          ".xlsx": "an Excel table", ".pptx": "a PowerPoint presentation"}  # fmt: skip


class Content(NamedTuple):
    """The SHA-256, in hexadecimal, and the length of a text in UTF-8."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Texts:
    """Files with text, as `find_texts` found them.

    Tables give the text of one column; other files are text, whatever their ending. All methods
    raise a `ValueError` that names the file if one has no text, is damaged or lacks the column, and
    an `ImportError` if the library for a format is not installed.

    Attributes:
        files: in the order in which they are read.
        text_column: the column of tables that holds the text.
    """

    files: tuple[Path, ...]
    text_column: str = "text"

    def __str__(self) -> str:
        others = len(self.files) - 1
        return f"{self.files[0]} and {others} more" if others else str(self.files[0])

    @cached_property
    def content(self) -> Content:
        """Of the text as it is read: names, formats and compression make no difference."""
        digest, size = hashlib.sha256(), 0
        for piece in self.pieces():
            data = piece.encode("utf-8", "surrogatepass")  # JSON may hold half a pair
            digest.update(data)
            size += len(data)
        return Content(digest.hexdigest(), size)

    def pieces(self) -> Iterator[str]:
        """The text in pieces; each file and each row of a table is on lines of its own."""
        last = "\n"
        for file in self.files:
            if last and not last.endswith("\n"):
                yield "\n"
            has_rows = is_table(file)
            with _damage_named(file):
                for last in self._read(file):
                    if has_rows and not last.endswith("\n"):
                        last += "\n"
                    yield last

    def lines(self) -> Iterator[str]:
        """The lines of the text, with their ends."""
        return _lines(self.pieces())

    def rows(self) -> Iterator[str]:
        """The texts of the rows, as they are; all files must be tables."""
        for file in self.files:
            with _damage_named(file):
                yield from self._read(file)

    def check(self) -> None:
        """Reads the beginning of each file."""
        for file in self.files:
            next(Texts((file,), self.text_column).pieces(), None)

    def _read(self, file: Path) -> Iterator[str]:
        """The rows of a table, or the text of another file in pieces."""
        kind = format_of(file)
        if kind == ".parquet":
            yield from _parquet(file, self.text_column)
            return
        with _open(file) as stream:
            pieces = _checked(file, stream)
            if kind == ".csv":
                yield from _csv(file, _lines(pieces), self.text_column)
            elif kind in TABLES:
                yield from _json(file, pieces, self.text_column)
            else:
                yield from pieces


def find_texts(words: StrPath | Iterable[StrPath], text_column: str = "text") -> Texts:
    """The files that these words name: each is a path, a folder, or else a pattern.

    A folder stands for the texts and tables in it and below, by their endings, without runs and
    what is hidden. A file that is named twice is there once.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is a pipe or a device.
    """
    found: dict[Path, Path] = {}
    for word in [words] if isinstance(words, (str, os.PathLike)) else words:
        if not os.fspath(word):
            raise FileNotFoundError("the name of a text is empty")
        path = Path(word)
        if path.is_dir():
            matches = list(_texts_in(path))
            if not matches:
                raise FileNotFoundError(f"folder {path} holds no text: no {', '.join(IN_FOLDERS)}")
        elif os.path.lexists(path):
            matches = [path]
        else:
            pattern = os.fspath(word)
            matches = [Path(name) for name in glob.glob(pattern, recursive=True)]
            matches = [file for file in matches if file.is_file()]
        if not matches:
            raise FileNotFoundError(f"text file {path} does not exist")
        for file in sorted(matches):
            found.setdefault(file.resolve(), file)
    for file in found.values():
        if not file.exists():
            raise FileNotFoundError(f"{file} is a link to a file that does not exist")
        if not file.is_file():
            raise ValueError(
                f"{file} is a pipe or a device, which cannot be read twice; save its content in a "
                "file first"
            )
    return Texts(tuple(found.values()), text_column)


def _texts_in(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            is_run = (path / "checkpoints").exists() or (path / "tokens.bin").exists()
            if not is_run and not path.is_symlink():
                yield from _texts_in(path)
        elif format_of(path) in IN_FOLDERS and path.is_file():
            yield path


def is_local(name: str) -> bool:
    """Whether this names files or a folder, existing or not, rather than something on a hub."""
    path = Path(name)
    if os.path.lexists(path) or path.is_absolute() or glob.has_magic(name):
        return True
    if format_of(path) in (*TABLES, *IN_FOLDERS, ".gguf"):
        return True
    return name[:1] in ".~" or name.endswith(("/", os.sep)) or len(path.parts) > 2


def absolute(word: StrPath) -> Path:
    """The same files, named from the root; a pattern stays one only where it was one."""
    path = Path(word)
    if path.is_absolute() or os.path.lexists(path):
        return path.absolute()
    return Path(glob.escape(os.getcwd())) / path if glob.has_magic(str(path)) else path.absolute()


def format_of(path: Path) -> str:
    """The ending that says how to read a file, without that of its compression."""
    return Path(path.name.removesuffix(compression_of(path.name))).suffix.lower()


def is_table(path: Path) -> bool:
    """Whether a file has rows, rather than text alone."""
    return format_of(path) in TABLES


def compression_of(name: str) -> str:
    """The ending of a compressed file's name, as it is written there; or nothing."""
    ending = Path(name).suffix
    return ending if ending.lower() in COMPRESSED else ""


@contextmanager
def _damage_named(file: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError, lzma.LZMAError, zlib.error, csv.Error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the system; those of the decompressors have no number
        raise ValueError(f"{file} is damaged, or is not what its ending says: {error}") from error


def _open(file: Path) -> Any:
    """A binary stream of the uncompressed content."""
    ending = file.suffix.lower()
    if ending == ".zst":
        arrow = _pyarrow(file)
        return arrow.CompressedInputStream(arrow.OSFile(str(file)), "zstd")
    if ending == ".gz":
        return gzip.open(file)
    return lzma.open(file) if ending == ".xz" else file.open("rb")


def _pyarrow(file: Path) -> ModuleType:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"{file} needs pyarrow to be read: pip install pyarrow") from error
    return pyarrow


def _checked(file: Path, stream: BinaryIO) -> Iterator[str]:
    """The text of a stream, unless its first bytes show that it is none."""
    start = stream.read(PIECE_BYTES)
    kind = next((kind for magic, kind in NOT_TEXT.items() if start.startswith(magic)), None)
    if kind and start.startswith(b"PK"):
        kind = OFFICE.get(file.suffix.lower(), kind)
    # Two letters may begin a text.
    if kind and (b"\0" in start or not start[:2].isalpha() or start.startswith((b"PK\x03", b"%"))):
        raise ValueError(f"{file} is not text but {kind}; give its text in a UTF-8 file")
    if b"\0" in start:
        raise ValueError(f"{file} is not text but a binary file; give its text in a UTF-8 file")
    yield from decode_text(file, stream, start)


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    rest: list[str] = []
    for piece in pieces:
        head, line_end, tail = piece.rpartition("\n")
        if line_end:
            yield from (line + "\n" for line in ("".join(rest) + head).split("\n"))
            rest = []
        rest.append(tail)
    if last := "".join(rest):
        yield last


def _json(file: Path, pieces: Iterable[str], text_column: str) -> Iterator[str]:
    if format_of(file) == ".json":  # one list of rows, or rows on lines
        text = "".join(pieces)
        if text.lstrip().startswith("["):
            try:
                rows = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file} is not JSON: {error}") from error
            for number, row in enumerate(rows, start=1):
                yield from _field(file, f"row {number}", row, text_column)
            return
        pieces = [text]
    for number, line in enumerate(_lines(pieces), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}: line {number} is not JSON: {error}") from error
        yield from _field(file, f"line {number}", row, text_column)


def _field(file: Path, place: str, row: object, text_column: str) -> Iterator[str]:
    if not isinstance(row, dict):
        raise ValueError(f"{file}: {place} is not a JSON object")
    _check_column(file, row, text_column)
    yield from _text(file, row[text_column], text_column)


def _csv(file: Path, lines: Iterable[str], text_column: str) -> Iterator[str]:
    csv.field_size_limit(2**31 - 1)
    rows = csv.DictReader(lines)
    if rows.fieldnames:
        _check_column(file, rows.fieldnames, text_column)
    for row in rows:
        yield from _text(file, row[text_column], text_column)


def _parquet(file: Path, text_column: str) -> Iterator[str]:
    arrow = _pyarrow(file)
    try:
        with arrow.parquet.ParquetFile(file) as table:
            _check_column(file, table.schema_arrow.names, text_column)
            for batch in table.iter_batches(1_000, columns=[text_column]):
                for value in batch.column(0).to_pylist():
                    yield from _text(file, value, text_column)
    except arrow.ArrowException as error:
        raise ValueError(f"{file} cannot be read as Parquet: {error}") from error


def _check_column(file: Path, columns: Iterable[str], text_column: str) -> None:
    if text_column not in columns:
        raise ValueError(
            f"{file} has no column {text_column!r}; choose one by --text_column: "
            f"{', '.join(map(str, columns))}"
        )


def _text(file: Path, value: object, text_column: str) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif value is not None:
        raise ValueError(f"{file}: column {text_column!r} holds {type(value).__name__}, not text")
