"""What the commands share: settings from flags, and errors as one clear line."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    CliApp,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)


class CommandSettings(BaseSettings):
    """Base of every command's settings: a field is a flag, its docstring the flag's help."""

    model_config = SettingsConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_parse_none_str="",  # the default, "None", is a text that somebody may mean
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments and flags only: a stray environment variable must not change a run."""
        return (init_settings,)


Settings = TypeVar("Settings", bound=CommandSettings)


def parse_settings(
    settings_class: type[Settings], arguments: list[str], **defaults: Any
) -> Settings:
    """Settings from the command line, which overrides `defaults`; exits where they are wrong.

    Flags may be written `--file_path` or `--file-path`.
    """
    try:
        return CliApp.run(settings_class, cli_args=underscored(arguments), **defaults)
    except (ValidationError, SettingsError) as error:
        raise SystemExit(f"error: {describe_error(error)}") from None


def describe_error(error: Exception) -> str:
    """One line for each wrong setting, naming it and what it must be."""
    if not isinstance(error, ValidationError):
        return str(error)
    return "\n       ".join(map(_describe_one, error.errors(include_url=False)))


def _describe_one(error: Any) -> str:
    name, message = ".".join(map(str, error["loc"])), error["msg"].removeprefix("Value error, ")
    if isinstance(error["input"], dict):  # all settings, of which several do not fit
        return f"{name}: {message}" if name else message
    return f"{name + ': ' if name else ''}{message} (got {error['input']!r})"


@contextmanager
def errors_in_one_line(*types: type[Exception]) -> Iterator[None]:
    """Turns exceptions that a command's user can mend into a message and exit status 1."""
    try:
        yield
    except BrokenPipeError:  # the reader of our output went away: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except types as error:
        # str() of a KeyError would wrap its message in quotes.
        message = error.args[0] if isinstance(error, KeyError) else error
        raise SystemExit(f"error: {message}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def log(*parts: Any) -> None:
    """Prints for a person to read: on stderr, so that stdout holds only what was asked for."""
    print(*parts, file=sys.stderr, flush=True)


class StopRequest:
    """What `stop_on_signals` asks to stop, by naming the signal that came."""

    stopped_by: signal.Signals | None = None


@contextmanager
def stop_on_signals(run: StopRequest) -> Iterator[None]:
    """The first SIGINT or SIGTERM asks the run to save and stop; a second SIGINT ends it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        if run.stopped_by and number == signal.SIGINT:
            os._exit(128 + number)
        run.stopped_by = signal.Signals(number)
        log(f"\n{run.stopped_by.name}: saving and stopping; Ctrl-C again stops at once")

    previous = {
        number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def underscored(arguments: list[str]) -> list[str]:
    """The arguments with flags as the settings spell them."""
    result = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            name = "--" + name[2:].replace("-", "_")
            if name.startswith("--no_"):
                name = "--no-" + name[5:]
            if name == "--post_norm":
                name = "--no-norm_first"
        result.append(name + equals + value)
    return result
