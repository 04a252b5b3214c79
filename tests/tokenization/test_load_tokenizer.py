"""Loading tokenizers of any kind, and surviving damaged files."""

import codecs
import json
import random

import pytest

from fastllm.tokenization import SimpleCharacterTokenizer, SubwordTokenizer, load_tokenizer

tokenizers = pytest.importorskip("tokenizers", reason="needs the tokenizers library ([hf])")

TEXT = "the cat sat on the mat, and then the other cat sat there.\n" * 20


@pytest.fixture(scope="module")
def saved():
    return {
        "character": SimpleCharacterTokenizer([TEXT, "é世\U0001f600"]),
        "bpe": SubwordTokenizer.train([TEXT], "bpe", 270),
        "wordpiece": SubwordTokenizer.train([TEXT], "wordpiece", 60),
    }


@pytest.mark.parametrize("kind", ["character", "bpe", "wordpiece"])
def test_the_content_decides_the_kind(saved, kind, tmp_path):
    saved[kind].save(tmp_path / "anything.txt")
    loaded = load_tokenizer(str(tmp_path / "anything.txt"))
    assert type(loaded) is type(saved[kind])
    assert loaded.fingerprint == saved[kind].fingerprint


def test_saving_replaces_the_file(saved, tmp_path):
    path = tmp_path / "tokenizer.json"
    saved["bpe"].save(path)
    saved["character"].save(path)
    assert load_tokenizer(tmp_path).chars == saved["character"].chars
    assert [entry.name for entry in tmp_path.iterdir()] == ["tokenizer.json"]


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.json does not exist"):
        load_tokenizer(tmp_path / "no.json")
    with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"merges\.txt does not exist"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (b"", "not valid JSON"),
        (b"\x80\x02]", "byte 0 is not UTF-8"),
        (b"[" * 100_000, "not valid JSON"),
        (b"1" * 10_000, "not valid JSON"),
        (b'{"a": 1}', "not a tokenizer"),
        (b"[]", "not a tokenizer"),
        (b'{"model": 3}', "not a usable tokenizer"),
        (b'{"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}', "not a usable"),
    ],
    ids=["empty", "pickle", "deep", "long-number", "object", "list", "model", "merges"],
)
def test_foreign_files(tmp_path, content, wrong):
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=wrong) as error:
        load_tokenizer(path)
    assert str(path) in str(error.value)


def word_level(tmp_path, vocabulary):
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    return path


@pytest.mark.parametrize(
    ("vocabulary", "wrong"),
    [
        ({"[UNK]": 0, "a": 1, "b": 1}, "two tokens of the vocabulary have the same id"),
        ({"[UNK]": 0, "[PAD]": 1, "a": 1_000_000_000}, "token id 1000000000"),
        ({"[PAD]": 0, "a": 1}, "UNK"),
    ],
    ids=["same-id", "stray-id", "no-unknown-token"],
)
def test_unusable_vocabulary(tmp_path, vocabulary, wrong):
    with pytest.raises(ValueError, match=wrong):
        load_tokenizer(word_level(tmp_path, vocabulary))


def test_text_that_the_library_cannot_encode():
    model = tokenizers.models.WordLevel({"[PAD]": 0, "a": 1})
    with pytest.raises(ValueError, match="cannot encode the text: .*UNK"):
        SubwordTokenizer(tokenizers.Tokenizer(model)).encode("b")


def test_unused_ids_are_allowed(tmp_path):
    tokenizer = load_tokenizer(word_level(tmp_path, {"[UNK]": 0, "[PAD]": 1, "a": 4}))
    assert tokenizer.vocab_size == 5
    with pytest.raises(KeyError, match="Token ID '3' not found"):
        tokenizer.decode([3])


def mutate(content, rng):
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(content))
        change = rng.randrange(5)
        if change == 0:
            content[at] = rng.randrange(256)
        elif change == 1:
            content[at] = rng.choice(b'0123456789"\\[]{},:')
        elif change == 2:
            del content[at : at + rng.choice([1, 3, 50])]
        elif change == 3:
            other = rng.randrange(len(content))
            content[at:at] = content[other : other + rng.choice([1, 2, 20])]
        elif rng.random() < 0.1:
            del content[at:]
        content = content or bytearray(b"0")
    return bytes(content)


@pytest.mark.parametrize(("kind", "times"), [("character", 800), ("bpe", 700), ("wordpiece", 500)])
def test_mutated_files_load_or_raise_with_their_name(saved, kind, times, tmp_path):
    path = tmp_path / "tokenizer.json"
    saved[kind].save(path)
    good = path.read_bytes()
    rng = random.Random(0)
    loaded = 0
    for _ in range(times):
        path.write_bytes(mutate(good, rng))
        try:
            tokenizer = load_tokenizer(path)
        except ValueError as error:
            assert str(path) in str(error)
            continue
        loaded += 1
        assert 0 <= tokenizer.pad_token_id < tokenizer.vocab_size
        if isinstance(tokenizer, SimpleCharacterTokenizer):
            assert tokenizer.chars == [*sorted({*tokenizer.chars} - {"<PAD>"}), "<PAD>"]
            assert all(len(char) == 1 for char in tokenizer.chars[:-1])
        else:
            ids = tokenizer.encode("the cat 世")
            assert all(0 <= i < tokenizer.vocab_size for i in ids)
            tokenizer.decode(ids)
    assert 0 < loaded < times / 2


@pytest.mark.parametrize("kind", ["character", "bpe", "wordpiece"])
def test_byte_order_marks_are_dropped(saved, kind, tmp_path):
    """Some editors write them into every file that they save."""
    path = tmp_path / "tokenizer.json"
    saved[kind].save(path)
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    assert load_tokenizer(path).fingerprint == saved[kind].fingerprint
    path.write_bytes(codecs.BOM_UTF8 + b"\xff")
    with pytest.raises(ValueError, match="byte 3 is not UTF-8"):
        load_tokenizer(path)


def test_byte_order_marks_in_gpt2s_files_are_dropped(saved, tmp_path):
    model = json.loads(saved["bpe"].to_json())["model"]
    merges = "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"])
    folders = tmp_path / "plain", tmp_path / "marked"
    for folder, encoding in zip(folders, ("utf-8", "utf-8-sig"), strict=True):
        folder.mkdir()
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding=encoding)
        (folder / "merges.txt").write_text(merges, encoding=encoding)
    plain, marked = map(load_tokenizer, folders)
    assert plain.fingerprint == marked.fingerprint
