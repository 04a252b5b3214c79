"""The train command as its users run it."""

import gzip
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from fastllm import integrations
from fastllm.ops.precision import why_not_autocast
from fastllm.tokenization import SimpleCharacterTokenizer
from fastllm.train import main
from fastllm.training.loop import Trainer
from fastllm.training.metrics import read_metrics
from tests.commands import run_command
from tests.conftest import isa_in_use

SMALL = "--max_seq_len 16 --batch_size 4 --hidden_size 16 --num_layers 1 --max_steps 3".split()


def train(folder: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    return run_command("train", *SMALL, "--threads", "1", *flags, folder=folder)


def train_in_a_process(folder: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "fastllm.train", *SMALL, *flags],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.mark.subprocess
def test_demo_corpus_when_no_file_is_given(tmp_path: Path) -> None:
    result = train_in_a_process(tmp_path, "--eval_interval", "2", "--val_fraction", "0.01")
    assert result.returncode == 0, result.stderr
    for expected in (
        "training on the demo corpus, Python's own documentation",
        "parameters ",
        "memory      about ",
        "threads     1",
        "operations  decoder_loss: ",
        "validation  loss ",
        "best        loss ",
        "bits per character",
        "tokens/s",
        "loss.png",
        "sample\n",
    ):
        assert expected in result.stderr
    run_dir = tmp_path / "runs/demo"
    assert json.loads((run_dir / "config.json").read_text())["max_steps"] == 3
    assert [line["step"] for line in read_metrics(run_dir / "metrics.jsonl")] == [2, 3]
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    # The same command again starts a new run; the first one stays.
    assert train(tmp_path, "--quiet").stderr == ""
    assert (tmp_path / "runs/demo-2/model.safetensors").exists()


def test_without_cuda_training_warns_and_uses_the_cpu(tmp_path: Path, text: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    result = train(tmp_path, "--file_path", str(text), "--device", "cuda")
    assert result.returncode == 0, result.stderr
    assert "CUDA requested but not available, falling back to the CPU" in result.stderr


@pytest.mark.parametrize(
    ("flags", "native", "expected"),
    [
        ("", "bf16", "fp32"),
        ("--precision bf16", "bf16", "bf16"),
        ("--precision auto --hidden_size 32", "bf16", "bf16"),
        ("--precision auto", "bf16", "fp32"),  # too narrow for bf16 to be faster
        ("--precision auto --hidden_size 32", "base", "fp32"),
        ("--precision bf16", "base", "fp32"),
    ],
)
def test_precision(tmp_path: Path, text: Path, flags: str, native: str, expected: str) -> None:
    """The resolved precision is printed and recorded; unsupported bf16 gives a warning."""
    if native == "bf16" and expected == "bf16":
        reason = why_not_autocast(torch.bfloat16)
        if reason:
            pytest.skip(reason)
    with isa_in_use("base") if native == "base" else nullcontext():
        result = train(tmp_path, "--file_path", str(text), *flags.split(), "--out_dir", "run")
    assert result.returncode == 0, result.stderr
    assert f"precision   {expected}\n" in result.stderr
    assert json.loads((tmp_path / "run/config.json").read_text())["precision"] == expected
    is_unsupported = flags == "--precision bf16" and expected == "fp32"
    assert ("warning: bf16 was asked for, but " in result.stderr) == is_unsupported


@pytest.mark.parametrize("tokenizer", ["bpe", "wordpiece"])
def test_subword_tokenizers(tmp_path: Path, text: Path, tokenizer: str) -> None:
    flags = ("--file_path", str(text), "--tokenizer", tokenizer, "--vocab_size", "300")
    result = train(tmp_path, *flags, "--out_dir", "run")
    assert result.returncode == 0, result.stderr
    again = train(tmp_path, *flags[:2], "--tokenizer", "run/tokenizer.json", "--out_dir", "second")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "second/tokenizer.json").exists()


def test_texts_of_several_files_resumed_from_another_folder(tmp_path: Path) -> None:
    folder = tmp_path / "B [2]"
    (folder / "texts").mkdir(parents=True)
    (folder / "texts/a.txt").write_text("ab" * 99)
    (folder / "texts/b.jsonl").write_text('{"body": "%s"}' % ("ba" * 99))
    flags = "--out_dir", "run"
    first = train(folder, "--file_path", "texts", "--text_column", "body", *flags)
    assert first.returncode == 0, first.stderr
    assert "398 tokens" in first.stderr  # 99 * 2 and a line end, twice
    again = train(tmp_path, "--resume", "--out_dir", str(folder / "run"), "--max_steps", "5")
    assert again.returncode == 0, again.stderr
    (folder / "texts/c.txt").write_text("ab")
    changed = train(tmp_path, "--resume", "--out_dir", str(folder / "run"), "--max_steps", "6")
    assert "error: what --file_path names is not the text that this run began" in changed.stderr


def test_the_same_text_in_another_form_resumes(tmp_path: Path) -> None:
    """Under another name, compressed or in a table; another text is refused under any name."""
    text = "one line\nand two\n" * 9
    (tmp_path / "x.1.txt").write_text(text)
    assert train(tmp_path, "x.1.txt", "--out_dir", "run").returncode == 0
    (tmp_path / "x.1.txt").rename(tmp_path / "x.2.txt")
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/1.txt").write_text(text[:9])
    (tmp_path / "parts/2.jsonl.gz").write_bytes(gzip.compress(json.dumps({"x": text[9:]}).encode()))
    steps = iter(range(4, 9))
    for same in (["x.2.txt"], ["x.txt.gz"], ["parts", "--text_column", "x"]):
        again = ("--resume", "--out_dir", "run", "--max_steps", str(next(steps)))
        result = train(tmp_path, *same, *again)
        assert result.returncode == 0, result.stderr
    (tmp_path / "x.1.txt").write_text(text.replace("two", "too"))
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(text[:-1].encode()))
    for other in ("x.1.txt", "x.txt.gz"):
        result = train(tmp_path, other, "--resume", "--out_dir", "run", "--max_steps", "9")
        assert "error: what --file_path names is not the text that this run" in result.stderr


