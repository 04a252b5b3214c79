"""Files that are complete or absent, even if the process or the machine dies; locked folders."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# A partial file that was not written to for so many seconds is the leftover of a killed process.
STALE_S = 3600

_locks: set[int] = set()  # the descriptors of folders that this process has locked


@contextlib.contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that replaces `path` when the block ends without an error.

    It is written under another name in the same folder, fsynced and renamed, so that `path` is
    always either the old file or the complete new one. Several processes may replace a file at the
    same time; the last one to end wins.
    """
    path = Path(path)
    for leftover in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > STALE_S:
                leftover.unlink()
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "xb") as file:
            yield file
        flush(partial)
        os.replace(partial, path)
        flush(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a block for the same folder, as far as its file system can.

    Raises:
        BlockingIOError: another process is in such a block.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    _locks.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise BlockingIOError(
                    error.errno, "another process uses this folder", os.fspath(folder)
                ) from None
        yield
    finally:
        if descriptor in _locks:
            _locks.remove(descriptor)
            os.close(descriptor)


def _close_locks() -> None:
    """In a forked process, which must not hold the lock longer than the process that took it."""
    while _locks:
        os.close(_locks.pop())


os.register_at_fork(after_in_child=_close_locks)


def flush(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk.

    Some file systems cannot flush folders; that is forgiven.
    """
    is_folder = path.is_dir()
    with contextlib.suppress(OSError) if is_folder else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256(path: str | os.PathLike[str], start: int = 0) -> str:
    """The SHA-256 of a file's bytes from `start` on, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(start)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
