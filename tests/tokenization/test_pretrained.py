"""Tokenizers of models in Hugging Face's format, compared with transformers' own loading."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastllm.tokenization import SimpleCharacterTokenizer, SubwordTokenizer
from fastllm.tokenization.pretrained import load_pretrained_tokenizer
from tests.hf_models import LIBRARIES, library_of, like_gpt2
from tests.tokenizer_kinds import TEXT

transformers = pytest.importorskip("transformers", reason="needs transformers ([finetune])")
tokenizers = pytest.importorskip("tokenizers")

SAMPLES = [
    "What's in a name?",
    " two  spaces,\n\tthen 世界 🙂",
    "a <s> spelt out</s> and <|im_end|>",
    "",
]


NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<PAD>"}


def write(folder: Path, library: Any, **settings: Any) -> Path:
    """A folder as transformers leaves it, without a model."""
    folder.mkdir(exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMES, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", LIBRARIES)
@pytest.mark.parametrize(
    "settings",
    [{}, {"add_bos_token": True, "add_eos_token": True}, {"split_special_tokens": True}],
    ids=lambda settings: " ".join(settings) or "plain",
)
def test_prompts_encode_as_in_transformers(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """But for an end-of-text token after the prompt, which nothing could continue.

    transformers takes what surrounds a text from tokenizer.json, whatever add_bos_token says.
    """
    folder = write(tmp_path / "model", LIBRARIES[kind](), **settings)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load_pretrained_tokenizer(folder, len(theirs))
    end = theirs.eos_token_id
    for sample in SAMPLES:
        ids = theirs(sample)["input_ids"]
        plain = theirs(sample, add_special_tokens=False)["input_ids"]
        expected = ids[:-1] if len(ids) > len(plain) and ids[-1] == end else ids
        assert [*ours.start_tokens, *ours.encode(sample)] == expected
        assert ours.decode(plain) == theirs.decode(plain)
    assert ours.end_tokens == {end}
    assert ours.pad_token_id == theirs.pad_token_id


def test_named_tokens_become_special_as_in_transformers(tmp_path: Path) -> None:
    """A token of the vocabulary that only tokenizer_config.json names as special."""
    library = library_of(SubwordTokenizer.train([TEXT.replace("rose", "</s>")], "bpe", 320))
    assert library.token_to_id("</") is not None
    library.add_tokens(["<s>", "</s>"])
    folder = write(tmp_path / "model", library)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load_pretrained_tokenizer(folder, len(theirs))
    for text in ("would</s>", "a <s>b"):
        assert ours.encode(text) == theirs(text)["input_ids"]


@pytest.mark.parametrize(
    ("generation", "config", "tokens", "expected"),
    [
        ({"eos_token_id": [3, 7]}, {"eos_token_id": 5}, {}, {3, 7}),
        ({"eos_token_id": 0}, {"eos_token_id": 5}, {}, {0}),
        ({}, {"eos_token_id": 5}, {}, {5}),
        ({"eos_token_id": [3, 50256]}, {}, {}, {3}),
        ({"eos_token_id": 50256}, {"eos_token_id": 5}, {}, set()),
        ({"eos_token_id": None}, {"eos_token_id": [5, 6]}, {}, {5, 6}),
        (None, None, {}, {"</s>"}),
        (None, {}, {"eos_token": {"content": "<|im_end|>"}}, {"<|im_end|>"}),
        (None, {}, {"eos_token": None}, set()),
    ],
)
def test_where_the_end_of_text_is_found(
    generation: Any, config: Any, tokens: dict[str, Any], expected: set[Any], tmp_path: Path
) -> None:
    library = like_gpt2()
    folder = write(tmp_path / "model", library, **tokens)
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    ids = {library.token_to_id(each) if isinstance(each, str) else each for each in expected}
    assert load_pretrained_tokenizer(folder, 310).end_tokens == ids


def test_ids_without_a_token_decode_to_nothing(tmp_path: Path) -> None:
    """A model may have more embeddings than the tokenizer has tokens."""
    for name in ("like GPT-2", "like Llama"):
        folder = write(tmp_path / name, LIBRARIES[name]())
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        ours = load_pretrained_tokenizer(folder, len(theirs) + 10)
        assert ours.vocab_size == len(theirs) + 10
        ids = ours.encode("a rose")
        missing = [len(theirs), len(theirs) + 9]
        assert ours.decode([missing[0], *ids, missing[1]]) == ours.decode(ids)
        with pytest.raises(KeyError, match=f"'{len(theirs) + 10}' not found"):
            ours.decode([len(theirs) + 10])
        assert load_pretrained_tokenizer(folder, len(theirs) - 3).decode(ids) == ours.decode(ids)


def test_padding_on_the_left_is_not_expected_before_prompts(tmp_path: Path) -> None:
    library = LIBRARIES["like Llama"]()
    starts = load_pretrained_tokenizer(write(tmp_path / "plain", library), 300).start_tokens
    library.enable_padding(direction="left", pad_token="<PAD>", length=16)
    folder = write(tmp_path / "padded", library)
    assert load_pretrained_tokenizer(folder, 300).start_tokens == starts


def test_no_padding_is_added_to_a_vocabulary_without(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1}, "a"))
    tokenizer = load_pretrained_tokenizer(write(tmp_path / "model", library), 2)
    assert (tokenizer.vocab_size, tokenizer.pad_token_id) == (2, 1)
    assert "<PAD>" not in tokenizer.to_json()


def test_gpt2s_two_files(tmp_path: Path) -> None:
    vocabulary = json.loads(SubwordTokenizer.train([TEXT], "bpe", 300).to_json())["model"]
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary["vocab"] | {"<|endoftext|>": 300}))
    merges = "\n".join(map(" ".join, vocabulary["merges"]))
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "eos_token_id": 300}))
    theirs = transformers.GPT2Tokenizer.from_pretrained(folder)
    ours = load_pretrained_tokenizer(folder, 301)
    for sample in ("What's in a <|endoftext|>name?", *SAMPLES):
        assert ours.encode(sample) == theirs(sample)["input_ids"]
    assert ours.end_tokens == {300}
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(FileNotFoundError, match="not of GPT-2's kind; make one with transformers"):
        load_pretrained_tokenizer(folder, 301)


def test_a_character_tokenizer_that_was_exported(tmp_path: Path) -> None:
    from fastllm.integrations.hf_tokenizer import save_hf_tokenizer

    characters = SimpleCharacterTokenizer([TEXT])
    save_hf_tokenizer(characters, tmp_path, 16)
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    tokenizer = load_pretrained_tokenizer(tmp_path, characters.vocab_size)
    assert isinstance(tokenizer, SimpleCharacterTokenizer)
    assert tokenizer.chars == characters.chars and tokenizer.end_tokens == {3}
    assert characters.end_tokens == frozenset()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, r"has no tokenizer.json; copy it from"),
        ("tokenizer.model", b"\x0a", r"has tokenizer.model but no tokenizer.json; make one with"),
        ("vocab.txt", b"a", r"has vocab.txt but no tokenizer.json; make one with transformers: "),
        ("tokenizer.json", b"{", r"tokenizer.json is not valid JSON"),
        ("tokenizer.json", b'{"model": 3}', r"tokenizer.json is not a usable tokenizer"),
        ("tokenizer_config.json", b"[1", r"tokenizer_config.json is not valid JSON"),
        ("generation_config.json", b"[]", r"generation_config.json is damaged: it is not a JSON"),
        ("config.json", b'{"eos_token_id": "</s>"}', r"config.json: eos_token_id must be a token"),
        ("config.json", b'{"eos_token_id": [1, true]}', r"config.json: eos_token_id must be"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    file: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "model", like_gpt2())
    if content is None or file in ("tokenizer.model", "vocab.txt"):
        (folder / "tokenizer.json").unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises((FileNotFoundError, ValueError), match=message) as caught:
        load_pretrained_tokenizer(folder, 310)
    assert "\n" not in str(caught.value)