def test_a_run_is_resumed_from_another_folder_with_its_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("ab" * 99)
    SimpleCharacterTokenizer(["abc"]).save(tmp_path / "t.json")
    flags = "--file_path", "text.txt", "--tokenizer", "t.json", "--out_dir", "run"
    assert train(tmp_path, *flags).returncode == 0
    (tmp_path / "other").mkdir()
    for again in ((), ("--tokenizer", "../t.json", "--file_path", "../text.txt")):
        result = train(tmp_path / "other", "--resume", "--out_dir", "../run", *again)
        assert result.returncode == 0, result.stderr


def test_a_pipe_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    result = train(tmp_path, "--file_path", "pipe", "--tokenizer", "bpe")
    assert result.returncode == 1
    assert result.stderr.startswith("error: pipe is a pipe or a device")
    assert not (tmp_path / "runs").exists()


def test_a_preset_is_said_and_its_settings_are_kept(tmp_path: Path, text: Path) -> None:
    flags = ["--preset", "demo", "--max_steps", "2", "--threads", "1", "--out_dir", "run"]
    result = run_command("train", str(text), *flags, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "preset      demo: 0.1 million parameters, a few seconds" in result.stderr
    kept = json.loads((tmp_path / "run/config.json").read_text())
    assert (kept["tokenizer"], kept["max_steps"], kept["hidden_size"]) == ("bpe", 2, 64)
    assert "preset" not in kept
    resumed = run_command(
        "train", "--resume", "--out_dir", "run", "--max_steps", "3", folder=tmp_path
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "preset      " not in resumed.stderr


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (None, "", "error: text file text.txt does not exist"),
        (b"", "", "error: text.txt has no text to learn from"),
        (b"a", "", "error: text.txt has a single token, and nothing to predict; use a longer"),
        (b"caf\xe9 au lait", "", "error: text.txt is not UTF-8: bad byte 0xe9 at offset 3"),
        (b"ACGT" * 99, "--tokenizer wordpiece", "100% of the tokens of text.txt stand for unknown"),
        (b"short\n" * 9, "--min_line_length 100", "error: text.txt has no text to learn from"),
        (b"ab" * 99, "--val_fraction 0.999", "leaves 0 for training"),
        (b"ab" * 99, "--tokenizer bpe --vocab_size 9", "byte-level BPE needs at least 257"),
        (b"ab" * 99, "--tokenizer nowhere.json", "nowhere.json does not exist"),
        (b"ab" * 99, "--hidden_size 65536 --num_layers 900", "MiB of memory and this machine has"),
        (b"ab" * 99, "--hidden_size 7", "--hidden_size (7) must be divisible by --num_heads (2)"),
    ],
)
def test_bad_input_is_named_before_anything_is_written(
    tmp_path: Path, content: bytes | None, flags: str, message: str
) -> None:
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    result = train(tmp_path, "--file_path", "text.txt", *flags.split())
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs/text/config.json").exists()


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (b"", "", "text.txt has no text to learn from, after cleaning"),
        (b"First", "", "text.txt has a single token, and nothing to predict; use a longer text"),
        (b"to be, or not to be", "", "val_fraction 0.1 of 7 tokens leaves 1 for validation"),
        (b"to be, or not to be", "--preset medium", "val_fraction 0.1 of 7 tokens leaves 1"),
        (b"to be" * 9, "--tokenizer char --val_fraction 0.02", "0.02 of 45 tokens leaves 1"),
        (b"to be" * 9, "--tokenizer wordpiece", "val_fraction 0.1 of 10 tokens leaves 1"),
        (b"to be\n" * 99_999, "--val_fraction 1e-6", "1e-06 of 599994 tokens leaves 1 for val"),
        (b"to be\n" * 99_999, "--val_fraction 0.999999", "0.999999 of 599994 tokens leaves 0 for"),
        (b"to be\n" * 99_999, "--min_line_length 6", "text.txt has no text to learn from, after"),
        (b"to be\n" * 99_999, "--dedup_lines", "val_fraction 0.1 of 3 tokens leaves"),
    ],
)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_text_that_is_too_short_is_refused_before_any_work(
    tmp_path: Path, content: bytes, flags: str, message: str, ending: str
) -> None:
    data = gzip.compress(content) if ending else content
    (tmp_path / f"text.txt{ending}").write_bytes(data)
    result = run_command("train", f"text.txt{ending}", *flags.split(), folder=tmp_path)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and message.replace(".txt", f".txt{ending}") in line
    assert [path.name for path in tmp_path.iterdir()] == [f"text.txt{ending}"]


