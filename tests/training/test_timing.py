"""What a run says about its time, before and while it trains."""

import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fastllm.data import tokens
from fastllm.files import sha256
from fastllm.training import loop
from fastllm.training.distributed import ProcessError, ProcessGroup
from fastllm.training.loop import Trainer
from fastllm.training.metrics import format_duration, read_metrics
from fastllm.training.run import check_shared
from fastllm.training.timing import Timing
from tests.commands import run_command
from tests.conftest import MakeTrainer

SMALL = "--max_seq_len 16 --batch_size 4 --hidden_size 16 --num_layers 1 --threads 1".split()


def timed(trainer: Trainer, steps: int, step_s: float) -> Timing:
    """The timing after so many steps that took so long, the first two ten times as long."""
    timing, progress = Timing(trainer), trainer.progress
    for i in range(steps):
        progress.step += 1
        progress.tokens += 64
        progress.training_s += step_s * (10 if i < 2 else 1)
        timing.update()
    return timing


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.2, "1 s"), (59.4, "59 s"), (59.6, "1 min"), (72, "1 min 10 s"), (599, "10 min"),
        (2341, "39 min"), (3599.6, "1 h"), (7384, "2 h 3 min"), (360_000, "100 h"),
    ],
)  # fmt: skip
def test_durations(seconds: float, expected: str) -> None:
    assert format_duration(seconds) == expected


@pytest.mark.parametrize(("step_s", "steps"), [(0.5, 10), (0.8, 9), (6, 3)])
def test_the_time_is_measured_after_the_warm_up_over_fewer_steps_if_they_are_slow(
    make_trainer: MakeTrainer, step_s: float, steps: int
) -> None:
    trainer = make_trainer("run", *"--max_steps 1000 --val_fraction 0".split())
    timing = timed(trainer, steps - 1, step_s)
    assert not timing.is_measured
    trainer.progress.step += 1
    trainer.progress.tokens += 64
    trainer.progress.training_s += step_s
    timing.update()
    assert timing.is_measured
    assert timing.speed == pytest.approx(64 / step_s)
    assert timing.seconds_after(0) == pytest.approx(1000 * step_s)
    assert timing.seconds_after(1000) == 0
    time = format_duration(1000 * step_s)
    expected = f"about {time} for 1,000 steps (measured over {steps - 2} steps)"
    assert timing.describe() == (expected, None)


def test_validations_take_time_too(make_trainer: MakeTrainer) -> None:
    """A validation is counted as the forwards of its sequences, a third of their steps."""
    trainer = make_trainer("run", *"--max_steps 101 --eval_interval 25".split())
    timing = timed(trainer, 10, 0.1)
    assert trainer.val_set is not None
    validation = len(trainer.val_set) / 4 * 0.1 / 3  # a step has 4 sequences
    assert timing.seconds_after(0) == pytest.approx(10.1 + 5 * validation)
    assert timing.seconds_after(50) == pytest.approx(5.1 + 3 * validation)
    assert timing.seconds_after(100) == pytest.approx(0.1 + validation)


@pytest.mark.parametrize(
    ("flags", "time", "advice"),
    [
        ("--max_minutes 10", "about 2 min 5 s for 1,000 steps, within --max_minutes", None),
        ("--max_minutes 1", "1 min: --max_minutes ends the run at about step 480 of 1,000", None),
        (
            "--max_minutes 1 --lr_schedule cosine",
            "1 min: --max_minutes ends the run at about step 480 of 1,000",
            "; --max_steps 480 makes the schedule end with the run",
        ),
        # The presets' own schedule decays; --max_steps alone would choose another model.
        (
            "--preset tiny --max_minutes 1 --max_seq_len 16",
            "1 min: --max_minutes ends the run at about step 480 of 1,000",
            "; --preset tiny --max_steps 480 makes the schedule end with the run",
        ),
        ("--max_minutes 10 --lr_schedule cosine", "about 2 min 5 s for 1,000 steps", None),
    ],
)
def test_what_ends_the_run_is_said(
    make_trainer: MakeTrainer, flags: str, time: str, advice: str | None
) -> None:
    flags += " --max_steps 1000 --val_fraction 0"
    line, warning = timed(make_trainer("run", *flags.split()), 10, 0.125).describe()
    assert line.startswith(time)
    if advice is None:
        assert warning is None
    else:
        assert warning is not None
        assert warning.startswith("warning: --max_minutes ends the run at about step 480 of 1,000")
        assert warning.endswith(advice)


