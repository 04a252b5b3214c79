"""The character tokenizer: vocabulary, round trips, errors, files."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm.tokenization import SimpleCharacterTokenizer

SHAKESPEARE = Path(__file__).parents[3] / "shared/data/tinyshakespeare.txt"

quick = settings(deadline=None, derandomize=True, max_examples=60)
any_text = st.text(alphabet=st.characters(), max_size=40)


def test_vocabulary_is_sorted_with_padding_last():
    tokenizer = SimpleCharacterTokenizer(["cab", "ba d"])
    assert tokenizer.chars == [" ", "a", "b", "c", "d", "<PAD>"]
    assert tokenizer.stoi == {" ": 0, "a": 1, "b": 2, "c": 3, "d": 4, "<PAD>": 5}
    assert tokenizer.itos == {0: " ", 1: "a", 2: "b", 3: "c", 4: "d", 5: "<PAD>"}
    assert (tokenizer.vocab_size, tokenizer.pad_char, tokenizer.pad_token_id) == (6, "<PAD>", 5)


@pytest.mark.parametrize(
    ("corpus", "chars"),
    [
        pytest.param([], ["<PAD>"], id="empty"),
        pytest.param([""], ["<PAD>"], id="empty-string"),
        pytest.param(["a", "<PAD>"], [*sorted("a<PAD>"), "<PAD>"], id="pad-item"),
        pytest.param(["<PAD> "], [*sorted(" <PAD>"), "<PAD>"], id="pad-inside-a-text"),
        pytest.param(["\r\n\x00"], ["\x00", "\n", "\r", "<PAD>"], id="control-characters"),
        pytest.param(["\U0010ffffé"], ["é", "\U0010ffff", "<PAD>"], id="last-code-point"),
    ],
)
def test_chars(corpus, chars):
    assert SimpleCharacterTokenizer(corpus).chars == chars


def test_encode_and_decode_by_hand():
    tokenizer = SimpleCharacterTokenizer(["hello"])
    assert tokenizer.encode("hole") == [1, 3, 2, 0]
    assert tokenizer.decode([1, 3, 2, 0]) == "hole"
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([1, tokenizer.pad_token_id]) == "h<PAD>"
    assert tokenizer.decode([np.int64(1), np.uint8(3)]) == "ho"
    assert all(type(i) is int for i in tokenizer.encode("hole"))


@quick
@given(st.lists(any_text, max_size=5), any_text)
def test_round_trip(corpus, text):
    tokenizer = SimpleCharacterTokenizer([*corpus, *text])
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_array(text).tolist() == ids
    assert ids == [tokenizer.stoi[char] for char in text]


@quick
@given(any_text, st.integers(1, 7))
def test_from_pieces_equals_whole(text, size):
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    tokenizer = SimpleCharacterTokenizer.from_pieces(iter(pieces))
    assert tokenizer.chars == [*sorted(set(text)), "<PAD>"]


def test_long_text_across_blocks():
    alphabet = "abcdefg\né世\U0001f600"
    tokenizer = SimpleCharacterTokenizer([alphabet])
    text = alphabet * 20_000
    assert tokenizer.encode(text) == [tokenizer.stoi[char] for char in text]
    with pytest.raises(KeyError, match="Character 'z' not found"):
        tokenizer.encode(text + "z")


@pytest.mark.parametrize(
    ("characters", "dtype"), [(255, "uint8"), (256, "uint16"), (65535, "uint16"), (65536, "int32")]
)
def test_token_dtype_is_the_smallest(characters, dtype):
    text = "".join(map(chr, range(0x1000, 0x1000 + characters)))
    tokenizer = SimpleCharacterTokenizer([text])
    assert tokenizer.token_dtype == dtype
    ids = tokenizer.encode_array(text)
    assert ids.dtype == dtype
    assert ids.tolist() == list(range(characters))


def test_types_are_checked():
    with pytest.raises(TypeError, match="Corpus must be a list of strings"):
        SimpleCharacterTokenizer("text")
    with pytest.raises(TypeError, match="All items in the corpus must be strings"):
        SimpleCharacterTokenizer(["a", 1])
    tokenizer = SimpleCharacterTokenizer(["ab"])
    for bad in (None, 1, ["a"], b"a"):
        with pytest.raises(TypeError, match="Input text must be a string"):
            tokenizer.encode(bad)
    for bad in (None, "a", (0, 1), np.array([0])):
        with pytest.raises(TypeError, match="Input tokens must be a list of integers"):
            tokenizer.decode(bad)
    with pytest.raises(TypeError, match="All items in the tokens list must be integers"):
        tokenizer.decode([0, "1"])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("az", "'z'"),
        ("é", "'é'"),
        ("\U0010ffff", repr("\U0010ffff")),
        ("a\ud800", repr("\ud800")),
        ("c\nd", repr("\n")),
    ],
    ids=["beyond-table", "latin", "last-code-point", "lone-surrogate", "between-known"],
)
def test_unknown_character(text, named):
    with pytest.raises(KeyError) as error:
        SimpleCharacterTokenizer(["abcd"]).encode(text)
    assert error.value.args[0].startswith(f"Character {named} not found")


@pytest.mark.parametrize("token", [99, -1, 2**70])
def test_unknown_token(token):
    with pytest.raises(KeyError) as error:
        SimpleCharacterTokenizer(["ab"]).decode([0, token])
    assert error.value.args[0].startswith(f"Token ID '{token}' not found")


@quick
@given(any_text)
def test_save_and_load(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "characters.json"
    tokenizer = SimpleCharacterTokenizer(list(text))
    tokenizer.save(path)
    again = SimpleCharacterTokenizer.from_file(path)
    assert again.chars == tokenizer.chars
    assert again.fingerprint == tokenizer.fingerprint
    assert list(path.parent.glob("*.partial")) == []


def test_lone_surrogate_in_the_vocabulary_survives_saving(tmp_path):
    SimpleCharacterTokenizer(["\ud83d", "\ude00"]).save(tmp_path / "t.json")
    again = SimpleCharacterTokenizer.from_file(tmp_path / "t.json")
    assert again.chars == ["\ud83d", "\ude00", "<PAD>"]
    assert again.encode("\ude00") == [1]


def test_fingerprint_follows_the_vocabulary():
    one, other = SimpleCharacterTokenizer(["ab"]), SimpleCharacterTokenizer(["ac"])
    assert one.fingerprint != other.fingerprint
    assert one.fingerprint == SimpleCharacterTokenizer(["b", "a"]).fingerprint
    assert pickle.loads(pickle.dumps(one)).encode("ba") == [1, 0]


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        ({"type": "word", "chars": ["<PAD>"]}, '"type": "character"'),
        ({"type": "character"}, "not a list of strings"),
        ({"type": "character", "chars": "ab"}, "not a list of strings"),
        ({"type": "character", "chars": ["a", 1, "<PAD>"]}, "not a list of strings"),
        ({"type": "character", "chars": []}, "does not end with <PAD>"),
        ({"type": "character", "chars": ["a", "b"]}, "does not end with <PAD>"),
        ({"type": "character", "chars": ["ab", "<PAD>"]}, "'ab' is not one character"),
        ({"type": "character", "chars": ["", "<PAD>"]}, "'' is not one character"),
        ({"type": "character", "chars": ["<PAD>", "<PAD>"]}, "'<PAD>' is not one character"),
        ({"type": "character", "chars": ["a", "a", "<PAD>"]}, "sorted and distinct"),
        ({"type": "character", "chars": ["b", "a", "<PAD>"]}, "sorted"),
        (["a"], '"type": "character"'),
    ],
)
def test_damaged_file(tmp_path, content, wrong):
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=wrong) as error:
        SimpleCharacterTokenizer.from_file(path)
    assert str(path) in str(error.value)


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason=f"{SHAKESPEARE} does not exist")
def test_tinyshakespeare():
    text = SHAKESPEARE.read_text()
    tokenizer = SimpleCharacterTokenizer([text])
    assert tokenizer.vocab_size == 65 + 1
    assert tokenizer.decode(tokenizer.encode(text)) == text
