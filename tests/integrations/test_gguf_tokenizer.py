"""Tokenizers in llama.cpp's format, in both directions; test_export.py has whole files."""

import itertools
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fastllm import DecoderModel, SimpleCharacterTokenizer
from fastllm.integrations.gguf import save_gguf
from fastllm.integrations.gguf_tokenizer import (
    WORDS,
    SavedTokenizer,
    Vocabulary,
    gguf_vocabulary,
    read_tokenizer,
)
from fastllm.models.architectures import llama
from fastllm.models.gguf_file import GgufFile
from fastllm.tokenization import SubwordTokenizer, Tokenizer
from tests.integrations.samples import CHARACTERS, TEXT

for module in ("gguf", "tokenizers"):
    pytest.importorskip(module, reason=f"{module} is not installed: pip install '.[test]'")


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    return gguf_vocabulary(tokenizer, tokenizer.vocab_size)


def bpe(vocabulary: Vocabulary, word: str) -> list[int]:
    """Ids of a word given as bytes, by llama.cpp's rule: the earliest merge first."""
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(vocabulary.merges)}
    symbols = list(word)
    while True:
        pairs = list(itertools.pairwise(symbols))
        best = min((p for p in pairs if p in ranks), key=lambda p: ranks[p], default=None)
        if best is None:
            return [vocabulary.tokens.index(symbol) for symbol in symbols]
        i = pairs.index(best)
        symbols[i : i + 2] = ["".join(best)]


def test_characters_in_gguf_are_joined_bytes() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    ours = SimpleCharacterTokenizer([CHARACTERS])
    vocabulary = vocabulary_of(ours)
    assert len(vocabulary.tokens) == len(set(vocabulary.tokens)) == ours.vocab_size
    as_bytes = ByteLevel(add_prefix_space=False, use_regex=False)
    ((spelt, _),) = as_bytes.pre_tokenize_str(CHARACTERS)
    assert bpe(vocabulary, spelt) == ours.encode(CHARACTERS)
    # llama.cpp reads no file without a merge; that of plain ASCII never applies.
    assert vocabulary_of(SimpleCharacterTokenizer(["abc"])).merges == ["<PAD> <PAD>"]


