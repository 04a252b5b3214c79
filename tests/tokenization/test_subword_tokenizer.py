"""Subword tokenizers: training, round trips, GPT-2's files, foreign settings."""

import json
import pickle
import random
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm.tokenization import SubwordTokenizer, load_tokenizer
from fastllm.tokenization import subword_tokenizer as module
from tests.tokenizer_kinds import TOKENIZERS

tokenizers = pytest.importorskip("tokenizers", reason="needs the tokenizers library ([hf])")

GPT2 = Path(__file__).parents[3] / "shared/data/gpt2-tokenizer"
TEXT = "the cat sat on the mat, and then the other cat sat there.\n" * 20

quick = settings(deadline=None, derandomize=True, max_examples=60)


@pytest.fixture(scope="module")
def bpe():
    return SubwordTokenizer.train([TEXT], "bpe", 270)


@pytest.fixture(scope="module")
def wordpiece():
    return SubwordTokenizer.train([TEXT], "wordpiece", 60)


@quick
@given(st.text(max_size=60))
def test_bpe_restores_every_text(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.encode_array(text).tolist() == ids
    assert all(0 <= i < bpe.vocab_size for i in ids)


def test_bpe_learns_from_the_text(bpe):
    assert bpe.vocab_size == 270
    assert bpe.encode_array("the").dtype == bpe.token_dtype == np.uint16
    assert len(bpe.encode(" the")) == 1
    assert len(bpe.encode("世")) == len("世".encode())
    assert bpe.decode([bpe.pad_token_id]) == "<PAD>"
    assert bpe.encode("") == []


def test_training_is_repeatable(bpe):
    assert SubwordTokenizer.train([TEXT], "bpe", 270).fingerprint == bpe.fingerprint


def test_wordpiece_loses_only_white_space(wordpiece):
    assert wordpiece.decode(wordpiece.encode("the  cat\nsat")) == "the cat sat"
    assert wordpiece.decode([wordpiece.pad_token_id]) == "[PAD]"
    assert wordpiece.decode(wordpiece.encode("the Q")) == "the [UNK]"


@pytest.mark.parametrize(
    ("model", "vocab_size", "wrong"),
    [
        ("bpe", 256, "at least 257"),
        ("wordpiece", 10, "need 25 tokens"),
        ("unigram", 300, '"bpe" or'),
    ],
)
def test_training_arguments(model, vocab_size, wrong):
    with pytest.raises(ValueError, match=wrong):
        SubwordTokenizer.train([TEXT], model, vocab_size)


def test_errors_of_the_text_propagate_through_training():
    def pieces():
        yield TEXT
        raise ValueError("bad byte")

    with pytest.raises(ValueError, match="bad byte"):
        SubwordTokenizer.train(pieces(), "bpe", 300)


@pytest.mark.parametrize("model", ["bpe", "wordpiece"])
def test_training_cuts_long_words_only(model):
    """Merges within a line without spaces would take time in proportion to its square."""
    longest = module.LONGEST_WORD
    trained = SubwordTokenizer.train([5_000 * "a" + " " + TEXT], model, 400)
    tokens = trained._tokenizer.get_vocab()
    assert max(len(token.removeprefix("##")) for token in tokens) <= longest


def test_words_of_usual_length_are_learnt_as_the_library_learns_them():
    length = module.LONGEST_WORD - 1  # and a space
    text = " ".join("".join(random.Random(i).choices("acgt", k=length)) for i in range(50))
    trained = SubwordTokenizer.train([text], "bpe", 400)
    library = tokenizers.Tokenizer.from_str(trained.to_json())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<PAD>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator([text], trainer)
    assert library.get_vocab() == trained._tokenizer.get_vocab()


def test_control_c_ends_the_wait_for_the_library():
    asked, done, returned = threading.Event(), threading.Event(), threading.Event()

    def pieces():
        asked.set()
        done.wait(10)
        returned.set()
        yield TEXT

    def interrupt():
        asked.wait(10)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            SubwordTokenizer.train(pieces(), "bpe", 300)
        assert not returned.is_set()
    finally:
        done.set()


@pytest.mark.parametrize("kind", [Exception, type("PanicException", (BaseException,), {})])
def test_errors_of_the_library_in_training_are_value_errors(kind):
    def pieces():
        yield TEXT
        raise kind("too much")

    with pytest.raises(ValueError, match="a bpe tokenizer cannot be learnt: too much"):
        SubwordTokenizer.train(pieces(), "bpe", 300)


def test_bpe_of_an_empty_text_is_bytes():
    assert SubwordTokenizer.train([], "bpe", 300).vocab_size == 257


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_save_and_load(kind, request, tmp_path):
    tokenizer = request.getfixturevalue(kind)
    tokenizer.save(tmp_path / "tokenizer.json")
    for again in (
        SubwordTokenizer.from_file(tmp_path / "tokenizer.json"),
        load_tokenizer(tmp_path),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert again.encode(TEXT) == tokenizer.encode(TEXT)
        assert again.pad_token_id == tokenizer.pad_token_id
        assert again.vocab_size == tokenizer.vocab_size
        assert again.fingerprint == tokenizer.fingerprint
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert library.encode(TEXT, add_special_tokens=False).ids == tokenizer.encode(TEXT)


def test_types_are_checked(bpe):
    with pytest.raises(TypeError, match="Input text must be a string"):
        bpe.encode(["a"])
    with pytest.raises(TypeError, match="Input tokens must be a list of integers"):
        bpe.decode("a")
    with pytest.raises(TypeError, match="All items in the tokens list must be integers"):
        bpe.decode([1.0])
    for token in (270, -1):
        with pytest.raises(KeyError, match=f"Token ID '{token}' not found"):
            bpe.decode([token])
    with pytest.raises(ValueError, match="surrogate"):
        bpe.encode("a\ud800")


@quick
@given(st.text(alphabet="ab \n\t.,'é世", max_size=300), st.integers(1, 40))
def test_segments_do_not_change_the_tokens(bpe, wordpiece, text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SEGMENT", size)
        cut = [tokenizer.encode(text) for tokenizer in (bpe, wordpiece)]
    assert cut == [tokenizer.encode(text) for tokenizer in (bpe, wordpiece)]


def test_a_model_that_marks_the_first_word_gets_whole_texts(tmp_path, monkeypatch):
    library = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=100, special_tokens=["<unk>", "<pad>"], show_progress=False
    )
    library.train_from_iterator([TEXT], trainer)
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    monkeypatch.setattr(module, "SEGMENT", 10)
    assert tokenizer.encode(TEXT) == library.encode(TEXT).ids
    assert tokenizer.pad_token_id == library.token_to_id("<pad>")


def test_truncation_padding_and_special_tokens_of_a_file_are_ignored(bpe, tmp_path):
    path = tmp_path / "tokenizer.json"
    bpe.save(path)
    library = tokenizers.Tokenizer.from_file(str(path))
    library.enable_truncation(4)
    library.enable_padding(length=10_000)
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<PAD> $A <PAD>", special_tokens=[("<PAD>", 0)]
    )
    library.save(str(path))
    assert load_tokenizer(path).encode(TEXT) == bpe.encode(TEXT)


def test_a_missing_pad_token_is_added():
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1}, "[UNK]"))
    tokenizer = SubwordTokenizer(library)
    assert (tokenizer.pad_token_id, tokenizer.vocab_size) == (2, 3)
    assert tokenizer.token_dtype == np.uint8


