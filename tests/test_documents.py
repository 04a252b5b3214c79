"""README and docs: their commands and code work, and a translation has the whole content.

Links are checked by `make docs`.
"""

import re
import shlex
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from fastllm.compare import CompareConfig
from tests.commands import run_command
from tests.conftest import REPOSITORY

PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])
TRANSLATIONS = [page for page in PAGES if page.name.endswith(".zh.md")]
COMMANDS = [
    file.stem
    for file in sorted((REPOSITORY / "fastllm").glob("[!_]*.py"))
    if "\ndef main(" in file.read_text("utf-8")
]
COMMAND = re.compile(r"(?:^|\s)(?:fastllm |-m fastllm\.)(\w+)(.*)")


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def blocks(page: Path, language: str) -> list[str]:
    """The contents of the fenced code of this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), re.S | re.M)


@cache
def flags_of(command: str) -> set[str]:
    result = run_command(command, "--help")
    assert result.returncode == 0
    return set(re.findall(r"--[\w-]+", result.stdout))


def commands_in(page: Path) -> Iterator[tuple[str, list[str]]]:
    """The commands in the page's shell code with their arguments."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if match := COMMAND.search(line.split("  #")[0]):
                yield match[1], shlex.split(match[2], comments=True)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_have_the_flags_that_the_page_gives_them(page: Path) -> None:
    for command, arguments in commands_in(page):
        assert command in COMMANDS, f"fastllm {command}"
        own, rest = arguments, []
        if "--" in arguments:  # what tune hands on to its trials
            cut = arguments.index("--")
            own, rest = arguments[:cut], arguments[cut + 1 :]
        trial = own[own.index("--command") + 1] if "--command" in own else "train"
        for given, known in ((own, flags_of(command)), (rest, flags_of(trial))):
            unknown = {each for each in given if each.startswith("--")} - known
            assert not unknown, f"fastllm {command} {shlex.join(arguments)}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_in_the_text_exist(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.S | re.M)
    flags = {
        flag.replace("-", "_").replace("__", "--", 1).replace("--no_", "--no-")
        for code in re.findall(r"`(--[^`]+)`", prose)
        for flag in re.findall(r"--\w[\w-]+", code)
    }
    known = {"--help"}.union(*map(flags_of, COMMANDS))
    known |= {"--max_restarts", "--rdzv_endpoint"}  # torchrun's
    known |= {"--post_norm", "--bucket_mb"}  # train's --no-norm_first; of benchmarks/scaling.py
    assert flags <= known


def test_code_of_the_readme_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("It was the best of times, it was the worst of times.\n" * 400)
    (code,) = blocks(REPOSITORY / "README.md", "python")
    exec(code, {})
    losses = [float(line) for line in capsys.readouterr().out.split()]
    assert len(losses) == 21 and losses[-1] < losses[0] - 0.5


def test_git_ignores_what_the_readme_has_written() -> None:
    """Models, and the default output of every command in it that has one."""
    text = (REPOSITORY / "README.md").read_text("utf-8")
    written = ["runs", str(CompareConfig.model_fields["out"].default)]
    written += re.findall(r"(?:save|export)_model\(.*['\"]([\w-]+)['\"]\)", text)
    assert len(written) == 4
    folders = [f"{name}/" if "." not in name else name for name in written]
    found = subprocess.run(
        ["git", "check-ignore", *folders], cwd=REPOSITORY, capture_output=True, text=True
    )
    if found.returncode == 128:
        pytest.skip("not a git repository")
    assert found.stdout.split() == folders


def outline(page: Path) -> dict[str, list[str]]:
    """What a translation shares with its page: headings, code without comments, rows, links."""
    text = page.read_text("utf-8")
    code = re.findall(r"^```.*?^```$", text, re.S | re.M)
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)
    links = [re.sub(r"#.*|\.zh(?=\.md)", "", link) for link in re.findall(r"\]\(([^)]+)\)", prose)]
    return {
        "headings": re.findall(r"^#+", prose, re.M),
        "code": [re.sub(r"\s*#.*", "", each) for each in code],
        "rows": [str(row.count("|")) for row in re.findall(r"^\|.*", prose, re.M)],
        "links": sorted(link for link in links if link != page.name.replace(".zh", "")),
        "paragraphs": [str(len(re.findall(r"\n\n+(?=[^\n|#])", prose)))],
    }


@pytest.mark.parametrize("translation", TRANSLATIONS, ids=name_of)
def test_translation_has_the_whole_content(translation: Path) -> None:
    original = translation.with_name(translation.name.replace(".zh", ""))
    assert outline(translation) == outline(original)


def test_readme_is_short_and_pictures_are_small() -> None:
    for page in ("README.md", "README.zh.md"):
        assert len((REPOSITORY / page).read_text("utf-8").splitlines()) <= 220
    pictures = (REPOSITORY / "docs").glob("*.png")
    assert sum(picture.stat().st_size for picture in pictures) < 200_000
