"""Tokenizers in transformers' format."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastllm import SimpleCharacterTokenizer
from fastllm.integrations.hf_tokenizer import save_hf_tokenizer, tokenizer_json
from fastllm.tokenization import SubwordTokenizer, Tokenizer, load_tokenizer
from tests.integrations.samples import CHARACTERS, TEXT

for module in ("tokenizers", "transformers"):
    pytest.importorskip(module, reason=f"{module} is not installed: pip install '.[test]'")


def auto_tokenizer(tokenizer: Tokenizer, folder: Path) -> Any:
    from transformers import AutoTokenizer

    save_hf_tokenizer(tokenizer, folder, 16)
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    return AutoTokenizer.from_pretrained(folder)


def test_characters_in_transformers(tmp_path: Path) -> None:
    ours = SimpleCharacterTokenizer([CHARACTERS])
    theirs = auto_tokenizer(ours, tmp_path)
    assert len(theirs) == ours.vocab_size
    for text in (CHARACTERS, " a  b ", "a<PAD>b", "", "\n\n\r\n", "é", "é"):
        assert theirs(text).input_ids == ours.encode(text), repr(text)
        assert theirs.decode(ours.encode(text)) == text
    everything = list(range(ours.vocab_size))
    assert theirs.decode(everything) == ours.decode(everything)
    assert theirs.decode(everything, skip_special_tokens=True) == ours.decode(everything[:-1])
    with pytest.raises(Exception, match="Missing"):  # like the KeyError of fastllm's
        theirs("z")
    batch = theirs(["a", "abc"], padding=True).input_ids
    assert batch[0][1:] == [ours.pad_token_id] * 2


def test_exported_characters_load_as_characters_again(tmp_path: Path) -> None:
    ours = SimpleCharacterTokenizer([CHARACTERS])
    auto_tokenizer(ours, tmp_path).save_pretrained(tmp_path / "again")
    for folder in (tmp_path, tmp_path / "again"):
        loaded = load_tokenizer(folder)
        assert isinstance(loaded, SimpleCharacterTokenizer)
        assert loaded.fingerprint == ours.fingerprint


@pytest.mark.parametrize("model", ["bpe", "wordpiece"])
def test_subwords_in_transformers(tmp_path: Path, model: Any) -> None:
    ours = SubwordTokenizer.train([TEXT], model, 400)
    theirs = auto_tokenizer(ours, tmp_path)
    for text in (TEXT, "Unseen: xyz", " two  spaces ", "a <PAD> b", "[PAD]", ""):
        ids = ours.encode(text)
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids) == ours.decode(ids)


def test_no_special_tokens_around_a_text(tmp_path: Path) -> None:
    """fastllm and transformers ignore the special tokens that a tokenizer.json adds."""
    trained = SubwordTokenizer.train([TEXT], "wordpiece", 400)
    data = json.loads(trained.to_json())
    special = {"Special": {"tokens": "[CLS]", "id": "[CLS]", "ids": [2]}}
    piece = {"SpecialToken": {"id": "[CLS]", "type_id": 0}}
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [piece, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"[CLS]": special["Special"] | {"tokens": ["[CLS]"]}},
    }
    (tmp_path / "in.json").write_text(json.dumps(data))
    ours = SubwordTokenizer.from_file(tmp_path / "in.json")
    assert auto_tokenizer(ours, tmp_path)("He said").input_ids == ours.encode("He said")


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(ValueError, match="lone surrogate '.ud83d'"):
        tokenizer_json(SimpleCharacterTokenizer(["a\ud83d"]))
