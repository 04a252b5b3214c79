"""Files and folders that are complete or absent, even if the process or the machine dies; locks."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# A partial file that was not written to for so many seconds is the leftover of a killed process.
STALE_S = 3600
_ASIDE = "writing-" + 32 * "[0-9a-f]"  # a user's folder may be called writing-samples

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
def writing_aside(folder: Path) -> Iterator[Path]:
    """A new folder whose entries move into `folder` when the block ends without an error.

    All of them are fsynced first. They replace files and folders of the same names; between the two
    renames that replace a folder called NAME, the old one is called replaced-NAME. `tidy` repairs
    what a killed process left.
    """
    aside = folder / f"writing-{uuid.uuid4().hex}"
    try:
        aside.mkdir(parents=True)
        yield aside
        for path in aside.rglob("*"):
            flush(path)
        for new in list(aside.iterdir()):
            final, replaced = folder / new.name, folder / f"replaced-{new.name}"
            if final.is_dir():
                final.rename(replaced)
            try:
                new.rename(final)
            finally:
                _put_back(replaced)
        flush(folder)
        with contextlib.suppress(OSError):  # the files are in place, whatever is left of it
            aside.rmdir()
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def tidy(folder: Path, names: str) -> None:
    """Removes what killed processes left of `writing_aside` and `remove_folder`, and puts back what
    they had set aside; for a folder that nobody else writes in now.

    Args:
        names: a pattern for the entries that were written or removed.
    """
    for pattern in (_ASIDE, f"removing-{names}"):
        for leftover in folder.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)
    for replaced in folder.glob(f"replaced-{names}"):
        _put_back(replaced)


def _put_back(replaced: Path) -> None:
    """Gives a folder that was set aside its name again, or removes it if that is taken."""
    final = replaced.with_name(replaced.name.removeprefix("replaced-"))
    if not final.exists() and replaced.exists():
        replaced.rename(final)
    elif replaced.exists():
        shutil.rmtree(replaced, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Removes a folder under another name: half removed, it must not look whole."""
    doomed = folder.with_name(f"removing-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


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
