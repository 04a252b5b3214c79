"""Token arrays: in memory, in files, reused or rewritten."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastllm.data import tokens as module
from fastllm.data.sources import Texts, find_texts
from fastllm.data.tokens import HEADER_BYTES, encode_texts, map_texts, map_tokens
from fastllm.tokenization import SimpleCharacterTokenizer, SubwordTokenizer

TEXT = "the cat sat on the mat\n" * 40


class Duck:
    """A minimal tokenizer."""

    pad_token_id = 0

    def __init__(self, shift=0):
        self.shift = shift

    def encode(self, text):
        return [ord(char) + self.shift for char in text]


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def tokenizer():
    return SimpleCharacterTokenizer([TEXT])


@pytest.fixture
def writes(monkeypatch):
    """One element for each time a text is encoded."""
    calls = []
    real = module._write_ids
    monkeypatch.setattr(module, "_write_ids", lambda *args: calls.append(1) or real(*args))
    return calls


def test_in_memory(text_file, tokenizer):
    ids = encode_texts(find_texts(text_file), tokenizer)
    assert ids.dtype == np.uint8
    assert ids.tolist() == tokenizer.encode(TEXT)


def test_mapped(text_file, tokenizer, tmp_path):
    token_file = tmp_path / "new" / "folder" / "tokens.bin"
    ids, header = map_texts(find_texts(text_file), tokenizer, token_file)
    assert isinstance(ids, np.memmap)
    assert ids.tolist() == tokenizer.encode(TEXT)
    assert header.count == len(TEXT)
    assert token_file.stat().st_size == HEADER_BYTES + len(TEXT)
    assert json.loads(token_file.read_bytes()[:HEADER_BYTES])["count"] == len(TEXT)
    assert [entry.name for entry in token_file.parent.iterdir()] == ["tokens.bin"]


def test_empty_text(tmp_path, tokenizer):
    path = tmp_path / "empty.txt"
    path.write_text("")
    assert encode_texts(find_texts(path), tokenizer).shape == (0,)
    for _ in range(2):
        assert map_texts(find_texts(path), tokenizer, tmp_path / "tokens.bin")[0].shape == (0,)


def test_pieces_encode_like_the_whole_text(tmp_path, monkeypatch):
    bpe = SubwordTokenizer.train([TEXT], "bpe", 280)
    text = "the cat  sat\n\n  on\tthe mat, 12 é世\n" * 30
    path = tmp_path / "text.txt"
    path.write_text(text)
    pieces = [text[i : i + 50] for i in range(0, len(text), 50)]
    monkeypatch.setattr(Texts, "pieces", lambda texts: iter(pieces))
    for tokenizer in (bpe, SimpleCharacterTokenizer([text])):
        assert encode_texts(find_texts(path), tokenizer).tolist() == tokenizer.encode(text)


def test_cleaning_is_applied(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("ab\na\nab\n")
    tokenizer = SimpleCharacterTokenizer(["ab\n"])
    assert encode_texts(find_texts(path), tokenizer, 2, True).tolist() == tokenizer.encode("ab\n")


def test_token_file_is_reused_without_a_change(text_file, tokenizer, tmp_path, writes):
    token_file = tmp_path / "tokens.bin"
    map_texts(find_texts(text_file), tokenizer, token_file)
    text_file.touch()
    ids, _ = map_texts(find_texts(text_file), SimpleCharacterTokenizer([TEXT]), token_file)
    assert len(writes) == 1
    assert ids.tolist() == tokenizer.encode(TEXT)


@pytest.mark.parametrize("change", ["text", "tokenizer", "length", "dedup"])
def test_token_file_is_rewritten_after_a_change(text_file, tokenizer, tmp_path, writes, change):
    token_file = tmp_path / "tokens.bin"
    old, _ = map_texts(find_texts(text_file), tokenizer, token_file)
    cleaning = {}
    if change == "text":
        text_file.write_text(TEXT.replace("cat", "act"))
    elif change == "tokenizer":
        tokenizer = SimpleCharacterTokenizer([TEXT, "!"])
    elif change == "length":
        cleaning["min_line_length"] = 100
    else:
        cleaning["dedup_lines"] = True
    ids, _ = map_texts(find_texts(text_file), tokenizer, token_file, **cleaning)
    assert len(writes) == 2
    assert ids.tolist() == encode_texts(find_texts(text_file), tokenizer, **cleaning).tolist()
    assert old.tolist() == SimpleCharacterTokenizer([TEXT]).encode(TEXT)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content + b"x",
        lambda content: content[:100],
        lambda content: b"",
        lambda content: b"\x80\x02]" + content[3:],
        lambda content: b"[1]".ljust(HEADER_BYTES) + content[HEADER_BYTES:],
        lambda content: b"[" * 9000,
        lambda content: content.replace(b"tokens 1", b"tokens 9"),
        lambda content: content.replace(b'"|u1"', b'"|O8"'),
        lambda content: content.replace(b'"count": 9', b'"count": "'),
    ],
    ids=[
        *("cut-off", "too-long", "cut-header", "empty", "pickle", "list", "deep"),
        *("version", "dtype", "count"),
    ],
)
def test_damaged_token_file_is_rewritten(text_file, tokenizer, tmp_path, writes, damage):
    token_file = tmp_path / "tokens.bin"
    map_texts(find_texts(text_file), tokenizer, token_file)
    token_file.write_bytes(damage(token_file.read_bytes()))
    ids, _ = map_texts(find_texts(text_file), tokenizer, token_file)
    assert len(writes) == 2
    assert ids.tolist() == tokenizer.encode(TEXT)


def test_tokens_of_a_duck_typed_tokenizer_are_never_reused(text_file, tmp_path):
    token_file = tmp_path / "tokens.bin"
    for shift in (0, 1):
        ids, _ = map_texts(find_texts(text_file), Duck(shift), token_file)
        assert ids.dtype == np.int32
        assert ids.tolist() == Duck(shift).encode(TEXT)


def test_overridden_encode_is_honoured(text_file):
    class Upper(SimpleCharacterTokenizer):
        def encode(self, text):
            return super().encode(text.upper())

    tokenizer = Upper([TEXT.upper()])
    assert encode_texts(find_texts(text_file), tokenizer).tolist() == tokenizer.encode(TEXT)


@pytest.mark.parametrize("shift", [-200, 100], ids=["negative", "too-large"])
def test_ids_outside_the_vocabulary(text_file, shift):
    duck = Duck(shift)
    duck.vocab_size = 128
    with pytest.raises(ValueError, match=r"Duck gave the token id .* 0 to 127"):
        encode_texts(find_texts(text_file), duck)


def test_the_text_is_never_overwritten(text_file, tokenizer):
    with pytest.raises(ValueError, match="is the text file itself"):
        map_texts(find_texts(text_file), tokenizer, text_file)
    assert text_file.read_text() == TEXT


def test_token_file_changed_while_in_use(text_file, tokenizer, tmp_path):
    token_file = tmp_path / "tokens.bin"
    _, header = map_texts(find_texts(text_file), tokenizer, token_file)
    map_texts(find_texts(text_file), tokenizer, token_file, dedup_lines=True)
    with pytest.raises(ValueError, match="changed or removed while in use"):
        map_tokens(token_file, header)


def test_failed_encoding_leaves_the_old_file(text_file, tokenizer, tmp_path):
    token_file = tmp_path / "tokens.bin"
    map_texts(find_texts(text_file), tokenizer, token_file)
    before = token_file.read_bytes()
    text_file.write_text(TEXT + "?")
    with pytest.raises(KeyError, match="not found"):
        map_texts(find_texts(text_file), tokenizer, token_file)
    assert token_file.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["text.txt", "tokens.bin"]


def test_unwritable_place(text_file, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    token_file = tmp_path / "file" / "tokens.bin"
    with pytest.raises(OSError, match="cannot write the token file") as error:
        map_texts(find_texts(text_file), tokenizer, token_file)
    assert error.value.filename == str(token_file)


def test_full_disk(text_file, tokenizer, tmp_path):
    text_file.write_text(TEXT * 100)
    token_file = tmp_path / "tokens.bin"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot write the token file: File too large"):
            map_texts(find_texts(text_file), tokenizer, token_file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [entry.name for entry in tmp_path.iterdir()] == ["text.txt"]


KILLED = """
import sys, time
from fastllm.data.sources import find_texts
from fastllm.data.tokens import map_texts
from fastllm.tokenization import SimpleCharacterTokenizer

