"""Shared by the commands: settings from flags, errors in one line, logging and signals."""

import errno
import functools
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TypeVar

from pydantic import ValidationError

from fastllm.flags import CommandSettings, read_flags

Log = Callable[..., None]
AnySettings = TypeVar("AnySettings", bound=CommandSettings)


def parse_settings(
    settings_class: type[AnySettings], arguments: list[str], **defaults: Any
) -> AnySettings:
    """Settings from the command line, which overrides `defaults`; exits if they are invalid."""
    return make_settings(settings_class, {**defaults, **read_flags(settings_class, arguments)})


def make_settings(settings_class: type[AnySettings], values: Mapping[str, Any]) -> AnySettings:
    """The settings with these values; exits if they are invalid."""
    try:
        return settings_class(**values)
    except ValidationError as error:
        lines = dict.fromkeys(map(_describe_flag, error.errors(include_url=False)))
        raise SystemExit("error: " + "\n       ".join(lines)) from None


def describe_error(error: Exception) -> str:
    """For each invalid setting its name, what it must be, and what was given; in one line."""
    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(describe_setting(each) for each in error.errors(include_url=False))


def describe_setting(error: Any) -> str:
    """One of pydantic's errors in plain words: `lr: must be a number (got 'fast')`."""
    name = ".".join(map(str, error["loc"]))
    return f"{name}: {_problem(error)}" if name else _problem(error)


def _describe_flag(error: Any) -> str:
    """`--lr must be a number (got 'fast')`; a list's flag, whichever of its values is wrong."""
    return f"--{error['loc'][0]} {_problem(error)}" if error["loc"] else _problem(error)


# Instead of pydantic's own words for these types of errors; `{}` are values of their contexts.
PLAIN_MESSAGES = {
    "missing": "is required",
    "extra_forbidden": "there is no such setting",
    "too_short": "needs a value",
    "too_long": "must have at most {max_length} values",
    "string_too_short": "must not be empty",
}
PLAIN_WORDS = {
    r"^Value error, ": "",
    r"^Input should be": "must be",
    r", (unable to parse|got a number|unable to interpret).*": "",
    "a valid integer": "a whole number",
    "a valid boolean": "true or false",
    "a valid string": "a text",
    "a valid array": "a list",
    "a valid ": "a ",
}


def _problem(error: Any) -> str:
    plain = PLAIN_MESSAGES.get(error["type"])
    message = error["msg"] if plain is None else plain.format(**error.get("ctx", {}))
    for pattern, words in PLAIN_WORDS.items():
        message = re.sub(pattern, words, message)
    # A dictionary is all settings, several of which do not fit together.
    return message if isinstance(error["input"], dict) else f"{message} (got {error['input']!r})"


@contextmanager
def errors_in_one_line(*types: type[Exception]) -> Iterator[None]:
    """Turns exceptions that the user can fix into a message and exit status 1."""
    try:
        yield
    except OutputError as error:
        _discard_results()
        # The reader has seen enough: `| head`.
        raise SystemExit(1 if error.errno == errno.EPIPE else f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        lacks_memory = is_out_of_memory(error)
        if not lacks_memory and not isinstance(error, types):
            raise
        remedy = "; close other programs, or give a smaller model or batch" if lacks_memory else ""
        raise SystemExit(f"error: {cause_of(error)}{remedy}") from None


# Our own words, or those of the system; others need the name of their type.
_CLEAR_ERRORS = (OSError, ValueError, ImportError)


def cause_of(error: BaseException) -> str:
    """What went wrong, from an error of whatever library."""
    if is_out_of_memory(error):
        amount = re.search(r"allocate [\d.]+ \w+", str(error))
        return f"there is not enough memory{f' to {amount[0]}' if amount else ''}"
    if isinstance(error, KeyError) and " " in str(error.args[:1]):  # a sentence, not just a key
        return str(error.args[0])  # str() of the error would wrap it in quotes
    if isinstance(error, BrokenPipeError):
        return "another process or machine has closed its end of a pipe or a connection"
    is_ours = type(error).__module__.startswith("fastllm.")
    if is_ours or (isinstance(error, _CLEAR_ERRORS) and str(error).strip()):
        return str(error)
    reason = first_line(error)
    name = type(error).__name__
    return name if reason == name else f"{name}: {reason}"


def is_out_of_memory(error: BaseException) -> bool:
    """Also in PyTorch, whose allocator for CPUs raises a RuntimeError."""
    message = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and ("DefaultCPUAllocator" in message or "out of memory" in message)
    )


