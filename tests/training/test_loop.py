import json
import math
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import torch

import fastllm
from fastllm.command import no_log
from fastllm.files import locked
from fastllm.training import loop
from fastllm.training.checkpoint import find_checkpoint, load_model, load_training_state
from fastllm.training.config import parse_train_config
from fastllm.training.engine import make_optimizers
from fastllm.training.evaluation import evaluate
from fastllm.training.loop import LoaderError, Trainer, TrainingError, batches
from fastllm.training.metrics import read_metrics
from fastllm.training.run import prepare, resolve, run_folder
from tests.commands import run_command
from tests.conftest import MakeTrainer, make_config


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return list(trainer.model.state_dict().values())


def assert_same_run(a: Trainer, b: Trainer) -> None:
    """Weights, optimizer state and logged losses are equal to the last bit."""
    assert all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))
    for ours, theirs in zip(a.engine.optimizers, b.engine.optimizers, strict=True):
        state = theirs.state_dict()["state"]
        for index, entries in ours.state_dict()["state"].items():
            assert all(torch.equal(entries[name], state[index][name]) for name in entries)
    keys = ("step", "epoch", "loss", "val_loss", "lr", "grad_norm", "tokens")
    lines = [
        [[line[key] for key in keys] for line in read_metrics(t.run_dir / "metrics.jsonl")]
        for t in (a, b)
    ]
    assert lines[0] == lines[1]
    assert a.progress.best_val_loss == b.progress.best_val_loss


def interrupt_before(trainer: Trainer, calls: int) -> None:
    """Sends a signal just before the model's loss is computed for the n-th time."""
    original = trainer.model.loss
    seen = 0

    def loss(*args, **kwargs):
        nonlocal seen
        seen += 1
        if seen == calls:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    trainer.model.loss = loss  # type: ignore[method-assign]


SETTINGS = {
    "dropout": "--max_steps 12 --eval_interval 5",
    "mid-epoch": "--epochs 2 --overlap 8 --batch_size 7",
    "accumulation": "--max_steps 8 --grad_accum 3 --eval_interval 3 --dropout 0.2",
    "muon": "--max_steps 8 --optimizer muon --weight_decay 0.1",
    "schedule": "--max_steps 15 --lr_schedule linear --warmup_steps 4 --optimizer adamw",
    "workers": "--max_steps 8 --num_workers 1",
    "checkpointing": "--max_steps 8 --gradient_checkpointing",
    "bf16": "--max_steps 8 --precision bf16",
    "tied": "--max_steps 8 --tie_word_embeddings --activation gelu_tanh",
}


@pytest.mark.parametrize("point", [1, 4, 7])
@pytest.mark.parametrize("flags", SETTINGS.values(), ids=SETTINGS)
def test_an_interrupted_run_resumes_bit_for_bit(
    make_trainer: MakeTrainer, flags: str, point: int
) -> None:
    """A run can stop at every step, and with accumulation at every batch of a step."""
    whole = make_trainer("whole", *flags.split())
    whole.train()
    first = make_trainer("parts", *flags.split())
    interrupt_before(first, point)
    first.train()
    assert first.stopped_by == signal.SIGTERM
    assert first.progress.step < whole.progress.step
    second = make_trainer("parts", "--resume")
    assert second.progress.step == first.progress.step
    second.train()
    assert_same_run(second, whole)


def test_validating_sampling_and_saving_change_nothing(make_trainer: MakeTrainer) -> None:
    plain = make_trainer("plain", "--max_steps", "9")
    plain.train()
    watched = make_trainer(
        "watched", *"--max_steps 9 --eval_interval 2 --sample_interval 3 --save_interval 1".split()
    )
    watched.train()
    assert all(torch.equal(x, y) for x, y in zip(weights(plain), weights(watched), strict=True))


