"""Which files are meant, and the text in files of every format."""

import codecs
import csv
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fastllm.data.sources import Texts, absolute, find_texts

ROWS = ["one, two", 'a "quoted"\nline', "é世\U0001f600", ""]
ZSTD = b"\x28\xb5\x2f\xfd\x20\x04\x21\x00\x00text"  # "text", uncompressed in a frame
TEXT = 'one, two\na "quoted"\nline\né世\U0001f600\n'


def text_of(*files: Path, column: str = "text") -> str:
    return "".join(Texts(files, column).pieces())


def find(words: str | Path | list[str | Path]) -> list[Path]:
    return list(find_texts(words).files)


def write_csv(path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "text"])
        rows.writerows(enumerate(ROWS))


def write_jsonl(path: Path) -> None:
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(ROWS)]
    path.write_text("\n".join([*lines, "", '{"text": null}']), encoding="utf-8")


def write_parquet(path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    parquet.write_table(arrow.table({"id": range(len(ROWS)), "text": ROWS}), path)


WRITERS: dict[str, Callable[[Path], object]] = {
    ".txt": lambda path: path.write_text(TEXT, encoding="utf-8"),
    ".other": lambda path: path.write_bytes(codecs.BOM_UTF8 + TEXT.encode()),
    ".csv": write_csv,
    ".jsonl": write_jsonl,
    ".parquet": write_parquet,
}


def compress(path: Path, ending: str) -> Path:
    result = path.with_name(path.name + ending)
    if ending == ".zst":
        arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        with arrow.CompressedOutputStream(arrow.OSFile(str(result), "wb"), "zstd") as stream:
            stream.write(path.read_bytes())
    elif ending:
        result.write_bytes({".gz": gzip, ".xz": lzma}[ending].compress(path.read_bytes()))
    return result


@pytest.mark.parametrize("compression", ["", ".gz", ".xz", ".zst"])
@pytest.mark.parametrize("ending", WRITERS)
def test_every_format_gives_the_same_text(ending: str, compression: str, tmp_path: Path) -> None:
    if ending == ".parquet" and compression:
        ending = ".csv"  # Parquet compresses on its own
    path = tmp_path / f"data{ending}"
    WRITERS[ending](path)
    text = text_of(compress(path, compression))
    assert text.rstrip("\n") == TEXT.rstrip("\n")


def test_files_follow_each_other_on_lines_of_their_own(tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in "abc")
    first.write_text("a")
    second.write_text("b\n")
    third.write_text("c")
    assert text_of(first, second, third) == "a\nb\nc"


def test_a_column_is_chosen_or_named(tmp_path: Path) -> None:
    for ending in (".csv", ".jsonl", ".parquet"):
        path = tmp_path / f"data{ending}"
        WRITERS[ending](path)
        with pytest.raises(ValueError, match=f"{path} has no column 'body'.*--text_column: id, "):
            text_of(path, column="body")
    path.with_suffix(".jsonl").write_text('{"body": "x"}')
    assert text_of(path.with_suffix(".jsonl"), column="body") == "x\n"


def test_folders_patterns_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "B [2]"
    (folder / "sub").mkdir(parents=True)
    for name in ("a?.txt", "a1.txt", "sub/b.csv.gz", "picture.png", "[c].txt", "c.txt"):
        (folder / name).touch()
    monkeypatch.chdir(folder)
    assert find("a?.txt") == [Path("a?.txt")]
    assert find("[c].txt") == [Path("[c].txt")]
    assert find("a*.txt") == [Path("a1.txt"), Path("a?.txt")]
    assert find(["c.txt", "a1.txt"]) == [Path("c.txt"), Path("a1.txt")]
    names = ["[c].txt", "a1.txt", "a?.txt", "c.txt", "sub/b.csv.gz"]
    assert [str(path) for path in find(".")] == names
    for word in ("a?.txt", "a*.txt", "c.txt", "sub"):
        given, kept = find(word), absolute(word)
        monkeypatch.chdir(tmp_path)
        assert find(kept) == [folder / path for path in given]
        monkeypatch.chdir(folder)


@pytest.mark.parametrize("name", ["no.txt", "no*.txt", "[no].txt"])
def test_files_that_do_not_exist(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no text"):
        find(tmp_path / "empty")
    (tmp_path / "broken.txt").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match="broken.txt is a link"):
        find(tmp_path / "broken.txt")


def test_pipes_are_refused_unread(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match="pipe is a pipe or a device, which cannot be read twice"):
        find(pipe)


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.txt", b"\x89PNG\r\n\x1a\n\0", "a PNG image"),
        ("a.jpg", b"\xff\xd8\xff\xe0\0\x10JFIF", "a JPEG image"),
        ("a.pdf", b"%PDF-1.7\n%\xe2\xe3", "a PDF document"),
        ("a.docx", b"PK\x03\x04\x14\0", "a Word document"),
        ("a.epub", b"PK\x03\x04\x14\0", "an EPUB book"),
        ("a", b"PK\x03\x04\x14\0", "a ZIP archive"),
        ("a.txt", gzip.compress(b"text"), "compressed by gzip"),
        ("a.txt", "text".encode("utf-16"), "text in UTF-16.*iconv"),
        ("a.bin", b"some\0thing", "a binary file"),
        ("a.gz", gzip.compress(b"%PDF-1.7"), "a PDF document"),
        ("a.csv", b"MZ\x90\0", "a program"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_text_is_named(name: str, content: bytes, kind: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is not text but {kind}"):
        text_of(tmp_path / name)


def test_folders_leave_out_runs_and_what_is_hidden(tmp_path: Path) -> None:
    for name in (
        "a.txt",
        ".hidden/b.txt",
        "runs/one/metrics.jsonl",
        "runs/one/tokens.bin",
        ".c.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    assert find(tmp_path) == [tmp_path / "a.txt"]


def test_a_file_that_is_named_twice_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    assert find([tmp_path / "a.txt", tmp_path, str(tmp_path / "*.txt")]) == [tmp_path / "a.txt"]


def test_the_beginnings_of_texts_are_checked(tmp_path: Path) -> None:
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    files[0].write_text("text")
    find_texts(files[:1]).check()
    files[1].write_bytes(b"%PDF-1.7\n%\xe2\xe3")
    with pytest.raises(ValueError, match="b.txt is not text but a PDF"):
        find_texts(files).check()


def test_an_empty_name_is_no_folder() -> None:
    with pytest.raises(FileNotFoundError, match="the name of a text is empty"):
        find("")


def test_the_column_of_a_table_without_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("title,body\n")
    with pytest.raises(ValueError, match="has no column 'text'; choose one .*: title, body"):
        text_of(tmp_path / "a.csv")


def test_texts_that_begin_like_other_files(tmp_path: Path) -> None:
    for text in ("BM is a bank", "MZ", "RIFF raff", "GGUF is a format", "ID3 tags"):
        (tmp_path / "a.txt").write_text(text)
        assert text_of(tmp_path / "a.txt") == text


@pytest.mark.parametrize(
    ("name", "content", "wrong"),
    [
        ("a.txt.gz", b"plain", "damaged, or is not what"),
        ("a.txt.gz", gzip.compress(bytes(range(32, 127)) * 99)[:60], "damaged, or is not what"),
        ("a.txt.xz", b"plain", "damaged, or is not what"),
        ("a.txt.zst", b"plain", "damaged, or is not what"),
        ("a.txt.zst", ZSTD[:-3], "damaged, or is not what"),
        ("a.parquet", b"plain", "cannot be read as Parquet"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', "line 2 is not JSON"),
        ("a.jsonl", b"[1]\n", "line 1 is not a JSON object"),
        ("a.jsonl", b'{"text": 3}\n', "column 'text' holds int, not text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_files_are_named(name: str, content: bytes, wrong: str, tmp_path: Path) -> None:
    if name.endswith((".zst", ".parquet")):
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*{wrong}"):
        text_of(tmp_path / name)


def test_the_digest_is_of_the_text_as_it_is_read(tmp_path: Path) -> None:
    """Names, formats and compression make no difference; the order and every letter do."""
    first, second = tmp_path / "x.1.txt", tmp_path / "y.txt"
    first.write_text("one\n")
    second.write_text("two")
    digest = find_texts([first, second]).content.sha256
    second.write_text("two\r\n")
    other_line_ends = find_texts([first, second]).content.sha256
    first = first.rename(tmp_path / "x.2.txt")
    second.write_text("two")
    whole, table = tmp_path / "whole", tmp_path / "table.jsonl"
    whole.write_bytes(codecs.BOM_UTF8 + b"one\r\ntwo")
    table.write_text('{"body": "one"}\n{"body": "two\\n"}')
    for same in ([first, second], [compress(first, ".gz"), second], [compress(whole, ".xz")]):
        assert find_texts(same).content == (digest, 7)
    assert find_texts(table, "body").content == (other_line_ends, 8)
    others = {find_texts(files).content.sha256 for files in ([first], [second, first])}
    second.write_text("twO")
    others |= {find_texts([first, second]).content.sha256, other_line_ends, digest}
    assert len(others) == 5


def test_half_a_pair_of_surrogates_has_a_digest(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d"}')
    assert find_texts(tmp_path / "a.jsonl").content.size == 4


def test_json_holds_a_list_or_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in ('[{"text": "a"},\n {"text": "b"}]', '{"text": "a"}\n{"text": "b"}'):
        path.write_text(text)
        assert text_of(path) == "a\nb\n"
    for text, wrong in (
        ('[{"text": "a"}', "is not JSON"),
        ('[{"text": "a"}, 3]', "row 2 is not a JSON object"),
        ('[{"body": "a"}]', "has no column 'text'; .*: body"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"{path}.*{wrong}"):
            text_of(path)
    # One that is not named is more likely a file of settings.
    with pytest.raises(FileNotFoundError):
        find(tmp_path)


def test_lines_and_rows(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one\n\ntwo")
    (tmp_path / "b").write_text("three")
    assert [*find_texts([tmp_path / "a", tmp_path / "b"]).lines()] == [
        "one\n",
        "\n",
        "two\n",
        "three",
    ]
    write_csv(tmp_path / "c.csv")
    assert [*find_texts(tmp_path / "c.csv").rows()] == ROWS
