"""Settings of the commands, their flags and their help."""

import argparse
import difflib
import os
import shutil
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, NoReturn, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

# Settings that several commands share.
Device = Literal["cpu", "cuda"]
Precision = Literal["fp32", "bf16", "fp16", "auto"]
Quantize = Literal["int8", "int4"]
Format = Literal["hf", "onnx", "gguf"]
Quantization = Literal["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]  # GGUF's names
Threads = Annotated[int, Field(ge=0, le=4096)]

PLACEHOLDERS = {int: "N", float: "X", Path: "PATH", str: "TEXT"}
HELP_COLUMN = 30
# What other tools call our settings.
OTHER_NAMES = {
    "learning_rate": "lr",
    "block_size": "max_seq_len",
    "context_length": "max_seq_len",
    "seq_len": "max_seq_len",
    "n_embd": "hidden_size",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "max_iters": "max_steps",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "grad_accum",
    "eval_steps": "eval_interval",
    "save_steps": "save_interval",
    "output_dir": "out_dir",
    "input": "file_path",
    "data": "file_path",
    "text": "file_path",
    "train_file": "file_path",
    "model": "checkpoint",
    "max_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
}


class CommandSettings(BaseModel):
    """Base of every command's settings: a field is a flag, and its docstring the flag's help.

    Settings never change after they were made; what they resolve to goes into a record of its own.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True
    )

    examples: ClassVar[str] = ""
    """Uses of the command, one a line, with which its help begins."""
    groups: ClassVar[Mapping[str, str]] = {}
    """Headings of the help, and the settings below each; the others come last."""
    positional: ClassVar[str] = ""
    """The setting that may be given without its flag."""
    aliases: ClassVar[Mapping[str, str]] = {}
    """Second names of settings, as other commands call them."""
    joins_processes: ClassVar = False
    """Whether the processes that torchrun starts do the work of the command together."""


def check_quantize(quantize: str | None, precision: Precision) -> None:
    """Raises a `ValueError` if the settings would round weights twice."""
    if quantize and precision in ("bf16", "fp16"):
        raise ValueError(
            f"--quantize and --precision {precision} exclude each other: leave one out"
        )


def read_flags(settings_class: type[CommandSettings], arguments: list[str]) -> dict[str, Any]:
    """The settings that the arguments name, as text; exits on unknown flags, and after `--help`.

    Flags may be written `--file_path` or `--file-path`, and lists of numbers and of fixed words
    `1 2` or `1,2`; other texts and paths may contain commas.
    """
    if not settings_class.joins_processes:
        refuse_several_processes()
    parser = _Parser(settings_class)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    found, words = parser.parse_known_args(underscored(arguments[:end]))
    values = vars(found)
    name = settings_class.positional
    if unknown := [word.partition("=")[0] for word in words if word.startswith("--")]:
        hints = (
            did_you_mean(settings_class, flag[2:].removeprefix("no-"), "--") for flag in unknown
        )
        lines = (
            f"there is no flag {flag}{hint or '; --help lists them'}"
            for flag, hint in zip(unknown, hints, strict=True)
        )
        parser.error("\n       ".join(lines))
    for each, field in _fields(settings_class).items():
        if each in values and _is_list(field) and not {str, Path} & {*_types(field.annotation)}:
            values[each] = ",".join(values[each]).split(",")
    words += arguments[end + 1 :]  # words, whatever they begin with
    if words and not name:
        parser.error(f"{words[0]} belongs to no flag")
    if words:
        is_list = _is_list(settings_class.model_fields[name])
        if name in values or (len(words) > 1 and not is_list):
            parser.error(f"{words[-1]}: there is a {name} already")
        values[name] = words if is_list else words[0]
    return values


def refuse_several_processes() -> None:
    """Exits if torchrun started several processes; one of each machine says why."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return
    if os.environ.get("LOCAL_RANK", "0") == "0":
        raise SystemExit("error: this command works in one process; start it without torchrun")
    time.sleep(10)  # torchrun ends this process as soon as that one has exited, but not before
    raise SystemExit(1)


def underscored(arguments: list[str]) -> list[str]:
    """The arguments with flags in the spelling of the settings: `--file_path`."""
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


def did_you_mean(settings_class: type[CommandSettings], name: str, prefix: str = "") -> str:
    """`; did you mean lr?`, or nothing if no setting has a similar name."""
    names = [*_fields(settings_class), *settings_class.aliases]
    longer = [each for each in names if len(name) > 1 and each.startswith(name)]
    near = OTHER_NAMES.get(name)
    if near not in names:
        near = next(iter(longer or difflib.get_close_matches(name, names, 1)), None)
    return f"; did you mean {prefix}{near}?" if near else ""


class _Parser(argparse.ArgumentParser):
    """The flags of a command; values stay text, which the settings convert and check."""

    def __init__(self, settings_class: type[CommandSettings]) -> None:
        super().__init__(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
        self.settings_class = settings_class
        self.add_argument("-h", "--help", action="help")
        second_names = {name: second for second, name in settings_class.aliases.items()}
        for name, field in _fields(settings_class).items():
            flags = [f"--{each}" for each in (name, second_names.get(name)) if each]
            if _types(field.annotation) == [bool]:
                self.add_argument(*flags, dest=name, action=argparse.BooleanOptionalAction)
            elif _is_list(field):
                self.add_argument(*flags, dest=name, nargs="+", action="extend")
            else:
                self.add_argument(*flags, dest=name)

    def error(self, message: str) -> NoReturn:
        flags, _, problem = message.removeprefix("argument ").partition(": ")
        flag = flags.partition("/")[0]
        if problem.startswith("expected"):
            message = f"{flag} needs a value; write {flag}=VALUE if it begins with a dash"
        elif problem.startswith("ignored explicit argument"):
            message = f"{flag} takes no value"
        self.exit(2, f"error: {message}\n")

    def format_help(self) -> str:
        return _help(self.settings_class, min(100, shutil.get_terminal_size().columns))


def _help(settings_class: type[CommandSettings], width: int) -> str:
    fields = _fields(settings_class)
    groups = {title: names.split() for title, names in settings_class.groups.items()}
    grouped = {name for names in groups.values() for name in names}
    groups["More" if groups else "Flags"] = [name for name in fields if name not in grouped]
    lines = textwrap.wrap(" ".join((settings_class.__doc__ or "").split()), width)
    if settings_class.examples:
        lines += ["", "Examples", textwrap.indent(settings_class.examples.strip(), "  ")]
    for title, names in groups.items():
        if names:
            lines += ["", title]
        for name in names:
            flag = f"  {_flag(name, fields[name])}"
            fits = len(flag) < HELP_COLUMN - 1
            lines += [] if fits else [flag]
            lines += textwrap.wrap(
                _explanation(settings_class, name, fields[name]),
                width,
                initial_indent=flag.ljust(HELP_COLUMN) if fits else " " * HELP_COLUMN,
                subsequent_indent=" " * HELP_COLUMN,
            )
    return "\n".join([*lines, ""])


def _flag(name: str, field: FieldInfo) -> str:
    """The flag and what follows it, such as `--lr X`."""
    types = _types(field.annotation)
    if types == [bool]:
        return f"--{name}" if field.default is False else f"--{name}, --no-{name}"
    return f"--{name} {'|'.join(map(_placeholder, types))}{' ...' if _is_list(field) else ''}"


def _placeholder(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    return PLACEHOLDERS.get(annotation, "VALUE")


def _explanation(settings_class: type[CommandSettings], name: str, field: FieldInfo) -> str:
    text = " ".join((field.description or "").split())
    for second, first in settings_class.aliases.items():
        text += f" Also --{second}." if first == name else ""
    if name == settings_class.positional:
        text += " May be given without the flag."
    if field.is_required():
        return f"{text} Required."
    default = field.get_default(call_default_factory=True)
    if default is True:
        return f"{text} (default: on)"
    if default is None or default is False or default in ("", []):
        return text
    shown = ",".join(map(str, default)) if isinstance(default, list) else default
    return f"{text} (default: {shown})"


def _fields(settings_class: type[CommandSettings]) -> dict[str, FieldInfo]:
    """The fields by the names of their flags."""
    return {field.alias or name: field for name, field in settings_class.model_fields.items()}


def _is_list(field: FieldInfo) -> bool:
    return any(get_origin(part) is list for part in _parts(field.annotation))


def _types(annotation: Any) -> list[Any]:
    """What one value of a setting may be: `[int]` for `list[int] | None`."""
    return [
        each
        for part in _parts(annotation)
        for each in (_parts(get_args(part)[0]) if get_origin(part) is list else [part])
    ]


def _parts(annotation: Any) -> list[Any]:
    """The members of a union, None left out; anything else is alone."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, UnionType):
        return [each for part in get_args(annotation) for each in _parts(part)]
    return [] if annotation is type(None) else [annotation]