def test_a_gradient_that_overflows_fp16_is_skipped_and_the_scale_is_saved(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the reference: the CPU kernels do not support fp16."""
    monkeypatch.setattr("fastllm.training.run.choose_precision", lambda *arguments: "fp16")
    trainer = make_trainer("run", "--max_steps", "4")
    trainer.engine.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # which overflows
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with fastllm.use("ref"):
        trainer.train()
    assert all(torch.equal(p, b) for p, b in zip(trainer.model.parameters(), before, strict=True))
    assert trainer.progress.loss_scale["scale"] == 2.0**36
    lines = read_metrics(trainer.run_dir / "metrics.jsonl")
    assert [line["grad_norm"] for line in lines] == [None] * 4
    resumed = make_trainer("run", "--resume", "--max_steps", "40")
    assert resumed.engine.scaler.get_scale() == 2.0**36
    with fastllm.use("ref"):
        resumed.train()
    assert resumed.progress.loss_scale["scale"] < 2.0**36
    moved = zip(resumed.model.parameters(), before, strict=True)
    assert any(not torch.equal(p, b) for p, b in moved)


def test_accumulated_batches_equal_the_big_batch(make_trainer: MakeTrainer) -> None:
    """Even at the end of the text, where batches have different numbers of predicted tokens."""
    flags = "--dropout 0 --val_fraction 0 --optimizer adamw".split()
    big = make_trainer("big", "--batch_size", "8", "--epochs", "2", *flags)
    big.train()
    small = make_trainer("small", "--batch_size", "2", "--grad_accum", "4", "--epochs", "2", *flags)
    small.train()
    steps = [list(read_metrics(t.run_dir / "metrics.jsonl")) for t in (big, small)]
    assert len(steps[0]) == big.progress.step > 20
    for one, other in zip(*steps, strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_more_steps_after_the_end(make_trainer: MakeTrainer) -> None:
    """`--max_steps` counts from the run's beginning."""
    flags = "--eval_interval 5".split()
    whole = make_trainer("whole", "--max_steps", "10", *flags)
    whole.train()
    make_trainer("parts", "--max_steps", "5", *flags).train()
    second = make_trainer("parts", "--resume", "--max_steps", "10")
    second.train()
    assert_same_run(second, whole)
    done = make_trainer("parts", "--resume", "--max_steps", "10")
    done.train()
    assert done.progress.step == 10


@pytest.mark.parametrize(
    ("schedule", "changes"),
    [
        ("cosine", "at 0.005 instead of 0; the run has 20 steps instead of 10"),
        ("linear", "at 0.005 instead of 0; the run has 20 steps instead of 10"),
        ("constant", None),
    ],
)
def test_a_changed_schedule_is_said(
    make_trainer: MakeTrainer, schedule: str, changes: str | None
) -> None:
    flags = f"--max_steps 10 --lr 0.01 --lr_schedule {schedule}"
    make_trainer("run", *flags.split()).train()
    logged: list[str] = []
    for steps in ("10", "20"):
        config = make_trainer("run", "--resume", "--max_steps", steps).config
        prepare(resolve(config, config.out_dir or Path()), logged.append)
    said = [line for line in logged if line.startswith("schedule")]
    assert len(said) == (changes is not None)
    assert not said or str(changes) in said[0]


def test_fixed_settings_cannot_change_when_resuming(make_trainer: MakeTrainer) -> None:
    make_trainer("run", "--max_steps", "1").train()
    with pytest.raises(SystemExit, match="has batch_size 4; it cannot be resumed with 8"):
        make_trainer("run", "--resume", "--batch_size", "8")
    with pytest.raises(SystemExit, match="has tie_word_embeddings False; it cannot be resumed"):
        make_trainer("run", "--resume", "--tie_word_embeddings")


def test_config_json_stays_the_same(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its first write to the end, in every checkpoint and after resuming the run.

    The precision that auto resolved to is the one that the run resumes with, on any machine.
    """
    chosen = []

    def choose(asked: str, *others: object) -> str:
        chosen.append(asked)
        return "bf16" if asked == "auto" else asked

    monkeypatch.setattr("fastllm.training.run.choose_precision", choose)
    flags = "--precision auto --save_interval 1 --keep_checkpoints 9".split()
    trainer = make_trainer("run", "--max_steps", "2", *flags)
    first = (trainer.run_dir / "config.json").read_text()
    assert json.loads(first)["precision"] == "bf16"
    with fastllm.use("ref"):
        trainer.train()
        resumed = make_trainer("run", "--resume")
        resumed.progress.step = 1  # as if its last checkpoint had been that of step 1
        resumed.train()
    files = [trainer.run_dir / "config.json", *trainer.run_dir.glob("checkpoints/*/config.json")]
    assert len(files) == 3
    assert {file.read_text() for file in files} == {first}
    assert chosen == ["auto", "bf16"]


def test_the_text_cannot_change_when_resuming(make_trainer: MakeTrainer, text: Path) -> None:
    make_trainer("run", "--max_steps", "1").train()
    text.write_text(text.read_text().replace("fox", "cat"))
    with pytest.raises(ValueError, match="is not the text that this run began with"):
        make_trainer("run", "--resume")


def test_a_new_run_does_not_overwrite_one(tmp_path: Path, text: Path) -> None:
    flags = f"--file_path {text} --max_steps 1 --out_dir {tmp_path / 'run'} --quiet".split()
    for expected in (0, 1):
        result = run_command("train", *flags)
        assert result.returncode == expected, result.stderr
    assert "holds a run already; --resume continues it" in result.stderr


def test_two_runs_never_share_a_folder(tmp_path: Path, text: Path) -> None:
    config = parse_train_config(["--file_path", str(text)])
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.chdir(tmp_path)
        first, second = (stack.enter_context(run_folder(config, "text")) for _ in range(2))
        assert (str(first), str(second)) == ("runs/text", "runs/text-2")
        for flags in ([], ["--resume"]):
            again = config.model_copy(update={"out_dir": first, "resume": bool(flags)})
            with pytest.raises(ValueError, match="another run is using runs/text; wait"):
                stack.enter_context(run_folder(again, ""))
    assert sorted(tmp_path.glob("runs/*")) == [tmp_path / "runs/text", tmp_path / "runs/text-2"]


def test_a_run_that_cannot_start_leaves_no_folder(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("ab")
    out = tmp_path / "out"
    for flags in (["--tokenizer", "char"], ["--out_dir", str(out)]):
        result = run_command("train", "--file_path", str(text), *flags, folder=tmp_path)
        assert result.returncode == 1 and "text" in result.stderr
    assert not out.exists() and not list(tmp_path.glob("runs/*"))


def test_a_folder_in_use_is_not_removed(tmp_path: Path) -> None:
    """Whoever finds it locked did not make it."""
    config = parse_train_config(["--out_dir", str(tmp_path / "run"), "--threads", "1"])
    with (
        run_folder(config, "") as run_dir,
        pytest.raises(ValueError, match="another run is using"),
        run_folder(config, ""),
    ):
        pass
    assert run_dir.is_dir()


@pytest.mark.processes
def test_a_forked_process_does_not_hold_the_lock(tmp_path: Path) -> None:
    with locked(tmp_path):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
    try:
        is_free = False
        limit = time.monotonic() + 10
        while not is_free and time.monotonic() < limit:  # it may not have come to that yet
            with suppress(BlockingIOError), locked(tmp_path):
                is_free = True
        assert is_free and child.is_alive()
    finally:
        child.kill()
        child.join()


def test_every_sequence_once_an_epoch_in_a_new_order() -> None:
    order = batches(dataset_size=10, batch_size=4, seed=3, epoch=0, first_batch=0)
    epochs = [[next(order) for _ in range(3)] for _ in range(3)]
    for epoch in epochs:
        assert sorted(i for batch in epoch for i in batch) == list(range(10))
    assert epochs[0] != epochs[1] != epochs[2]
    later = batches(10, 4, 3, epoch=1, first_batch=2)
    assert [next(later), next(later)] == [epochs[1][2], epochs[2][0]]


@pytest.mark.parametrize(
    ("schedule", "middle"), [("constant", 1.0), ("cosine", 0.55), ("linear", 0.55)]
)
def test_learning_rates(make_trainer: MakeTrainer, schedule: str, middle: float) -> None:
    flags = f"--max_steps 110 --warmup_steps 10 --lr 1 --min_lr 0.1 --lr_schedule {schedule}"
    trainer = make_trainer("run", *flags.split())
    factors = [trainer.learning_rate_factor(step) for step in range(111)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[10] == 1.0
    assert factors[60] == pytest.approx(middle)
    assert factors[110] == pytest.approx(1.0 if schedule == "constant" else 0.1)


def test_patience_and_the_best_checkpoint(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("run", *"--max_steps 60 --eval_interval 1 --patience 3 --lr 3".split())
    trainer.train()
    best = trainer.progress.best_step
    assert best is not None and trainer.progress.step == best + 3 < 60
    model, _, _ = load_model(trainer.run_dir / f"checkpoints/step-{best:08d}")
    assert trainer.val_set is not None
    loss = evaluate(model, trainer.val_set, 4).loss
    assert loss == pytest.approx(trainer.progress.best_val_loss, rel=1e-6)


def test_time_limit(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("run", "--epochs", "100000", "--max_minutes", "0.01")
    start = time.monotonic()
    trainer.train()
    assert time.monotonic() - start < 20
    assert 0 < trainer.progress.step < trainer.total_steps
    assert trainer.progress.val_loss is not None


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_checkpoints_intact(
    make_trainer: MakeTrainer,
) -> None:
    trainer = make_trainer("run", "--max_steps", "9", "--save_interval", "1")
    original = trainer.model.loss

    def loss(*args, **kwargs):
        return original(*args, **kwargs) * (math.nan if trainer.progress.step == 3 else 1)

    trainer.model.loss = loss  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"loss is nan at step 4. Try a lower --lr"):
        trainer.train()
    model, _, _ = load_model(find_checkpoint(trainer.run_dir))
    assert all(t.isfinite().all() for t in model.state_dict().values())


def test_metrics_lines(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("run", *"--max_steps 20 --log_interval 6 --eval_interval 8".split())
    trainer.train()
    lines = list(read_metrics(trainer.run_dir / "metrics.jsonl"))
    assert [line["step"] for line in lines] == [6, 8, 12, 16, 18, 20]
    assert [line["val_loss"] is not None for line in lines] == [
        False,
        True,
        False,
        True,
        False,
        True,
    ]
    assert set(lines[0]) == {
        "step", "epoch", "loss", "val_loss", "lr", "grad_norm", "tokens", "tokens_per_second",
        "elapsed_s", "rss_mb",
    }  # fmt: skip
    assert lines[-1]["tokens"] == 20 * 4 * 16
    assert lines[0]["grad_norm"] > 0 and lines[0]["tokens_per_second"] > 0


def test_what_was_not_computed_is_null(tmp_path: Path) -> None:
    """The last of 65 training tokens is alone in its sequence, with nothing to predict."""
    text = tmp_path / "short.txt"
    text.write_text("ab" * 34)
    flags = "--max_seq_len 32 --batch_size 1 --val_fraction 0.03 --log_interval 1 --max_grad_norm 0"
    config = make_config(tmp_path / "run", text, *flags.split())
    trainer = prepare(resolve(config, tmp_path / "run"), no_log)
    trainer.train()
    lines = list(read_metrics(trainer.run_dir / "metrics.jsonl"))
    assert sum(line["loss"] is None for line in lines) == 1
    assert all(line["loss"] != 0 and line["grad_norm"] is None for line in lines)


def test_weight_decay_spares_vectors_and_embeddings(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("run", "--weight_decay", "0.1", "--optimizer", "adamw")
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    decayed, spared = trainer.engine.optimizers[0].param_groups
    assert {names[id(p)].split(".")[-2] for p in decayed["params"]} == {
        "qkv_proj", "out_proj", "fc1", "fc2", "lm_head",
    }  # fmt: skip
    assert all(p.ndim == 1 or "embedding" in names[id(p)] for p in spared["params"])
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_tied_weight_decays_like_the_head_and_is_updated_once(
    make_trainer: MakeTrainer, optimizer: str
) -> None:
    flags = "--weight_decay 0.1 --tie_word_embeddings --optimizer".split()
    trainer = make_trainer("run", *flags, optimizer)
    groups = [group for each in trainer.engine.optimizers for group in each.param_groups]
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in trainer.model.parameters())
    tied = trainer.model.embedding_layer.token_embeddings.weight
    decays = [group["weight_decay"] for group in groups if any(p is tied for p in group["params"])]
    assert decays == [0.1]


LONG_RUN = ["--max_steps", "100000", "--val_fraction", "0"]


def train_slowly(run_dir: Path, text: Path, resume: bool) -> None:
    """In a child process: a run that saves after every step."""
    torch.set_num_threads(1)
    flags = ["--resume"] if resume else [*LONG_RUN, "--save_interval", "1"]
    config = make_config(run_dir, text, *flags)
    prepare(resolve(config, run_dir), no_log).train()


@pytest.mark.kill
def test_killed_a_hundred_times(tmp_path: Path, text: Path) -> None:
    """After SIGKILL at any instant there is a whole checkpoint, at most one interval old."""
    # Runs are forked from a server that has imported everything: seconds instead of minutes.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.test_loop"])
    run_dir = tmp_path / "run"
    rng = random.Random(2)
    last_step = -1
    for kill in range(100):
        child = context.Process(target=train_slowly, args=(run_dir, text, last_step >= 0))
        child.start()
        # Early kills may precede the first checkpoint, later ones interrupt saving or pruning.
        limit = time.monotonic() + 60
        metrics = run_dir / "metrics.jsonl"
        size = metrics.stat().st_size if metrics.exists() else 0
        if kill % 4:
            while child.is_alive() and time.monotonic() < limit:
                if metrics.exists() and metrics.stat().st_size != size:
                    break
                time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.06))
        alive = child.is_alive()
        child.kill()
        child.join()
        assert alive, f"run {kill} ended on its own with exit code {child.exitcode}"
        if last_step < 0 and not list(run_dir.glob("checkpoints/step-*")):
            for file in [*run_dir.glob("*.*")]:
                file.unlink()
            continue
        checkpoint = find_checkpoint(run_dir)
        model, _, config = load_model(checkpoint)
        step = load_training_state(checkpoint, model, make_optimizers(model, config)).step
        logged = [line["step"] for line in read_metrics(metrics)]
        # At most one step was logged after the newest checkpoint.
        assert step >= max(last_step, logged[-1] - 1 if logged else 0)
        last_step = step
    assert last_step > 30
    undisturbed = tmp_path / "undisturbed"
    trainer = run_to(undisturbed, text, last_step)
    state = trainer.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_metrics_after_a_step(tmp_path: Path) -> None:
    """From a long file whose last line is still being written."""
    log = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {i}, "loss": {"1" * (i % 50 + 1)}}}\n' for i in range(3, 30_000, 3)]
    log.write_text("".join(lines) + '{"step": 30000, "lo')
    for after in (-1, 0, 3, 4, 8_000, 14_999, 29_990, 29_996):
        steps = [line["step"] for line in read_metrics(log, after)]
        assert steps == [i for i in range(3, 30_000, 3) if i > after]
    assert not list(read_metrics(log, 29_997))
    assert not list(read_metrics(tmp_path / "nowhere", 5))


def run_to(run_dir: Path, text: Path, step: int) -> Trainer:
    """The run of `train_slowly`, stopped by a signal after a step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config = make_config(run_dir, text, *LONG_RUN, "--save_interval", "100000")
    trainer = prepare(resolve(config, run_dir), no_log)
    interrupt_before(trainer, step)
    trainer.train()
    torch.set_num_threads(threads)
    return trainer


STOPPING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.kill
@pytest.mark.parametrize("workers", [0, 1], ids=["alone", "worker"])
@pytest.mark.parametrize("number", STOPPING, ids=[number.name for number in STOPPING])
def test_signals_save_and_exit_with_a_clear_line(
    tmp_path: Path, text: Path, number: signal.Signals, workers: int
) -> None:
    command = [
        *(sys.executable, "-m", "fastllm.train", "--file_path", str(text)),
        *("--out_dir", str(tmp_path / "run"), "--epochs", "100000", "--log_interval", "1"),
        *("--num_workers", str(workers)),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    metrics = tmp_path / "run/metrics.jsonl"
    limit = time.monotonic() + 60
    while time.monotonic() < limit and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.01)
    os.killpg(process.pid, number)  # as a terminal or a service manager does
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"{number.name}: saving and stopping" in errors
    assert f"stopped by {number.name} at step" in errors and "--resume" in errors
    state = json.loads((tmp_path / "run/training_state/progress.json").read_text())
    assert state["step"] == list(read_metrics(metrics))[-1]["step"]


@pytest.mark.kill
def test_a_run_without_a_terminal_goes_on_and_saves_on_sigterm(tmp_path: Path, text: Path) -> None:
    command = [
        *(sys.executable, "-m", "fastllm.train", "--file_path", str(text)),
        *("--out_dir", str(tmp_path / "run"), "--epochs", "100000", "--log_interval", "1"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()  # as `| head -n 1` does
    metrics = tmp_path / "run/metrics.jsonl"
    limit = time.monotonic() + 60
    while time.monotonic() < limit and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.01)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    state = json.loads((tmp_path / "run/training_state/progress.json").read_text())
    assert state["step"] == list(read_metrics(metrics))[-1]["step"]


def test_any_exception_saves_first(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer("run", "--max_steps", "9")

    def record(*arguments: object) -> None:
        if trainer.progress.step == 4:
            raise ZeroDivisionError

    monkeypatch.setattr(loop._Recorder, "record", record)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert find_checkpoint(trainer.run_dir).name == "step-00000004"


def train_with_worker(run_dir: Path, text: Path, prepare_worker: Callable[[int], None]) -> Trainer:
    """A run whose data worker begins with `prepare_worker`."""
    config = make_config(run_dir, text, "--num_workers", "1", "--max_steps", "4")
    trainer = prepare(resolve(config, run_dir), no_log)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_prepare_worker", prepare_worker)
        trainer.train()
    return trainer


def allow_no_files(worker: int) -> None:
    """Shared memory is a file that cannot grow, as when /dev/shm is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def end_at_once(worker: int) -> None:
    os._exit(3)


def never_answer(worker: int) -> None:
    time.sleep(1000)


@pytest.mark.processes
def test_data_workers_need_no_shared_memory(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "WORKER_TIMEOUT_S", 10)
    assert train_with_worker(tmp_path / "run", text, allow_no_files).progress.step == 4


def answer_late(worker: int) -> None:
    time.sleep(2.5 * loop.POLL_S)


@pytest.mark.processes
def test_a_data_worker_that_answers_late_is_waited_for(tmp_path: Path, text: Path) -> None:
    assert train_with_worker(tmp_path / "run", text, answer_late).progress.step == 4


@pytest.mark.processes
@pytest.mark.parametrize("prepare_worker", [end_at_once, never_answer])
def test_data_workers_that_fail_end_the_run_in_one_line(
    tmp_path: Path,
    text: Path,
    prepare_worker: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker that is deaf takes 5 s: PyTorch waits that long for its end."""
    monkeypatch.setattr(loop, "WORKER_TIMEOUT_S", 2)
    with pytest.raises(LoaderError, match="1 processes has failed: .*--num_workers 0") as caught:
        train_with_worker(tmp_path / "run", text, prepare_worker)
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()


@pytest.mark.processes
def test_a_signal_ends_the_wait_for_a_data_worker(tmp_path: Path, text: Path) -> None:
    """It takes 5 s: PyTorch waits that long for a deaf worker's end."""
    timer = threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    trainer = train_with_worker(tmp_path / "run", text, never_answer)
    timer.join()
    assert (trainer.stopped_by, trainer.progress.step) == (signal.SIGTERM, 0)


def test_muon_takes_the_blocks_matrices() -> None:
    config = parse_train_config(["--optimizer", "muon"])
    model = config.build_model(20, 19)
    muon, adam = make_optimizers(model, config)
    assert isinstance(muon, torch.optim.Muon)
    shapes = [tuple(p.shape) for p in muon.param_groups[0]["params"]]
    assert shapes == [(192, 64), (64, 64), (256, 64), (64, 256)] * 2
    counted = sum(len(g["params"]) for o in (muon, adam) for g in o.param_groups)
    assert counted == len(list(model.parameters()))