fast = SimpleCharacterTokenizer.encode_array

def slow(self, text):
    print("encoding", flush=True)
    time.sleep(0.05)
    return fast(self, text)

SimpleCharacterTokenizer.encode_array = slow
tokenizer = SimpleCharacterTokenizer([open(sys.argv[1]).read()])
map_texts(find_texts(sys.argv[1]), tokenizer, sys.argv[2])
"""


@pytest.mark.kill
def test_kill_leaves_the_old_file(text_file, tokenizer, tmp_path):
    token_file = tmp_path / "tokens.bin"
    map_texts(find_texts(text_file), tokenizer, token_file)
    before = token_file.read_bytes()
    large = tmp_path / "large.txt"
    large.write_text(TEXT * 20_000)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, large, token_file],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    for _ in range(3):
        assert process.stdout.readline() == b"encoding\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert token_file.read_bytes() == before
    (leftover,) = tmp_path.glob("*.partial")
    os.utime(leftover, (0, 0))
    map_texts(find_texts(text_file), tokenizer, token_file, dedup_lines=True)
    assert list(tmp_path.glob("*.partial")) == []


@pytest.mark.subprocess
def test_memory_stays_bounded(tmp_path):
    path = tmp_path / "text.txt"
    with open(path, "w") as file:
        for _ in range(60):
            file.write(TEXT * 1100)
    program = (
        "import resource, sys\n"
        "from fastllm.data.sources import find_texts\n"
        "from fastllm.data.tokens import map_texts\n"
        "from fastllm.tokenization import SimpleCharacterTokenizer\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "tokenizer = SimpleCharacterTokenizer(['the cat sat on the mat\\n'])\n"
        "map_texts(find_texts(sys.argv[1]), tokenizer, sys.argv[2])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", program, path, tmp_path / "tokens.bin"],
        check=True,
        capture_output=True,
        cwd=Path(__file__).parents[2],
    ).stdout
    assert path.stat().st_size > 60e6
    assert int(output) < 30_000, "kilobytes"