def test_without_the_library_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        SubwordTokenizer.train([TEXT], "bpe", 300)


def write_gpt2(folder, names=("vocab.json", "merges.txt"), merges="#version: 0.2\nt h\nth e\n"):
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "th", "the", "<|endoftext|>"]
    (folder / names[0]).write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / names[1]).write_text(merges, encoding="utf-8")
    return tokens


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_gpt2_files(tmp_path, names):
    tokens = write_gpt2(tmp_path, names)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("the<|endoftext|>th") == [257, 258, 256]
    assert tokenizer.vocab_size == len(tokens) + 1
    assert tokenizer.decode([257, tokenizer.pad_token_id]) == "the<PAD>"


@pytest.mark.parametrize(
    ("file", "content", "wrong"),
    [
        ("vocab.json", "[1]", "each token needs an id"),
        ("vocab.json", '{"a": "b"}', "each token needs an id"),
        ("vocab.json", '{"a": -1}', "each token needs an id"),
        ("vocab.json", '{"a": 0}', "no token for '!'"),
        ("vocab.json", '{"a": 0', "not valid JSON"),
        ("merges.txt", "t h\nt h e\n", "line 2 is not two tokens"),
        ("merges.txt", "t h\nh e\n", "line 2 needs the token 'he'"),
        ("merges.txt", b"\xff", "byte 0 is not UTF-8"),
    ],
)
def test_damaged_gpt2_files(tmp_path, file, content, wrong):
    write_gpt2(tmp_path)
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=wrong) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path / file) in str(error.value)


@pytest.mark.skipif(not GPT2.exists(), reason=f"{GPT2} does not exist")
def test_the_real_gpt2_tokenizer():
    tokenizer = load_tokenizer(GPT2)
    assert tokenizer.encode("Hello world") == [15496, 995]
    spaced = [15496, 995, 628, 220, 632, 338, 50256]
    assert tokenizer.encode("Hello world\n\n  It's<|endoftext|>") == spaced
    assert tokenizer.pad_token_id == 50257
    assert tokenizer.vocab_size == 50258
    assert tokenizer.decode([15496, 995]) == "Hello world"


def test_bytes_of_unknown_characters_decode_as_in_byte_level_bpe():
    """Characters stay, whatever bytes follow them."""
    tokenizer = TOKENIZERS["byte_fallback"]()
    ids = [tokenizer.encode(f"<0x{byte:02X}>")[0] for byte in range(256)]
    for text in ("a Ω b", "☃☃ x", "Ω"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    words = tokenizer.encode("the")
    for data in ("☃".encode() + b"\xe2", b"A\xff\xffB", "☃".encode()[:2], "é☃".encode()[:4]):
        tokens = [ids[byte] for byte in data]
        assert tokenizer.decode(words + tokens + words) == (
            "the" + data.decode("utf-8", "replace") + " the"
        )
