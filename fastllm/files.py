"""Files that are whole or absent, whatever happens to the process or the machine."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends without an error.

    It is written under another name in the same folder, fsynced and renamed, so that `path` is at
    every instant either the old file or the whole new one.
    """
    path = Path(path)
    # One name for all: what a killed process left is written over.
    aside = path.with_name(f"{path.name}.partial")
    try:
        with open(aside, "wb") as file:
            yield file
        flush(aside)
        os.replace(aside, path)
        flush(path.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
