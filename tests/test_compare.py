"""The compare command, on the files that runs of train and finetune leave."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastllm.compare import table
from tests.commands import run_command


def make_run(folder: Path, losses: list[float | None], **settings: Any) -> Path:
    folder.mkdir(parents=True)
    lines = [
        {"step": 10 * i, "loss": 5.0 - i, "val_loss": loss, "elapsed_s": 2.0 * i}
        for i, loss in enumerate(losses, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.json").write_text(json.dumps({"fastllm_version": "0", **settings}))
    return folder


def test_the_table_shows_losses_and_the_settings_that_differ(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", [None, 3.5, 3.25], lr=0.001, seed=0, file_path="x.txt", threads=1)
    b = make_run(tmp_path / "b", [4.5, float("nan")], lr=0.01, seed=0, dataset=["x", "y"])
    result = run_command("compare", str(a), str(b), "--out", "c.svg", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    heading, first, second = map(str.split, result.stdout.splitlines())
    assert " ".join(heading) == "run steps seconds loss val_loss best at step lr file_path dataset"
    assert " ".join(first) == "a 30 6 2 3.2500 3.2500 30 0.001 x.txt -"
    assert " ".join(second) == "b 20 4 3 nan 4.5000 10 0.01 - x y"
    assert "seed" not in heading and "threads" not in heading
    svg = (tmp_path / "c.svg").read_text()
    assert "<svg" in svg


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_pictures(tmp_path: Path, suffix: str) -> None:
    run = make_run(tmp_path / "a", [None])  # without a validation, and alone
    result = run_command("compare", str(run), "--out", f"c.{suffix}", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    begin = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert (tmp_path / f"c.{suffix}").read_bytes().startswith(begin)


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    for folder in ("x/run", "y/run"):
        make_run(tmp_path / folder, [1.0])
    result = run_command("compare", "x/run", "y/run", folder=tmp_path)
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["run", "x/run", "y/run"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("nowhere", "nowhere does not exist; give the folders of runs"),
        ("a a/", "a run is given twice"),
        ("a broken", "broken/config.json is not a run's config.json"),
        ("a --out curves.txt", "--out must end in .png, .svg or .pdf"),
        ("", "--runs is required"),
    ],
)
def test_what_cannot_be_compared(tmp_path: Path, flags: str, message: str) -> None:
    make_run(tmp_path / "a", [1.0])
    (make_run(tmp_path / "broken", [1.0]) / "config.json").write_text("{")
    result = run_command("compare", *flags.split(), folder=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {message}")
    assert not list(tmp_path.glob("compare.*"))


def test_columns_line_up() -> None:
    lines = table([{"run": "a", "x": 10, "y": None}, {"run": "longer", "x": 1.5, "y": "z"}])
    assert lines == ["run          x  y", "a           10  -", "longer  1.5000  z"]