def test_the_bars_time_left_respects_the_limit(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left = []
    original = loop._Bar.update

    def update(bar: loop._Bar, *arguments: float) -> bool | None:
        left.append(bar.seconds_left)
        return original(bar, *arguments)

    monkeypatch.setattr(loop._Bar, "update", update)
    flags = "--epochs 100000 --lr_schedule linear --max_minutes 0.01"
    trainer = make_trainer("run", *flags.split())
    trainer.train()
    assert left[:9] == [None] * 9
    measured = [seconds for seconds in left if seconds is not None]
    assert len(measured) == trainer.progress.step - 9
    assert measured[0] <= 0.6 and measured == sorted(measured, reverse=True)
    # A quiet run says no more than the warning.
    assert capsys.readouterr().err.strip().startswith("warning: --max_minutes ends the run at")


def test_a_run_says_its_time_once(tmp_path: Path, text: Path) -> None:
    result = run_command(
        "train", *SMALL, "--file_path", str(text), "--max_steps", "30", folder=tmp_path
    )
    assert result.returncode == 0, result.stderr
    pattern = r"time {8}about \d+ s for 30 steps \(measured over 8 steps\)\n"
    assert len(re.findall(pattern, result.stderr)) == 1
    assert "30/30 [" in result.stderr and "step/s" not in result.stderr


def test_there_is_one_speed(tmp_path: Path, text: Path) -> None:
    """Of one line of metrics.jsonl over the whole run, and of the report."""
    flags = "--max_steps 30 --log_interval 100 --eval_interval 30 --out_dir run"
    result = run_command("train", *SMALL, "--file_path", str(text), *flags.split(), folder=tmp_path)
    (line,) = read_metrics(tmp_path / "run/metrics.jsonl")
    found = re.search(r"^speed       (.*) tokens/s$", result.stderr, re.MULTILINE)
    assert found
    assert float(found[1].replace(",", "")) == pytest.approx(line["tokens_per_second"], abs=0.6)
    assert f", {found[1]} tokens/s, " in result.stderr  # the bar


def contents(folder: Path) -> dict[Path, tuple[str, int]]:
    """Digests and times of change of the files in a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: (sha256(path), path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize("data", ["text", "demo"])
def test_a_dry_run_says_the_time_and_leaves_nothing(
    tmp_path: Path, text: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, temporary = tmp_path / "work", tmp_path / "temporary"
    folder.mkdir()
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    file = ["--file_path", str(text)] if data == "text" else []
    for flags in ("", "--out_dir run", "--num_workers 1 --profile --save_interval 1"):
        result = run_command(
            "train", *SMALL, *file, "--max_steps", "3", "--dry_run", *flags.split(), folder=folder
        )
        assert result.returncode == 0, result.stderr
        for name in ("data", "parameters", "memory", "speed"):
            assert re.search(rf"^{name} +\S", result.stdout + result.stderr, re.MULTILINE), (
                result.stderr
            )
        assert re.search(
            r"^time +about \d+ s for 3 steps \(mea", result.stdout + result.stderr, re.MULTILINE
        )
        assert not re.search(
            r"^(run|validation|sample|curves)", result.stdout + result.stderr, re.MULTILINE
        )
        assert not list(folder.iterdir()) and not list(temporary.iterdir())


def test_a_dry_run_of_a_resumed_run_changes_nothing(tmp_path: Path, text: Path) -> None:
    """Also with other settings, which a resumed run would record."""
    run = tmp_path / "run"
    begin = ("--file_path", str(text), "--out_dir", str(run), "--quiet")
    assert run_command("train", *SMALL, *begin, "--max_steps", "3").returncode == 0
    before = contents(run)
    resumed = ("--resume", "--out_dir", str(run), "--max_steps", "20", "--dry_run")
    result = run_command("train", *resumed)
    assert result.returncode == 0, result.stderr
    assert "for 17 more steps (measured over 8 steps)" in result.stdout
    ended = run_command("train", "--resume", "--out_dir", str(run), "--dry_run")
    assert "time        none: the run is at step 3 of 3\n" in ended.stdout
    assert contents(run) == before
    # What a real run refuses, a dry run refuses.
    again = run_command("train", *SMALL, *begin, "--dry_run")
    assert "holds a run already; --resume continues it" in again.stderr
    assert contents(run) == before


def test_a_resumed_dry_run_reads_the_tokens_of_the_run(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(tmp_path / "run")
    begin = ("--file_path", str(text), "--out_dir", run, "--max_steps", "3", "--quiet")
    assert run_command("train", *SMALL, *begin).returncode == 0
    monkeypatch.setattr(tokens, "_write_ids", None)  # tokenizing would fail
    result = run_command("train", "--resume", "--out_dir", run, "--max_steps", "9", "--dry_run")
    assert result.returncode == 0, result.stderr
    monkeypatch.undo()
    before = contents(tmp_path / "run")
    text.write_text(text.read_text().upper().lower() + "the end")
    result = run_command("train", "--resume", "--out_dir", run, "--max_steps", "9", "--dry_run")
    assert "is not the text that this run began with" in result.stderr
    assert contents(tmp_path / "run") == before


def test_a_dry_run_over_machines_that_share_no_folder_is_refused(tmp_path: Path) -> None:
    """The other rank's machine lacks the folder that rank 0 has made."""

    class TwoRanks(ProcessGroup):
        def all_reduce(self, *numbers: float) -> list[float]:
            return [number + 1 for number in numbers]

    check_shared(tmp_path, ProcessGroup())
    for rank in (0, 1):
        with pytest.raises(ProcessError, match="dry_run works in a temporary folder, .* TMPDIR"):
            check_shared(tmp_path, TwoRanks(rank, 2))


def test_a_signal_ends_a_dry_run(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer._step

    def step(trainer: Trainer, *arguments: object) -> object:
        signal.raise_signal(signal.SIGTERM)
        return original(trainer, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "_step", step)
    result = run_command("train", *SMALL, "--file_path", str(text), "--dry_run", folder=tmp_path)
    assert result.returncode == 128 + signal.SIGTERM
    assert "time  " not in result.stdout
    assert not (tmp_path / "runs").exists()


@pytest.mark.subprocess
@pytest.mark.processes
def test_rank_0_speaks_in_a_dry_run_of_two_processes(tmp_path: Path, text: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m"]
    flags = ["--file_path", str(text), "--max_steps", "40", "--dry_run"]
    result = subprocess.run(
        [*command, "fastllm.train", *SMALL, *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
    assert len(re.findall("^time  .* for 40 steps", result.stdout, re.MULTILINE)) == 1
    assert not list(tmp_path.glob("runs*"))
