"""From datasets to sequences of tokens."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers

from fastllm.data.corpus import file_format, load_documents, tokenize

WORDS = "a b c d e f g h".split()
SPECIAL = ["<|endoftext|>", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Each word is a token: a is 5, b is 6 and so on; the end is 0, [CLS] 1, [SEP] 2."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]"
    )


def rows(texts: list[str | None]) -> Any:
    return datasets.Dataset.from_dict({"text": texts})


def test_documents_are_joined_by_the_end_token_and_cut(tokenizer: Any) -> None:
    plain = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>"
    )
    plain.backend_tokenizer.post_processor = None
    documents = rows(["a b c", None, "", "d", "e f"])
    result = tokenize(documents, plain, 4)
    assert result["input_ids"] == [
        [5, 6, 7, 0],
        [8, 0, 9, 10],
    ]  # one token is too short for a sequence
    result = tokenize(documents, plain, 4, end_token=False)
    assert result["input_ids"] == [[5, 6, 7, 8], [9, 10]]
    result = tokenize(documents, plain, 3, packing=False)
    assert result["input_ids"] == [[5, 6, 7], [8, 0], [9, 10, 0]]
    result = tokenize(documents, plain, 4, min_length=3)
    assert result["input_ids"] == [[5, 6, 7, 0], [9, 10, 0]]


def test_masked_sequences_have_special_tokens(tokenizer: Any) -> None:
    documents = rows(["a b c", "", "d"])
    result = tokenize(documents, tokenizer, 5, masked=True)
    assert result["input_ids"] == [[1, 5, 6, 7, 2], [1, 2, 8, 2, 2]]
    result = tokenize(documents, tokenizer, 4, masked=True, packing=False)
    assert result["input_ids"] == [[1, 5, 6, 2], [1, 8, 2]]


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "csv", "parquet"])
def test_files_of_every_format(tmp_path: Path, suffix: str) -> None:
    path, texts = tmp_path / f"data.{suffix}", ["a b", "c, d"]
    if suffix == "txt":
        path.write_text("a b\nc, d")
        texts = ["a b\n", "c, d"]
    elif suffix == "csv":
        path.write_text('n,text\n1,a b\n2,"c, d"\n')
    elif suffix == "parquet":
        rows(texts).to_parquet(path)
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    documents, held_out = load_documents([str(path)])
    assert documents["text"][:] == texts and held_out is None
    assert load_documents([str(path), str(path)], max_samples=3)[0]["text"][:] == [*texts, texts[0]]


def test_a_folder_has_a_validation_split(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for part in ("train", "validation"):
        (folder / f"{part}.jsonl").write_text("\n".join([json.dumps({"text": part})] * 3))
    for max_samples, count in ((0, 3), (2, 2)):  # streamed in the second case
        documents, held_out = load_documents([str(folder)], max_samples)
        assert documents["text"][:] == ["train"] * count
        assert held_out is not None and held_out["text"][:] == ["validation"] * count


def test_errors_name_what_cannot_be_read(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(ValueError, match=r"broken\.jsonl cannot be read as json: "):
        load_documents([str(tmp_path / "broken.jsonl")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty cannot be read as a dataset: "):
        load_documents([str(tmp_path / "empty")])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt does not exist"):
        file_format(["nowhere.txt"])
    with pytest.raises(ValueError, match="several formats"):
        (tmp_path / "a.txt").touch()
        file_format([str(tmp_path / "a.txt"), str(tmp_path / "broken.jsonl")])
    (tmp_path / "a.doc").touch()
    with pytest.raises(ValueError, match=r"a\.doc has an unknown format"):
        file_format([str(tmp_path / "a.doc")])
    assert file_format(["wikitext", "wikitext-2-raw-v1"]) is None
    with pytest.raises(ValueError, match="no column 'body'; choose .* --text_column: text"):
        tokenize(rows(["a"]), tokenizer, 4, text_column="body")
    with pytest.raises(ValueError, match="holds int64, not text"):
        tokenize(datasets.Dataset.from_dict({"text": [1]}), tokenizer, 4)
    with pytest.raises(ValueError, match="no text of at least 9 characters"):
        tokenize(rows(["a b"]), tokenizer, 4, min_length=9)
