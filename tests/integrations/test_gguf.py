"""Tokenizers in llama.cpp's format; test_export.py has whole files."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from fastllm import SimpleCharacterTokenizer
from fastllm.integrations.gguf import Vocabulary, gguf_vocabulary
from fastllm.tokenization import SubwordTokenizer
from tests.integrations.samples import CHARACTERS, TEXT

for module in ("gguf", "tokenizers"):
    pytest.importorskip(module, reason=f"{module} is not installed: pip install '.[test]'")


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
    vocabulary = gguf_vocabulary(ours)
    assert len(vocabulary.tokens) == len(set(vocabulary.tokens)) == ours.vocab_size
    as_bytes = ByteLevel(add_prefix_space=False, use_regex=False)
    ((spelt, _),) = as_bytes.pre_tokenize_str(CHARACTERS)
    assert bpe(vocabulary, spelt) == ours.encode(CHARACTERS)
    # llama.cpp reads no file without a merge; that of plain ASCII never applies.
    assert gguf_vocabulary(SimpleCharacterTokenizer(["abc"])).merges == ["<PAD> <PAD>"]


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
        ({"normalizer": {"type": "NFC"}}, "normalizes texts first"),
        ({"ignore_merges": True}, "no ignore_merges"),
    ],
    ids=["no-regex", "none", "prefix", "normalizer", "ignore-merges"],
)
def test_tokenizers_that_llama_cpp_cannot_reproduce(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    tokenizer = edited(SubwordTokenizer.train([TEXT], "bpe", 300), tmp_path, **changes)
    with pytest.raises(ValueError, match=f"llama.cpp cannot reproduce this tokenizer: .*{message}"):
        gguf_vocabulary(tokenizer)


def test_ids_without_a_token_are_unused_in_gguf(tmp_path: Path) -> None:
    trained = SubwordTokenizer.train([TEXT], "bpe", 300)
    data = json.loads(trained.to_json())
    vocab, (pad,) = data["model"]["vocab"], data["added_tokens"]
    last = max(vocab, key=vocab.__getitem__)
    vocab[last] += 10
    more = {**pad, "id": vocab[last] + 1, "content": "<|more|>", "special": False}
    tokenizer = edited(trained, tmp_path, vocab=vocab, added_tokens=[pad, more])
    tokens, types, _ = gguf_vocabulary(tokenizer)
    assert len(tokens) == len(set(tokens)) == tokenizer.vocab_size
    for id, text in ((tokenizer.pad_token_id, "<PAD>"), *((i, t) for t, i in vocab.items())):
        assert tokens[id] == text
    assert [types[id] for id in tokenizer.encode("<PAD>a<|more|>")] == [3, 1, 4]
    assert types.count(5) == tokenizer.vocab_size - len(vocab) - 1 == 9


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(ValueError, match="lone surrogate"):
        gguf_vocabulary(SimpleCharacterTokenizer(["a\ud83d"]))
