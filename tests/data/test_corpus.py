"""From datasets to sequences of tokens."""

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers

from fastllm.data.corpus import PIECE, _pieces, file_format, load_documents, tokenize

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


NAMES = ["a1.jsonl", "a?.jsonl", "b[1].jsonl", "b1.jsonl", "*.jsonl", "c::d.jsonl", "e:f.jsonl"]


def test_a_path_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the names of files nor those of their folders are patterns or URLs."""
    for place in ("B [2]", "what?", "a::b", "*"):
        folder = tmp_path / place / "data"
        folder.mkdir(parents=True)
        for name in NAMES:
            (folder / name).write_text(json.dumps({"text": f"{place} {name}"}) + "\n")
        for name in NAMES:
            texts = [f"{place} {name}"]
            assert load_documents([str(folder / name)])[0]["text"][:] == texts
            monkeypatch.chdir(tmp_path / place)
            assert load_documents([f"data/{name}"])[0]["text"][:] == texts
        everything = sorted(f"{place} {name}" for name in NAMES)
        for max_samples in (0, 100):  # streamed in the second case
            assert sorted(load_documents(["data"], max_samples)[0]["text"]) == everything


@pytest.mark.parametrize("is_folder", [False, True])
def test_content_decides_what_is_read_again(tmp_path: Path, is_folder: bool) -> None:
    path = tmp_path / "folder" / "train.jsonl"
    path.parent.mkdir()
    words = [str(path.parent if is_folder else path)]
    for text in ("one", "two", "one"):
        path.write_text(json.dumps({"text": text}))
        os.utime(path, (1_700_000_000, 1_700_000_000))
        assert load_documents(words)[0]["text"][:] == [text]


def test_disks_without_links_hold_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    (tmp_path / "a.txt").write_text("b\n")
    assert load_documents([str(tmp_path / "a.txt")])[0]["text"][:] == ["b\n"]


def test_long_documents_are_tokenized_in_pieces(tokenizer: Any) -> None:
    """The pieces leave no trace, and special tokens stand around the whole document."""
    words = WORDS * (PIECE // 4)  # two characters each
    ids = [5 + i % len(WORDS) for i in range(len(words))]
    texts = [" ".join(words), "\n".join(words), "a"]
    sequences = tokenize(rows(texts), tokenizer, 2**20, packing=False, end_token=False)["input_ids"]
    assert sequences == [ids, ids]
    result = tokenize(rows(texts), tokenizer, 2**20, packing=False, masked=True)["input_ids"]
    assert result == [[1, *ids, 2], [1, *ids, 2], [1, 5, 2]]
    (whole,) = tokenize(rows(texts), tokenizer, 2**20)["input_ids"]
    assert whole == [1, *ids, 2, 1, *ids, 2, 1, 5, 2]
    assert [len(piece) for piece in _pieces("a" * (2 * PIECE + 1))] == [PIECE, PIECE, 1]
    text = "".join(f"{i} " for i in range(PIECE))
    assert "".join(_pieces(text)) == text


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
