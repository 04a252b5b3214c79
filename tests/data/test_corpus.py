"""From datasets to sequences of tokens."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers

from fastllm.data.corpus import (
    PIECE,
    Corpus,
    Documents,
    _pieces,
    find_corpus,
    load_documents,
    tokenize,
)

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


def rows(texts: list[str | None]) -> list[Documents]:
    return [Documents(datasets.Dataset.from_dict({"text": texts}), "text")]


def texts_of(words: list[str], max_samples: int = 0, text_column: str = "text") -> Any:
    """The documents to train on, and those held out."""
    parts = load_documents(find_corpus(words, text_column), max_samples)
    return tuple(
        [text for part in split for text in part.rows[part.text_column]] for split in parts
    )


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


@pytest.mark.parametrize("compression", ["", ".gz"])
@pytest.mark.parametrize("suffix", ["txt", "text", "jsonl", "json", "csv", "parquet"])
def test_files_of_every_format(tmp_path: Path, suffix: str, compression: str) -> None:
    path, texts = tmp_path / f"data.{suffix}", ["a b", "c, d"]
    if suffix in ("txt", "text"):
        path.write_text("a b\nc, d")
        texts = ["a b\n", "c, d"]
    elif suffix == "csv":
        path.write_text('n,text\n1,a b\n2,"c, d"\n')
    elif suffix == "parquet":
        datasets.Dataset.from_dict({"text": texts}).to_parquet(path)
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    if compression and suffix != "parquet":
        path = path.with_name(path.name + compression)
        path.write_bytes(gzip.compress(path.with_suffix("").read_bytes()))
    assert texts_of([str(path)]) == (texts, [])
    assert texts_of([str(path), str(tmp_path / "d*")], max_samples=1) == (texts[:1], [])


def test_texts_and_tables_of_one_folder(tmp_path: Path, tokenizer: Any) -> None:
    """The lines of texts follow each other; each row ends with the separator, number 2."""
    (tmp_path / "1.txt").write_text("a b\nc d")
    (tmp_path / "2.txt").write_text("e\n")
    (tmp_path / "3.jsonl").write_text('{"text": "f"}\n{"text": "g h"}\n')
    (tmp_path / "4.csv").write_text("text\n\n")
    (tmp_path / "5.txt").write_text("a")
    parts, held_out = load_documents(find_corpus([str(tmp_path)]))
    assert [part.are_lines for part in parts] == [True, False, True] and not held_out
    sequences = tokenize(parts, tokenizer, 8)["input_ids"]
    assert sequences == [[5, 6, 7, 8, 9], [1, 10, 2, 1, 11, 12, 2]]
    whole = texts_of([str(tmp_path)])[0]
    assert whole == ["a b\n", "c d\n", "e\n", "f", "g h", "a"]
    for count in range(1, len(whole) + 2):
        assert texts_of([str(tmp_path)], count)[0] == whole[:count]


@pytest.mark.parametrize("name", ["a.pdf", "a.txt", "a.jsonl"])
def test_what_is_no_text_is_named_unread(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"%PDF-1.7\n%\xe2\xe3")
    (tmp_path / "b.txt").write_text("text")
    for words in ([name], ["b.txt", name], ["*.*"]):
        with pytest.raises(ValueError, match=f"{name} is not text but a PDF"):
            find_corpus([str(tmp_path / word) for word in words])


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
            assert texts_of([str(folder / name)]) == (texts, [])
            monkeypatch.chdir(tmp_path / place)
            assert texts_of([f"data/{name}"]) == (texts, [])
        everything = sorted(f"{place} {name}" for name in NAMES)
        assert sorted(texts_of(["data"])[0]) == everything
        for max_samples in (0, 100):  # streamed in the second case
            parts, _ = load_documents(Corpus(["data"], "text"), max_samples)
            assert sorted(parts[0].rows["text"]) == everything


@pytest.mark.parametrize("kind", ["file", "folder", "dataset"])
def test_content_decides_what_is_read_again(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "folder" / "train.jsonl"
    path.parent.mkdir()
    words = [str(path if kind == "file" else path.parent)]
    if kind == "dataset":
        words.append("default")
    for text in ("one", "two", "one"):
        path.write_text(json.dumps({"text": text}))
        os.utime(path, (1_700_000_000, 1_700_000_000))
        assert texts_of(words) == ([text], [])


def test_disks_without_links_hold_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.jsonl").write_text('{"text": "b"}')
    assert texts_of([str(tmp_path / "data"), "default"]) == (["b"], [])


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


@pytest.mark.parametrize("kind", ["names", "card", "configuration"])
def test_a_folder_has_a_validation_split(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    for part in ("train", "validation", "test"):
        (folder / f"{part}-1.jsonl").write_text("\n".join([json.dumps({"text": part})] * 3))
    words = [str(folder)]
    if kind == "card":
        files = "data_files:\n  - split: train\n    path: train-*"
        (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: one\n  {files}\n---\n")
    elif kind == "configuration":
        words.append("default")
    for max_samples, count in ((0, 3), (2, 2)):  # streamed in the second case
        held_out = [] if kind == "card" else ["validation"] * count
        assert texts_of(words, max_samples) == (["train"] * count, held_out)
    if kind == "names":
        (folder / "deep/other.txt").write_text("other")
        others = [text for part in ("test", "train", "validation") for text in [part] * 3]
        assert texts_of(words) == (["other", *others], [])


def test_errors_name_what_cannot_be_read(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(ValueError, match=r"broken\.jsonl: line 2 is not JSON: "):
        texts_of([str(tmp_path / "broken.jsonl")])
    assert not [*(tmp_path / "cache").rglob("*.arrow")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty default cannot be read as a dataset: "):
        texts_of([str(tmp_path / "empty"), "default"])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt does not exist"):
        find_corpus(["nowhere.txt"])
    assert find_corpus(["wikitext", "wikitext-2-raw-v1"]).texts is None
    with pytest.raises(ValueError, match="no column 'body'; choose .* --text_column: text"):
        tokenize([rows(["a"])[0]._replace(text_column="body")], tokenizer, 4)
    with pytest.raises(ValueError, match="holds int64, not text"):
        tokenize([Documents(datasets.Dataset.from_dict({"text": [1]}), "text")], tokenizer, 4)
    for texts in (["a b"], []):
        with pytest.raises(ValueError, match="no text of at least 9 characters"):
            tokenize(rows(texts), tokenizer, 4, min_length=9)
