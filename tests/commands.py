"""Runs commands in the tests' own process.

An interpreter that imports PyTorch first takes seconds, and each command has one test that starts
one, as its users do.
"""

import io
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path

import pytest
import torch


def run_command(
    name: str, *flags: str, folder: Path | None = None, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """What `python -m fastllm.NAME FLAGS` in this folder prints, and its exit status.

    An exception that the command does not turn into a message fails the test.
    """
    main = import_module(f"fastllm.{name}").main
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with surroundings(folder, variables), redirect_stdout(out), redirect_stderr(err):
        try:
            main(list(flags))
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                err.write(f"{end.code}\n")
    return subprocess.CompletedProcess([name, *flags], status, out.getvalue(), err.getvalue())


@contextmanager
def surroundings(folder: Path | None, variables: dict[str, str]) -> Iterator[None]:
    """Restores what a command changes in its process."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        if folder:
            patch.chdir(folder)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