def is_fault(error: BaseException) -> bool:
    """Whether this is an error, a panic of a library in Rust included; not Ctrl-C or an exit."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def command(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """Decorates the `main` of a command: its output may vanish, and Ctrl-C needs no traceback."""

    @functools.wraps(main)
    def run(arguments: list[str]) -> None:
        prepare_streams()
        with errors_in_one_line(OSError):
            try:
                main(arguments)
            finally:
                sys.stdout.flush()  # a full disk, for example, is noticed here

    return run


def _discard_results() -> None:
    """What is left in the buffer of stdout would fail again at the exit."""
    with suppress(io.UnsupportedOperation):  # not the output of a process
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class OutputError(OSError):
    """Results cannot be written on stdout; other pipes and connections raise other errors."""


class _Results(io.FileIO):
    """The file of stdout, whose errors are told from those of other files."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OutputError(error.errno, error.strerror, "standard output") from None


class _Expendable(io.FileIO):
    """A file that forgets what cannot be written."""

    def write(self, data: Any) -> int:
        with suppress(OSError):  # the reader or the terminal is gone, the disk is full
            super().write(data)
        return len(data)


def prepare_streams() -> None:
    """Writing messages never fails, and characters that an output cannot encode are replaced.

    Results on stdout do fail if nobody can read them.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    stdout = sys.stdout
    if isinstance(stdout, io.TextIOWrapper):
        stdout.reconfigure(errors="replace")
        if stdout is sys.__stdout__:
            sys.stdout = io.TextIOWrapper(
                io.BufferedWriter(_Results(stdout.fileno(), "w", closefd=False)),
                encoding=stdout.encoding,
                errors="replace",
                line_buffering=stdout.line_buffering,
                write_through=stdout.write_through,
            )
    stderr = sys.__stderr__
    if stderr is not None and sys.stderr is stderr:
        sys.stderr = io.TextIOWrapper(
            io.BufferedWriter(_Expendable(stderr.fileno(), "w", closefd=False)),
            encoding=stderr.encoding,
            errors="backslashreplace",
            line_buffering=True,
        )


def log(*parts: Any) -> None:
    """Prints messages for people on stderr, which keeps stdout for results."""
    print(*parts, file=sys.stderr, flush=True)


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning, the same one only once in a process."""
    log(f"warning: {message}")


def no_log(*parts: Any) -> None:
    """Discards the message: the log of quiet runs, and of all ranks but 0."""


class StopRequest:
    """Holds the signal that asked a run to stop."""

    stopped_by: signal.Signals | None = None
    _announced = True

    def set(self, number: int, announced: bool = False) -> None:
        """Asks to stop as this signal does; safe in a signal handler.

        Args:
            announced: the user has been told already, so `poll` need not say so.
        """
        self._announced = announced
        self.stopped_by = signal.Signals(number)

    def poll(self) -> signal.Signals | None:
        """The signal that asked to stop, if any; logs it when first called after it came."""
        if self.stopped_by and not self._announced:
            self._announced = True
            log(f"\n{self.stopped_by.name}: saving and stopping; Ctrl-C again stops at once")
        return self.stopped_by


@contextmanager
def stop_on_signals(request: StopRequest) -> Iterator[None]:
    """The first signal to stop sets `request`, which the run polls; a second SIGINT exits.

    These are SIGINT, SIGTERM and, unless it is ignored as under nohup, SIGHUP.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return

    def handle(number: int, frame: FrameType | None) -> None:
        # Prints nothing: it may have interrupted a write to stderr, which must not be reentered.
        if request.stopped_by and number == signal.SIGINT:
            os._exit(128 + number)
        request.set(number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
