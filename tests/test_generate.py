import codecs
import io
import json
import math
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastllm.generation import generate_text, generate_tokens
from fastllm.tokenization.pretrained import load_pretrained_tokenizer
from fastllm.training.checkpoint import Progress, find_checkpoint, load_model, save_checkpoint
from tests.commands import run_command
from tests.conftest import MakeTrainer
from tests.hf_models import MODELS, greedy, save_hf_model


def run(module: str, *flags: str) -> "subprocess.CompletedProcess[str]":
    return run_command(module, "--threads", "1", *flags)


@pytest.fixture
def run_dir(make_trainer: MakeTrainer) -> Path:
    trainer = make_trainer("run", "--max_steps", "3")
    trainer.train()
    return trainer.run_dir


@pytest.mark.subprocess
@pytest.mark.parametrize(
    ("module", "more"), [("generate", "--prompt the"), ("evaluate", "--json --file_path")]
)
def test_in_a_process_of_its_own(run_dir: Path, text: Path, module: str, more: str) -> None:
    flags = ["--checkpoint", str(run_dir), *more.split()]
    flags += [str(text)] if module == "evaluate" else []
    result = subprocess.run(
        [sys.executable, "-m", f"fastllm.{module}", *flags],
        capture_output=True, text=True, timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == run(module, *flags).stdout
    assert result.stdout.startswith("the" if module == "generate" else "{")


def test_generate_command(run_dir: Path) -> None:
    flags = ("--checkpoint", str(run_dir), "--max-new-tokens", "40", "--seed", "3")
    first, again = (
        run("generate", *flags, "--prompt", "the"),
        run("generate", *flags, "--prompt", "the"),
    )
    assert first.returncode == 0, first.stderr
    assert first.stdout == again.stdout
    assert first.stdout.startswith("the") and len(first.stdout) == 3 + 40 + 1
    wrong = run("generate", *flags, "--prompt", "the Quick")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: Character 'Q' not found")
    assert wrong.stdout == ""
    missing = run("generate", "--checkpoint", str(run_dir / "nowhere"), "--prompt", "the")
    assert missing.returncode == 1
    assert "nowhere does not exist" in missing.stderr


def test_generate_command_on_a_file_of_prompts(run_dir: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the quick\n\nfox\n")
    flags = f"--checkpoint {run_dir} --prompt_file {prompts} --max_new_tokens 20".split()
    rounded = ("--quantize int8", "--quantize int4", "--precision auto")
    for more in ("", *rounded, "--temperature 0 --min_p 0.1"):
        result = run("generate", *flags, *more.split())
        assert result.returncode == 0, result.stderr
        first, second = result.stdout.split("\n---\n")
        assert first.startswith("the quick") and len(first) == 9 + 20
        assert second.startswith("fox") and len(second) == 3 + 20 + 1
    for wrong, message in (
        ("--prompt the", "give either --prompt or --prompt_file"),
        ("--quantize int8 --precision bf16", "exclude each other"),
        ("--prompt_file nowhere.txt", "nowhere.txt does not exist"),
    ):
        result = run("generate", *flags, *wrong.split())
        assert result.returncode == 1 and message in result.stderr
    lines = [word for word in "the quick brown fox jumps over a lazy dog".split() for _ in range(2)]
    prompts.write_text("\n".join(lines))
    together = run("generate", *flags, "--seed", "5").stdout.split("\n---\n")
    assert len(together) == len(lines) == 18  # more than a batch
    for b in (0, 15, 16, 17):
        prompts.write_text(lines[b])
        alone = run("generate", *flags, "--seed", str(5 + b)).stdout
        assert alone.strip("\n") == together[b].strip("\n")
    prompts.write_text("\n")
    assert "has no line to continue" in run("generate", *flags).stderr


def test_the_prompt_and_its_continuation_read_as_one_text(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """What is printed is what the tokens of the prompt and the new ones decode to."""
    made = "--tokenizer wordpiece --vocab_size 60 --max_steps 3 --seed 1"
    trainer = make_trainer("run", *made.split())
    trainer.train()
    model, tokenizer, _ = load_model(find_checkpoint(trainer.run_dir))
    prompts = tmp_path / "prompts.txt"
    lines = ["the qui", "brown fox", "the lazy "]
    prompts.write_text("\n".join(lines))
    flags = f"--checkpoint {trainer.run_dir} --max_new_tokens 20 --temperature 0".split()
    together = run("generate", *flags, "--prompt_file", str(prompts)).stdout.split("\n---\n")
    for line, text in zip(lines, together, strict=True):
        tokens = tokenizer.encode(line)
        tokens += generate_tokens(model.eval(), tokens, 20, temperature=0)
        whole = tokenizer.decode(tokens)
        assert text.removesuffix("\n") == whole
        assert run("generate", *flags, "--prompt", line).stdout == whole + "\n"
        assert line + "".join(generate_text(model, tokenizer, line, 20, temperature=0)) == whole
        stop = whole[len(line) : len(line) + 2]
        stopped = run("generate", *flags, "--prompt", line, "--stop", stop).stdout
        assert stopped == whole[: whole.index(stop, len(line.rstrip()))] + "\n"


def typed(data: bytes, at_terminal: bool) -> io.TextIOWrapper:
    stdin = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")
    stdin.isatty = lambda: at_terminal  # type: ignore[method-assign]
    return stdin


def test_without_a_prompt_standard_input_is_continued(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = f"--checkpoint {run_dir} --max_new_tokens 20".split()
    for data, prompt in (
        (b"the quick", "the quick"),
        (b"the quick\nbrown\n", "the quick\nbrown"),
        (codecs.BOM_UTF8 + b"the\r\nfox\r\n", "the\nfox"),
    ):
        monkeypatch.setattr(sys, "stdin", typed(data, at_terminal=False))
        result = run("generate", *flags)
        assert result.returncode == 0, result.stderr
        assert result.stdout == run("generate", *flags, "--prompt", prompt).stdout
    for stdin, message in (
        (typed(b"", False), "there is no prompt on standard input; give --prompt"),
        (typed(b"\n", False), "there is no prompt on standard input"),
        (typed(b"the \xff", False), "standard input is not UTF-8: invalid start byte, byte 4"),
        (typed(b"the Q", False), "Character 'Q' not found"),
        (None, "there is no prompt on standard input"),
    ):
        monkeypatch.setattr(sys, "stdin", stdin)
        result = run("generate", *flags)
        assert result.returncode == 1 and result.stdout == ""
        assert result.stderr.startswith(f"error: {message}")


def test_without_a_prompt_a_terminal_is_asked_for_some(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Empty lines are skipped, and a prompt with an error does not end the loop."""
    flags = f"--checkpoint {run_dir} --max_new_tokens 20".split()
    monkeypatch.setattr(sys, "stdin", typed(b"the\n\nQ\nfox", at_terminal=True))
    result = run("generate", *flags, "--seed", "4")
    assert result.returncode == 0
    assert "error: Character 'Q' not found" in result.stderr
    texts = [
        run("generate", *flags, "--prompt", prompt, "--seed", seed).stdout
        for prompt, seed in (("the", "4"), ("fox", "6"))
    ]
    assert result.stdout == "".join(texts) + "\n"


@pytest.mark.subprocess
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals like these")
def test_the_prompt_loop_in_a_terminal(run_dir: Path) -> None:
    """Ctrl-C stops a text and keeps the loop; Ctrl-D ends it."""
    import pty

    pid, terminal = pty.fork()
    if pid == 0:
        command = [sys.executable, "-m", "fastllm.generate", "--checkpoint", str(run_dir)]
        os.execv(sys.executable, [*command, "--threads", "1", "--max_new_tokens", "10000000"])
    try:
        shown = ""

        def wait_for(part: str) -> None:
            nonlocal shown
            while part not in shown:
                assert select.select([terminal], [], [], 100)[0], shown
                shown += os.read(terminal, 4096).decode(errors="replace")
            shown = shown.partition(part)[2]

        wait_for("> ")
        for _ in range(2):
            os.write(terminal, b"the quick\n")
            wait_for("the quick")  # the terminal's echo
            wait_for("the quick")
            os.write(terminal, b"\x03")
            wait_for("\n> ")
        os.write(terminal, b"\x04")
        _, status = os.waitpid(pid, 0)
        pid = 0
        assert os.waitstatus_to_exitcode(status) == 0
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(terminal)


def test_evaluate_command(run_dir: Path, text: Path) -> None:
    flags = ("--checkpoint", str(run_dir), "--file_path", str(text))
    result = run("evaluate", *flags, "--json")
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert set(values) == {"loss", "perplexity", "bits_per_character", "bits_per_byte", "tokens"}
    assert values["tokens"] == len(text.read_text()) - 1
    assert values["bits_per_character"] == pytest.approx(values["loss"] / 0.6931472, rel=1e-5)
    assert "bits per character" in run("evaluate", *flags).stdout
    for rounded in ("--quantize int8", "--precision auto"):
        again = run("evaluate", *flags, "--json", *rounded.split())
        assert again.returncode == 0, again.stderr
        assert json.loads(again.stdout)["loss"] == pytest.approx(values["loss"], rel=0.01)
    assert json.loads(run("evaluate", *flags, "--json", "--quantize", "int8").stdout) != values
    text.write_text("the QUICK fox")
    wrong = run("evaluate", *flags)
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: Character 'Q' not found")


def test_evaluate_a_model_whose_scores_are_not_numbers(run_dir: Path, text: Path) -> None:
    model, tokenizer, config = load_model(find_checkpoint(run_dir))
    flags = ("--checkpoint", str(run_dir), "--file_path", str(text), "--json")
    for scale, message in ((float("nan"), "error: the loss is nan: the weights may"), (1e6, "")):
        model.final_norm.weight.data.fill_(scale)  # a million overflows the perplexity
        save_checkpoint(run_dir, config, tokenizer, model, [], Progress(step=4))
        result = run("evaluate", *flags)
        assert result.returncode == bool(message) and result.stderr.startswith(message)
        if not message:
            assert json.loads(result.stdout)["perplexity"] is None
            assert json.loads(result.stdout)["loss"] > 700
            assert "unknown" in run("evaluate", *flags[:-1]).stdout


HF_PROMPTS = ["What's in a name? 世", "That which we", " rose"]


@pytest.fixture(params=MODELS)
def hf_model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Any, Any]:
    """A folder in Hugging Face's format, and what transformers loads from it."""
    folder = tmp_path / "small"
    return folder, *save_hf_model(folder, request.param)


def text_of(folder: Path, ids: list[int]) -> str:
    """The text of prompt and continuation, without what the model expects around it."""
    tokenizer = load_pretrained_tokenizer(folder, max(ids) + 1)
    return tokenizer.decode(ids[len(tokenizer.start_tokens) :])


def test_greedy_text_is_that_of_transformers(hf_model: tuple[Path, Any, Any]) -> None:
    folder, model, tokenizer = hf_model
    flags = f"--checkpoint {folder} --temperature 0 --max_new_tokens 40".split()
    texts = [text_of(folder, greedy(model, tokenizer, prompt, 40)) for prompt in HF_PROMPTS]
    for prompt, text in zip(HF_PROMPTS, texts, strict=True):
        result = run("generate", *flags, "--prompt", prompt)
        assert result.stdout == text + "\n"
        assert result.stderr == "texts end at </s>\n"
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(HF_PROMPTS))
    together = run("generate", *flags, "--prompt_file", str(prompts)).stdout
    assert together == "\n---\n".join(texts) + "\n"


def test_generation_config_is_honoured(hf_model: tuple[Path, Any, Any]) -> None:
    """Texts end where transformers ends them, and penalties count without sampling too."""
    folder, model, tokenizer = hf_model
    ids = greedy(model, tokenizer, HF_PROMPTS[1], 40)
    ends = [ids[-20], ids[-30]]
    model.generation_config.eos_token_id = ends
    model.generation_config.repetition_penalty = 1.7
    model.generation_config.save_pretrained(folder)
    flags = f"--checkpoint {folder} --max_new_tokens 40 --prompt".split()
    spelt = " or ".join(tokenizer.decode([id]) for id in sorted(ends))
    for prompt in HF_PROMPTS:
        *shown, last = greedy(model, tokenizer, prompt, 40)
        text = text_of(folder, shown if last in ends else [*shown, last])
        result = run("generate", *flags, prompt, "--temperature", "0")
        assert result.stdout == text + "\n"
        assert f"sets repetition_penalty 1.7; texts end at {spelt}\n" in result.stderr
    assert last in ends or len(shown) == len(tokenizer(prompt)["input_ids"]) + 39


def test_sampling_of_the_file_and_of_the_flags(hf_model: tuple[Path, Any, Any]) -> None:
    folder, _, _ = hf_model
    flags = f"--checkpoint {folder} --max_new_tokens 20 --prompt rose".split()
    ours = run("generate", *flags).stdout
    file = {"do_sample": False, "temperature": 2.5, "top_k": 9, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(file))
    result = run("generate", *flags)
    assert (result.stdout, result.stderr) == (ours, "texts end at </s>\n")
    (folder / "generation_config.json").write_text(json.dumps({**file, "do_sample": True}))
    result = run("generate", *flags)
    said = "generation_config.json sets temperature 2.5, top_k 9, top_p 0.9; texts end at </s>\n"
    assert result.stderr == said
    explicit = "--temperature 2.5 --top_k 9 --top_p 0.9".split()
    again = run("generate", *flags, *explicit)
    assert (again.stdout, again.stderr) == (result.stdout, "texts end at </s>\n")
    # A flag counts even if it is the default.
    plain = run("generate", *flags, *"--temperature 0.8 --top_k 0 --top_p 1".split())
    assert (plain.stdout, plain.stderr) == (ours, "texts end at </s>\n")


@torch.no_grad()
def perplexity_of_transformers(model: Any, ids: torch.Tensor, window: int, stride: int) -> float:
    """The sum of losses as in transformers' guide to perplexity, over all predictions."""
    total, count, before = 0.0, 0, 0
    for begin in range(0, ids.size(1), stride):
        end = min(begin + window, ids.size(1))
        labels = ids[:, begin:end].clone()
        labels[:, : -(end - before)] = -100
        predicted = int((labels[:, 1:] != -100).sum())
        if predicted:
            total += float(model(ids[:, begin:end], labels=labels).loss) * predicted
            count += predicted
        before = end
        if end == ids.size(1):
            break
    return math.exp(total / count)


@pytest.mark.parametrize(("window", "stride"), [(64, 63), (64, 32), (30, 1), (17, 5)])
def test_sliding_windows_score_as_in_transformers(
    hf_model: tuple[Path, Any, Any], text: Path, window: int, stride: int
) -> None:
    folder, model, tokenizer = hf_model
    text.write_text(text.read_text()[:600] + "世")
    ids = tokenizer(text.read_text(), return_tensors="pt")["input_ids"]
    flags = f"--checkpoint {folder} --max_seq_len {window} --stride {stride} --json".split()
    result = run("evaluate", *flags, "--file_path", str(text), "--batch_size", "3")
    values = json.loads(result.stdout)
    expected = perplexity_of_transformers(model, ids, window, stride)
    assert values["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert values["tokens"] == ids.size(1) - 1
    begins = tokenizer.decode(ids[0, :1]) == "<s>"
    assert result.stderr == begins * "the text begins with <s>, which the model expects there\n"
    content = text.read_text()
    bits = values["loss"] / math.log(2) * (ids.size(1) - begins)
    assert values["bits_per_character"] == pytest.approx(bits / len(content))
    assert values["bits_per_byte"] == pytest.approx(bits / len(content.encode()))


def test_windows_of_a_run(run_dir: Path, text: Path) -> None:
    """Every token is predicted once; with a smaller stride, from more tokens before it."""
    flags = ("--checkpoint", str(run_dir), "--file_path", str(text), "--json")
    whole = json.loads(run("evaluate", *flags).stdout)
    for stride in (15, 8, 1):
        values = json.loads(run("evaluate", *flags, "--stride", str(stride)).stdout)
        assert values["tokens"] == whole["tokens"]
        assert (values == whole) == (stride == 15)
    for wrong, message in (
        ("--stride 16", "--stride must be less than the window of 16 tokens"),
        ("--max_seq_len 8 --stride 8", "--stride must be less than the window of 8 tokens"),
        ("--max_seq_len 17", "--max_seq_len 17 is more than the model's 16"),
        ("--stride 0", "--stride must be greater than or equal to 1"),
    ):
        result = run("evaluate", *flags, *wrong.split())
        assert result.returncode == 1 and message in result.stderr
