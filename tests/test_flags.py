"""Flags of the commands: their help, their errors, and how fast both are there."""

import re
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from fastllm import __main__ as fastllm_command
from fastllm.benchmarking.config import BenchConfig
from fastllm.command import parse_settings
from fastllm.compare import CompareConfig
from fastllm.evaluate import EvaluateConfig
from fastllm.export import ExportConfig
from fastllm.finetuning.config import FinetuneConfig
from fastllm.flags import CommandSettings, read_flags
from fastllm.generate import GenerateConfig
from fastllm.serve import ServeConfig
from fastllm.training.config import RunSettings, TrainConfig
from fastllm.tuning.config import TuneConfig
from tests.conftest import REPOSITORY

SETTINGS: dict[str, type[CommandSettings]] = {
    "train": TrainConfig,
    "generate": GenerateConfig,
    "serve": ServeConfig,
    "evaluate": EvaluateConfig,
    "finetune": FinetuneConfig,
    "tune": TuneConfig,
    "compare": CompareConfig,
    "export": ExportConfig,
    "bench": BenchConfig,
}


def test_every_command_is_listed_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    files = {
        path.stem
        for path in (REPOSITORY / "fastllm").glob("*.py")
        if re.search(r"^def main\(arguments: list\[str\]\) -> None:", path.read_text(), re.M)
    }
    assert set(fastllm_command.COMMANDS) == files == set(SETTINGS)
    fastllm_command.main([])
    lines = capsys.readouterr().out.splitlines()
    for name in files:
        assert sum(line.split()[:1] == [name] for line in lines) == 1
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("name", SETTINGS)
def test_help_starts_with_examples_and_shows_each_flag_once(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        fastllm_command.main([name, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    _, examples, *groups = text.split("\n\n")
    assert examples.startswith("Examples\n  fastllm ") or name == "serve"
    shown = re.findall(r"^  --(\w+)", "\n".join(groups), re.M)
    fields = [field.alias or key for key, field in SETTINGS[name].model_fields.items()]
    assert sorted(shown) == sorted(fields)
    if SETTINGS[name].groups:  # which leave nothing out
        assert len(groups) == len(SETTINGS[name].groups)
    assert max(map(len, text.splitlines())) <= 80
    # Names of Python's types, and what the parser calls its defaults.
    assert not re.search(r"\b(int|str|float|bool|Path|None|list|typing)\b|[{}]|==", text)


def test_examples_are_valid() -> None:
    for name, settings_class in SETTINGS.items():
        for line in settings_class.examples.split("\n"):
            words = re.findall(r'"[^"]*"|\S+', line)
            if words[:2] == ["fastllm", name]:
                end = words.index("--") if "--" in words else len(words)
                read_flags(settings_class, words[2:end])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --lrr 3", "there is no flag --lrr; did you mean --lr?"),
        ("train --learning-rate=3", "there is no flag --learning_rate; did you mean --lr?"),
        ("train --n_layer 3", "there is no flag --n_layer; did you mean --num_layers?"),
        ("train --hidden 3", "there is no flag --hidden; did you mean --hidden_size?"),
        ("finetune --no-packng", "there is no flag --no-packng; did you mean --packing?"),
        ("generate --max_tokens 3", "there is no flag --max_tokens; did you mean --max_new_tokens"),
        ("generate --model m", "there is no flag --model; did you mean --checkpoint?"),
        ("serve --xyz", "there is no flag --xyz; --help lists them"),
        ("export stray", "stray belongs to no flag"),
        ("evaluate a.txt --file_path b.txt", "a.txt: there is a file_path already"),
        ("train --lr", "--lr needs a value; write --lr=VALUE if it begins with a dash"),
        ("finetune --dataset --lr 1", "--dataset needs a value; write --dataset=VALUE if"),
        ("train --quiet=3", "--quiet takes no value"),
        ("trian book.txt", "there is no command trian; did you mean train?"),
        ("xyz", "there is no command xyz; the commands are train, "),
    ],
)
def test_a_wrong_flag_gives_one_line(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        fastllm_command.main(line.split())
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "lines"),
    [
        ("export", ["--checkpoint is required", "--format is required"]),
        ("export --format gif", [
            "--checkpoint is required", "--format must be 'hf', 'onnx' or 'gguf' (got 'gif')"]),
        ("finetune a.txt --model m --lr fast --batch_size 1.5", [
            "--batch_size must be a whole number (got '1.5')",
            "--lr must be a number (got 'fast')"]),
        ("serve --checkpoint m --port 70000 --threads x", [
            "--port must be less than or equal to 65535 (got '70000')",
            "--threads must be a whole number (got 'x')"]),
        ("evaluate --json --batch_size=", [
            "--checkpoint is required", "--file_path is required",
            "--batch_size must be a whole number (got '')"]),
        ("compare a --out b.gif", ["--out must end in .png, .svg or .pdf (got 'b.gif')"]),
        ("compare", ["--runs is required"]),
        ("tune --trials 0 --jobs 0", [
            "--trials must be greater than or equal to 1 (got '0')",
            "--jobs must be greater than or equal to 1 (got '0')"]),
        ("bench --threads x", ["--threads must be a whole number (got 'x')"]),
        ("train --lr nan", ["--lr must be a finite number (got 'nan')"]),
        ("train --file_path=", ["--file_path must not be empty (got [''])"]),
        ("train --resume", ["--resume needs --out_dir, the folder of the run to continue"]),
        ("generate --checkpoint m --prompt a --prompt_file b", [
            "give either --prompt or --prompt_file"]),
    ],
)  # fmt: skip
def test_every_invalid_flag_is_named_as_it_is_typed(line: str, lines: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        fastllm_command.main(line.split())
    assert str(end.value) == "error: " + "\n       ".join(lines)


def test_every_unknown_flag_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fastllm_command.main("train --lrr 3 --hidden 4 --xyz".split())
    assert capsys.readouterr().err.splitlines() == [
        "error: there is no flag --lrr; did you mean --lr?",
        "       there is no flag --hidden; did you mean --hidden_size?",
        "       there is no flag --xyz; --help lists them",
    ]


@pytest.mark.parametrize("name", ["train", "evaluate"])
@pytest.mark.parametrize("flags", ["book.txt", "--file-path book.txt", "--dataset=book.txt"])
def test_one_text_has_one_spelling_in_every_command(name: str, flags: str) -> None:
    found = read_flags(SETTINGS[name], [*flags.split(), "--threads", "1"])
    assert found == {"file_path": ["book.txt"], "threads": "1"}


def test_words_after_two_dashes_are_no_flags() -> None:
    found = read_flags(SETTINGS["train"], ["--threads", "1", "--", "--odd.txt"])
    assert found == {"file_path": ["--odd.txt"], "threads": "1"}


def test_a_flag_means_the_same_in_every_command() -> None:
    for name, settings_class in SETTINGS.items():
        names = {*settings_class.model_fields, *settings_class.aliases}
        assert ("file_path" in names) == ("dataset" in names)
        assert ("file_path" in names) == (name in ("train", "evaluate", "finetune"))
        is_run = issubclass(settings_class, RunSettings)
        assert ("config" in settings_class.model_fields) == is_run  # a file of settings


def test_values_of_lists_and_switches() -> None:
    class Settings(CommandSettings):
        positional: ClassVar = "texts"
        texts: list[Path] = []  # noqa: RUF012
        many: list[str] = []  # noqa: RUF012
        numbers: list[int] = []  # noqa: RUF012
        on: bool = True

    settings = parse_settings(Settings, "--many x y,y --no-on --many=z --numbers 1,2 3".split())
    assert settings.many == ["x", "y,y", "z"] and not settings.on
    assert settings.numbers == [1, 2, 3]
    assert parse_settings(Settings, ["a", "b"]).texts == [Path("a"), Path("b")]


@pytest.mark.subprocess
@pytest.mark.parametrize("name", ["", *SETTINGS])
def test_help_in_a_process_imports_no_pytorch_and_takes_half_a_second(name: str) -> None:
    """`python -m fastllm` and `python -m fastllm.NAME`; CPU time, which other work leaves alone."""
    module = f"fastllm.{name}" if name else "fastllm"
    code = (
        "import runpy, sys, time\n"
        "try: runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'transformers'} & {*sys.modules}\n"
        "print(time.process_time(), *heavy, file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, module, "--help"], capture_output=True, text=True, timeout=60
    )
    seconds, *heavy = result.stderr.split()
    assert "Examples" in result.stdout
    assert not heavy
    assert float(seconds) < 0.5
