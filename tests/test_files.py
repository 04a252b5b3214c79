"""What replaces files and folders, and what a kill or an error leaves of it."""

import os
from pathlib import Path

import pytest

from fastllm import files
from fastllm.files import tidy, writing_aside


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, "old")
    (tmp_path / "notes.txt").write_text("mine")
    return tmp_path


def write(folder: Path, text: str) -> None:
    (folder / "model/weights").mkdir(parents=True)
    for name in ("model/weights/1.txt", "model/config.txt", "card.txt"):
        (folder / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def whole(text: str) -> dict[str, str]:
    names = ("model/weights/1.txt", "model/config.txt", "card.txt")
    return {**dict.fromkeys(names, text), "notes.txt": "mine"}


def test_files_and_folders_are_replaced_and_others_stay(folder: Path) -> None:
    (folder / "model/only in the old one.txt").write_text("old")
    with writing_aside(folder) as aside:
        write(aside, "new")
        assert content(aside).keys() == whole("").keys() - {"notes.txt"}
    assert content(folder) == whole("new")
    with writing_aside(folder / "deep" / "down") as aside:
        write(aside, "first")
    assert len(content(folder / "deep/down")) == 3


def test_everything_is_on_the_disk_before_it_gets_its_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    flush, rename = files.flush, Path.rename
    monkeypatch.setattr(
        files, "flush", lambda path: (events.append(("flush", path.name)), flush(path))
    )
    monkeypatch.setattr(
        Path, "rename", lambda path, to: (events.append(("name", to.name)), rename(path, to))
    )
    with writing_aside(folder) as aside:
        write(aside, "new")
    flushed = {name for event, name in events[:5] if event == "flush"}
    assert flushed == {"model", "weights", "1.txt", "config.txt", "card.txt"}
    assert events[-1] == ("flush", folder.name)
    assert [name for event, name in events if event == "name" and name != "card.txt"] == [
        "replaced-model", "model",
    ]  # fmt: skip


@pytest.mark.parametrize("fails", ["block", "flush", "replaced-model", "model"])
def test_an_error_leaves_what_was_there(
    folder: Path, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError("the disk is full")

    rename = Path.rename

    def fail_at_name(path: Path, to: Path) -> Path:
        if to.name == fails and path.parent.name.startswith("writing-") == (fails == "model"):
            fail()
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fail_at_name)
    if fails == "flush":
        monkeypatch.setattr(files, "flush", fail)
    with pytest.raises(OSError, match="the disk is full"), writing_aside(folder) as aside:
        (aside / "model").mkdir()
        if fails == "block":
            fail()
    assert content(folder) == whole("old")


@pytest.mark.parametrize("name", ["replaced-model", "model", "card.txt"])
def test_a_kill_before_a_rename_leaves_the_old_or_the_new(folder: Path, name: str) -> None:
    child = os.fork()
    if not child:
        rename = Path.rename

        def die(path: Path, to: Path) -> Path:
            if to.name == name:
                os._exit(9)
            return rename(path, to)

        Path.rename = die  # type: ignore[method-assign]
        with writing_aside(folder) as aside:
            write(aside, "new")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    tidy(folder, "*")
    assert content(folder).keys() == whole("").keys()
    assert {path.name for path in folder.iterdir()} == {"model", "card.txt", "notes.txt"}
    model = {text for path, text in content(folder).items() if path.startswith("model")}
    assert len(model) == 1  # never a mixture
    with writing_aside(folder) as aside:
        write(aside, "newer")
    assert content(folder) == whole("newer")


def test_leftovers_of_a_kill_while_removing(folder: Path) -> None:
    (folder / "removing-model").mkdir()
    (folder / "replaced-card.txt").mkdir()  # its successor is there
    (folder / f"writing-{'0' * 32}").mkdir()
    tidy(folder, "*")
    assert content(folder) == whole("old")
    assert {path.name for path in folder.iterdir()} == {"model", "card.txt", "notes.txt"}


def test_folders_of_others_are_left_alone(folder: Path) -> None:
    for name in ("writing-samples", "removing-wallpaper", "replaced-parts"):
        (folder / name).mkdir()
    before = sorted(folder.iterdir())
    tidy(folder, "model")
    assert sorted(folder.iterdir()) == before