@pytest.mark.parametrize(("where", "saved"), [("_step", ["step-00000004"]), ("__init__", [])])
def test_an_error_that_nobody_expected_saves_and_is_one_line(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, where: str, saved: list[str]
) -> None:
    original: Any = getattr(Trainer, where)

    def fail(trainer: Trainer, *arguments: object) -> object:
        if where == "__init__" or trainer.progress.step == 4:
            raise ZeroDivisionError("division by zero")
        return original(trainer, *arguments)

    monkeypatch.setattr(Trainer, where, fail)
    result = train(tmp_path, "--file_path", str(text), "--max_steps", "9", "--quiet")
    assert result.returncode == 1
    assert result.stderr == "error: ZeroDivisionError: division by zero\n"
    assert [path.name for path in tmp_path.glob("runs/text/checkpoints/*-*")] == saved


@pytest.mark.subprocess
def test_an_error_ends_the_process_with_one_line(tmp_path: Path, text: Path) -> None:
    """In a process of its own, where Triton is not interpreted."""
    if torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    result = train_in_a_process(tmp_path, "--file_path", str(text), "--impl", "triton")
    assert result.returncode == 1
    assert "this machine has no CUDA GPU" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs/text/config.json").exists()


@pytest.mark.parametrize(
    ("launcher", "remedy"), [("ray", "'ray[train]'"), ("deepspeed", "deepspeed")]
)
def test_launchers_name_what_is_missing(
    launcher: str, remedy: str, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is started, and without the library itself."""
    monkeypatch.setitem(sys.modules, launcher, None)
    monkeypatch.delitem(sys.modules, f"fastllm.integrations.{launcher}", raising=False)
    monkeypatch.delattr(integrations, launcher, raising=False)
    flags = ["--launcher", launcher]
    for more, message in (
        ([], f"--launcher {launcher} needs --num_workers, the number of its processes"),
        (["--num_workers", "17"], "a batch of 16 cannot be sharded over 17 processes"),
        (["--num_workers", "2", "--file_path", "nowhere.txt"], "nowhere.txt"),
        (["--num_workers", "2", "--file_path", str(text)], f"pip install {remedy}"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main([*flags, *more])
        assert message in str(exit_.value)
        assert str(exit_.value).count("\n") == 0


def test_a_single_process_warns_that_there_is_nothing_to_divide(tmp_path: Path, text: Path) -> None:
    result = train(tmp_path, "--file_path", str(text), "--parallel", "fsdp")
    assert result.returncode == 0
    assert "warning: parallel fsdp divides a step among several processes" in result.stderr


def test_cleaning(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a line that is kept\nshort\na line that is kept\n" * 20)
    flags = ("--file_path", "text.txt", "--min_line_length", "6", "--dedup_lines")
    result = train(tmp_path, *flags, "--val_fraction", "0")
    assert result.returncode == 0, result.stderr
    assert "20 tokens of " in result.stderr


def test_profile(tmp_path: Path, text: Path) -> None:
    result = train(tmp_path, "--file_path", str(text), "--max_steps", "14", "--profile")
    assert result.returncode == 0, result.stderr
    trace = json.loads((tmp_path / "runs/text/profile.json").read_text())
    names = " ".join(event.get("name", "") for event in trace["traceEvents"])
    assert "MlpFunction" in names or "addmm" in names  # with or without the extension


def test_an_unusable_out_dir_is_named(tmp_path: Path, text: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = train(tmp_path, "--file_path", str(text), "--out_dir", "file/run")
    assert result.returncode == 1
    assert "file/run" in result.stderr and "Traceback" not in result.stderr