def edited(tokenizer: SubwordTokenizer, folder: Path, **changes: Any) -> SubwordTokenizer:
    """The tokenizer with parts of its tokenizer.json, or of the model in it, replaced."""
    data = json.loads(tokenizer.to_json())
    for name, value in changes.items():
        (data if name in data else data["model"])[name] = value
    (folder / "edited.json").write_text(json.dumps(data))
    return SubwordTokenizer.from_file(folder / "edited.json")


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre_tokenizer": {**BYTE_LEVEL, "use_regex": False}}, "split text into words as GPT-2"),
        ({"pre_tokenizer": None}, "split text into words as GPT-2"),
        (
            {"pre_tokenizer": {**BYTE_LEVEL, "use_regex": True, "add_prefix_space": True}},
            "puts a space before every text",
        ),
        ({"normalizer": {"type": "NFKC"}}, "normalizes texts first"),
        ({"ignore_merges": True}, "no such words with ignore_merges true"),
        ({"byte_fallback": True}, "does not treat spaces as SentencePiece does"),
    ],
    ids=["no-regex", "none", "prefix", "normalizer", "ignore-merges", "spaces"],
)
def test_tokenizers_that_llama_cpp_cannot_reproduce(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    tokenizer = edited(SubwordTokenizer.train([TEXT], "bpe", 300), tmp_path, **changes)
    with pytest.raises(ValueError, match=f"llama.cpp cannot reproduce this tokenizer: .*{message}"):
        vocabulary_of(tokenizer)


def test_ids_without_a_token_are_unused_in_gguf(tmp_path: Path) -> None:
    trained = SubwordTokenizer.train([TEXT], "bpe", 300)
    data = json.loads(trained.to_json())
    vocab, (pad,) = data["model"]["vocab"], data["added_tokens"]
    last = max(vocab, key=vocab.__getitem__)
    vocab[last] += 10
    more = {**pad, "id": vocab[last] + 1, "content": "<|more|>", "special": False}
    tokenizer = edited(trained, tmp_path, vocab=vocab, added_tokens=[pad, more])
    tokens, types, *_ = gguf_vocabulary(tokenizer, tokenizer.vocab_size + 2)
    assert len(tokens) == len(set(tokens)) == len(types) == tokenizer.vocab_size + 2
    for id, text in ((tokenizer.pad_token_id, "<PAD>"), *((i, t) for t, i in vocab.items())):
        assert tokens[id] == text
    assert [types[id] for id in tokenizer.encode("<PAD>a<|more|>")] == [3, 1, 4]
    assert types.count(5) - 2 == tokenizer.vocab_size - len(vocab) - 1 == 9


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(ValueError, match="lone surrogate"):
        vocabulary_of(SimpleCharacterTokenizer(["a\ud83d"]))


def written(folder: Path, **settings: Any) -> Path:
    """A GGUF file with these settings of a tokenizer, and no tensors."""
    from gguf import GGUFWriter

    writer = GGUFWriter(folder / "tokenizer.gguf", "llama")
    for name, value in settings.items():
        key = f"tokenizer.ggml.{name}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return folder / "tokenizer.gguf"


def read(folder: Path, **settings: Any) -> SavedTokenizer:
    return read_tokenizer(GgufFile(written(folder, **settings)))


def encoded(library: Any, text: str) -> list[int]:
    ids: list[int] = library.encode(text, add_special_tokens=False).ids
    return ids


def settings_of(vocabulary: Vocabulary) -> dict[str, Any]:
    return {
        "model": "gpt2",
        "pre": vocabulary.pre,
        "tokens": vocabulary.tokens,
        "token_type": list(vocabulary.types),
        "merges": vocabulary.merges,
    }


ODD = "It's 12345.6  and\tI'LL  ÜBERwindEN été 世界, 😀!\r\n\n  x=y//z <PAD>e "


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_written_tokenizer_is_read_back(tmp_path: Path, kind: str) -> None:
    if kind == "char":
        ours: Any = SimpleCharacterTokenizer([CHARACTERS])
        text = CHARACTERS.replace("<PAD>", "")  # which the library takes for the token
    else:
        ours, text = SubwordTokenizer.train([TEXT], "bpe", 400), TEXT + ODD
    settings = settings_of(vocabulary_of(ours))
    pad = ours.pad_token_id
    saved = read(tmp_path, **settings, eos_token_id=pad, padding_token_id=pad, bos_token_id=pad)
    assert encoded(saved.library, text) == ours.encode(text)
    assert saved.library.decode(ours.encode(text), skip_special_tokens=False) == text
    assert (saved.pad, saved.start, saved.end) == (pad, [], {pad})


# As in the tokenizer.json of each model.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ORIGINALS: dict[str, list[dict[str, Any]]] = {
    "llama-bpe": [{"type": "Split", "pattern": {"Regex": LLAMA3}}],
    "qwen2": [{"type": "Split", "pattern": {"Regex": LLAMA3.replace("{1,3}", "")}}],
    "smollm": [{"type": "Digits", "individual_digits": True}],
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_words_are_cut_as_in_the_original_tokenizer(tmp_path: Path, name: str) -> None:
    trained = json.loads(SubwordTokenizer.train([TEXT], "bpe", 300).to_json())
    parts = [{"behavior": "Isolated", "invert": False, **part} for part in ORIGINALS[name]]
    byte_level = {**BYTE_LEVEL, "use_regex": name == "smollm"}
    trained["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*parts, byte_level]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(trained))
    original = SubwordTokenizer.from_file(tmp_path / "tokenizer.json")
    plain = SubwordTokenizer.train([TEXT], "bpe", 300)
    settings = {**settings_of(vocabulary_of(plain)), "pre": name, "bos_token_id": 7}
    whole = edited(original, tmp_path, ignore_merges=name == "llama-bpe")
    assert vocabulary_of(whole).pre == name
    saved = read(tmp_path, **settings)
    assert encoded(saved.library, ODD + TEXT) == original.encode(ODD + TEXT)
    words = [word for word, _ in saved.library.pre_tokenizer.pre_tokenize_str(ODD)]
    assert len(words) > 10
    assert saved.start == ([7] if name == "llama-bpe" else [])
    assert read(tmp_path, **settings, add_bos_token=name != "llama-bpe").start == (
        [] if name == "llama-bpe" else [7]
    )


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(tmp_path: Path, prefix: bool) -> None:
    """A vocabulary with scores, as in Llama 2 and Gemma, with bytes for rare characters."""
    from tokenizers import Tokenizer, models, normalizers, trainers

    start = [normalizers.Prepend("▁")] if prefix else []
    spaces = normalizers.Sequence([*start, normalizers.Replace(" ", "▁")])
    trained = Tokenizer(models.BPE())
    trained.normalizer = spaces
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    trained.train_from_iterator(["He said so and so on, and then he went.\n"] * 9, trainer)
    model = json.loads(trained.to_str())["model"]
    pairs = [tuple(pair) for pair in model["merges"]]
    original = Tokenizer(
        models.BPE(model["vocab"], pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    original.normalizer = spaces
    original.add_special_tokens(special[:3])
    vocabulary = vocabulary_of(SubwordTokenizer(original))
    types = vocabulary.types
    assert [types[id] for id in (0, 2, 3, 258, 259)] == [3, 3, 6, 6, 1]
    assert vocabulary.space_first == prefix and not vocabulary.merges
    saved = read(
        tmp_path,
        model="llama",
        tokens=vocabulary.tokens,
        scores=list(vocabulary.scores),
        token_type=[int(type) for type in types],
        add_space_prefix=prefix,
        bos_token_id=1, eos_token_id=2, eot_token_id=5,
    )  # fmt: skip
    text = "He and she went on, and\n\n said  é😀 so"
    ids = encoded(saved.library, text)
    assert ids == encoded(original, text) and len(ids) < len(text)
    assert saved.library.decode(ids) == text
    assert (saved.pad, saved.start, saved.end) == (None, [1], {2, 5})
    assert encoded(saved.library, "</s>")[-1] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model must be gpt2 or llama, not bert"),
        ({"model": None}, "has no tokenizer.ggml.model"),
        ({"pre": "viking"}, "tokenizer.ggml.pre must be one of gpt-2, .*, not viking"),
        ({"pre": None}, "tokenizer.ggml.pre must be .*, not default"),
        ({"tokens": ["a", "a"]}, "tokenizer.ggml.tokens has the same token twice"),
        ({"merges": None}, "has no tokenizer.ggml.merges"),
        ({"merges": 3}, "tokenizer.ggml.merges must be of type list, not 3"),
        ({"eos_token_id": 99}, "tokenizer.ggml.eos_token_id 99 is not a token"),
        ({"model": "llama"}, "has no tokenizer.ggml.scores"),
        ({"model": "llama", "scores": [0.5]}, "scores must have a number for each token"),
        ({"token_type": [1]}, "token_type must have a number for each token"),
    ],
    ids=str,
)
def test_unknown_and_damaged_tokenizers(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    settings = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"], "merges": ["a b"]}
    given = {name: value for name, value in {**settings, **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=f"tokenizer.gguf.*{message}") as error:
        read(tmp_path, **given)
    assert "\n" not in str(error.value)


def test_every_way_of_finding_words_is_usable() -> None:
    for words in set(WORDS.values()):
        pieces = words.pre_tokenizer().pre_tokenize_str(ODD)
        assert len(pieces) > 10 and pieces[-1][1][1] == len(ODD)


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "qwen2", "llama-bpe", "gpt-4o", "tekken"])
def test_llama_cpp_finds_the_same_tokens(tmp_path: Path, name: str) -> None:
    if find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed: pip install llama-cpp-python")
    from llama_cpp import Llama

    words = WORDS[name]
    cut = json.loads(words.pre_tokenizer().__getstate__())
    plain = SubwordTokenizer.train([TEXT], "bpe", 400)
    tokenizer = edited(plain, tmp_path, pre_tokenizer=cut, ignore_merges=words.whole)
    sizes = {"hidden_size": 32, "num_layers": 1, "num_heads": 2}
    model = DecoderModel.from_config(llama(vocab_size=tokenizer.vocab_size + 3, **sizes))
    save_gguf(model, tokenizer, tmp_path / "model.gguf", "a model")
    theirs = Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    text = ODD + TEXT
    assert theirs.tokenize(text.encode(), add_bos=False, special=True) == tokenizer.encode(text)
    theirs.close()


def test_a_vocabulary_that_the_model_does_not_have() -> None:
    tokenizer = SimpleCharacterTokenizer(["abc"])
    with pytest.raises(ValueError, match="the tokenizer has 4 ids, and the model only 3"):
        gguf_vocabulary(tokenizer, 3)
