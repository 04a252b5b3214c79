"""Reading, cleaning and cutting text."""

import codecs

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm.data.text import clean_lines, cut_between_words, read_text

quick = settings(deadline=None, derandomize=True, max_examples=80)


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "text.txt"
        path.write_bytes(content)
        return path

    return write


SIZES = [1, 2, 3, 7, 1 << 20]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", ""),
        (b"ab", "ab"),
        (b"a\r\nb\rc\n\r\r\n", "a\nb\nc\n\n\n"),
        (codecs.BOM_UTF8, ""),
        (codecs.BOM_UTF8 + b"a\xef\xbb\xbf", "a\ufeff"),
        ("é世\U0001f600\x85\u2028\r".encode(), "é世\U0001f600\x85\u2028\n"),
    ],
    ids=["empty", "plain", "line-ends", "only-bom", "bom", "wide"],
)
def test_read_text(write, content, text, size):
    pieces = list(read_text(write(content), size))
    assert "".join(pieces) == text
    assert all(pieces)


@quick
@given(st.text(st.sampled_from("aé世\U0001f600\r\n \ufeff"), max_size=30), st.integers(1, 9))
def test_read_text_agrees_with_python(tmp_path_factory, text, size):
    path = tmp_path_factory.getbasetemp() / "text.txt"
    path.write_bytes(text.encode())
    assert "".join(read_text(path, size)) == path.read_text(encoding="utf-8-sig")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("content", "offset"),
    [
        (b"\xff", 0),
        (b"abc\xffdef", 3),
        (codecs.BOM_UTF8 + b"ab\x80", 5),
        ("世世".encode() + b"\xe4\xb8a", 6),
        ("é\r\n".encode() * 50 + b"\xc3", 200),
        (b"a" * 9 + "\U0001f600".encode()[:3], 9),
        ("a\n".encode("utf-16"), 0),
        (b"ab\xed\xa0\x80", 2),
    ],
    ids=["first", "middle", "after-bom", "cut-in-text", "cut-at-end", "cut-emoji", "utf16", "half"],
)
def test_invalid_utf8_names_the_byte(write, content, offset, size):
    path = write(content)
    with pytest.raises(ValueError, match=rf"offset {offset} .*iconv") as error:
        list(read_text(path, size))
    assert str(path) in str(error.value)


def test_files_that_cannot_be_read(tmp_path, write):
    with pytest.raises(FileNotFoundError, match=r"no\.txt does not exist"):
        list(read_text(tmp_path / "no.txt"))
    with pytest.raises(IsADirectoryError, match="is a folder"):
        list(read_text(tmp_path))
    with pytest.raises(ValueError, match="piece_bytes must be at least 1"):
        list(read_text(write(b"a"), 0))


def test_cleaning_off_passes_the_pieces_through():
    pieces = ["a\n\nb", "", "\na\n"]
    assert list(clean_lines(pieces)) == pieces


@pytest.mark.parametrize(
    ("text", "settings", "cleaned"),
    [
        ("abc\nab\n\nabcd", {"min_line_length": 3}, "abc\nabcd"),
        ("世世\na\n", {"min_line_length": 2}, "世世\n"),
        ("a\n\n \nb", {"min_line_length": 1}, "a\n \nb"),
        ("a\n\nb\na\n\n \n \nb", {"dedup_lines": True}, "a\n\nb\n\n \n \n"),
        ("a\na \n", {"dedup_lines": True}, "a\na \n"),
        ("ab\nab\na\n", {"min_line_length": 2, "dedup_lines": True}, "ab\n"),
        ("", {"dedup_lines": True}, ""),
        ("x\x0by\n", {"min_line_length": 3}, "x\x0by\n"),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 100])
def test_cleaning(text, settings, cleaned, size):
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert "".join(clean_lines(pieces, **settings)) == cleaned


def test_negative_line_length():
    with pytest.raises(ValueError, match="min_line_length must be at least 0"):
        clean_lines(["a"], -1)


@quick
@given(st.lists(st.text(st.sampled_from("ab \n"), max_size=9)), st.integers(1, 20))
def test_cutting_keeps_the_text(pieces, most_chars):
    assert "".join(cut_between_words(pieces, most_chars)) == "".join(pieces)


@pytest.mark.parametrize(
    ("pieces", "cut"),
    [
        (["one two thr"], ["one two thr"]),
        (["one two", "x three", "y"], ["one", " twox", " threey"]),
        (["one\ntwo", "x"], ["one\n", "twox"]),
        (["one  \n", "\n two"], ["one  \n\n two"]),
        (["aaaaaaaa", "aaaaaaaa", "aaaaaaaaa", "b"], ["a" * 16, "a" * 9 + "b"]),
        (["a b" + "c" * 5000, "d"], ["a", " b" + "c" * 5000 + "d"]),
    ],
    ids=["single", "spaces", "line", "only-runs-of-spaces", "no-spaces", "early"],
)
def test_cutting_by_hand(pieces, cut):
    assert list(cut_between_words(pieces, most_chars=16)) == cut
