"""Datasets and batches: chunking, padding, gathering, splitting, workers."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Subset

from fastllm.data import TextDataset, create_dataloader
from fastllm.data.loader import Batch
from fastllm.tokenization import SimpleCharacterTokenizer

quick = settings(deadline=None, derandomize=True, max_examples=80)

TOKENIZER = SimpleCharacterTokenizer(["abcdefghij"])
PAD = TOKENIZER.pad_token_id


def dataset_of(count, max_seq_len=4, overlap=0, **kwargs):
    return TextDataset.from_tokens(np.arange(count), TOKENIZER, max_seq_len, overlap, **kwargs)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij")
    return path


@pytest.mark.parametrize(
    ("overlap", "chunks"),
    [
        (0, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]),
        (1, [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9], [9]]),
        (2, [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8, 9], [8, 9]]),
        (3, [[i, i + 1, i + 2, i + 3][: 10 - i] for i in range(10)]),
    ],
)
@pytest.mark.parametrize("mapped", [False, True], ids=["memory", "mapped"])
def test_chunks_by_hand(text_file, tmp_path, overlap, chunks, mapped):
    token_file = tmp_path / "tokens.bin" if mapped else None
    dataset = TextDataset(text_file, TOKENIZER, 4, overlap, token_file=token_file)
    assert len(dataset) == len(chunks)
    assert list(dataset.sequences) == chunks
    for i, chunk in enumerate(chunks):
        padded = chunk + [PAD] * (4 - len(chunk))
        for sample in (dataset[i], dataset[i - len(chunks)], dataset[np.int64(i)]):
            assert set(sample) == {"input_ids", "labels"}
            for ids in sample.values():
                assert ids.dtype == torch.long
                assert ids.tolist() == padded


def test_attributes(text_file):
    dataset = TextDataset(str(text_file), TOKENIZER, 4, 1, 7)
    assert dataset.tokenizer is TOKENIZER
    assert (dataset.max_seq_len, dataset.overlap, dataset.padding_value) == (4, 1, 7)
    assert dataset.file_path == str(text_file)
    assert dataset.tokens.dtype == np.uint8
    assert TextDataset(text_file, TOKENIZER, 4).padding_value == PAD


@quick
@given(st.integers(0, 60), st.integers(1, 9), st.data())
def test_chunking(count, max_seq_len, data):
    overlap = data.draw(st.integers(0, max_seq_len - 1))
    dataset = dataset_of(count, max_seq_len, overlap, padding_value=-100)
    starts = range(0, count, max_seq_len - overlap)
    chunks = [list(range(count))[start : start + max_seq_len] for start in starts]
    assert dataset.sequences == chunks
    assert len(dataset) == len(chunks)
    padded = [chunk + [-100] * (max_seq_len - len(chunk)) for chunk in chunks]
    if chunks:
        order = data.draw(st.lists(st.integers(-len(chunks), len(chunks) - 1), min_size=1))
        batch = dataset.__getitems__(order)
        assert batch.input_ids.tolist() == [padded[i] for i in order]
        assert [sample["labels"].tolist() for sample in batch] == [padded[i] for i in order]


def test_sequences_is_a_view():
    sequences = dataset_of(10).sequences
    assert sequences[1] == [4, 5, 6, 7]
    assert sequences[-1] == [8, 9]
    assert sequences[1:] == [[4, 5, 6, 7], [8, 9]]
    assert sequences[::-2] == [[8, 9], [0, 1, 2, 3]]
    assert all(type(token) is int for token in sequences[0])
    assert [8, 9] in sequences
    assert sequences != [[0]]
    with pytest.raises(IndexError):
        sequences[3]


def test_inputs_and_labels_do_not_share_memory():
    dataset = dataset_of(10)
    batch = next(iter(create_dataloader(dataset, 2, shuffle=False)))
    for sample in (dataset[0], dataset.__getitems__([0, 1])[1], batch):
        before = sample["input_ids"].clone()
        sample["labels"].fill_(-100)
        assert torch.equal(sample["input_ids"], before)
        sample["input_ids"].fill_(1)
    assert dataset.tokens.tolist() == list(range(10))


@pytest.mark.parametrize("index", [3, -4, np.int64(3)])
def test_index_out_of_range(index):
    with pytest.raises(IndexError):
        dataset_of(10)[index]


def test_index_errors_name_the_index():
    with pytest.raises(IndexError, match="index 3 is out of range for a dataset of 3 chunks"):
        dataset_of(10)[3]
    with pytest.raises(IndexError, match="index -4 is out of range"):
        dataset_of(10).__getitems__([0, -4])
    with pytest.raises(TypeError):
        dataset_of(10)[0.0]


def test_empty_file(tmp_path):
    path = tmp_path / "empty.txt"
    path.write_text("")
    dataset = TextDataset(path, TOKENIZER, 4)
    assert len(dataset) == 0
    assert dataset.sequences == []
    assert list(create_dataloader(dataset, 2)) == []
    with pytest.raises(IndexError):
        dataset[0]


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        ({"max_seq_len": 0}, "max_seq_len must be at least 1"),
        ({"max_seq_len": 4, "overlap": -1}, "overlap must be at least 0"),
        ({"max_seq_len": 4, "overlap": 4}, "overlap must be less than max_seq_len"),
        ({"max_seq_len": 4, "padding_value": 1.5}, "padding_value must be an integer"),
        ({"max_seq_len": 4, "padding_value": "<PAD>"}, "padding_value must be an integer"),
        ({"max_seq_len": 4, "min_line_length": -1}, "min_line_length must be at least 0"),
    ],
)
def test_invalid_arguments(text_file, arguments, wrong):
    with pytest.raises(ValueError, match=wrong):
        TextDataset(text_file, TOKENIZER, **arguments)


def test_missing_file_and_unknown_character(tmp_path, text_file):
    with pytest.raises(FileNotFoundError):
        TextDataset(tmp_path / "no.txt", TOKENIZER, 4)
    with pytest.raises(KeyError, match="Character 'd' not found"):
        TextDataset(text_file, SimpleCharacterTokenizer(["abc"]), 4)


@pytest.mark.parametrize("tokens", [[[1]], [1.5], ["a"]], ids=["2d", "float", "text"])
def test_tokens_must_be_integers(tokens):
    with pytest.raises(ValueError, match="one-dimensional array of integers"):
        TextDataset.from_tokens(tokens, TOKENIZER, 4)


def test_duck_typed_tokenizer(text_file):
    class Duck:
        vocab_size = 300
        pad_token_id = 299

        def encode(self, text):
            return [ord(char) for char in text]

    dataset = TextDataset(text_file, Duck(), 4)
    assert dataset.tokens.dtype == np.uint16
    assert dataset[2]["input_ids"].tolist() == [ord("i"), ord("j"), 299, 299]


def test_cleaning(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("ab\na\nab\nabc\n")
    tokenizer = SimpleCharacterTokenizer(["abc\n"])
    dataset = TextDataset(path, tokenizer, 100, min_line_length=2, dedup_lines=True)
    assert tokenizer.decode(dataset.sequences[0]) == "ab\nabc\n"


@pytest.mark.parametrize("shuffle", [False, True])
def test_dataloader(shuffle):
    dataset = dataset_of(10)
    loader = create_dataloader(dataset, 2, shuffle=shuffle)
    assert isinstance(loader, DataLoader)
    batches = list(loader)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 4), (1, 4)]
    rows = [row for batch in batches for row in batch["labels"].tolist()]
    assert sorted(rows) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, PAD, PAD]]


def test_dataloader_gathers_once_per_batch(monkeypatch):
    dataset = dataset_of(40)
    gathered = []
    real = TextDataset._gather
    monkeypatch.setattr(
        TextDataset, "_gather", lambda self, i: gathered.append(len(i)) or real(self, i)
    )
    list(create_dataloader(dataset, 4, shuffle=False))
    assert gathered == [4, 4, 2]


def test_plain_dataloader_yields_the_same_batches():
    dataset = dataset_of(10)
    ours = list(create_dataloader(dataset, 2, shuffle=False))
    for plain in (DataLoader(dataset, batch_size=2), DataLoader(Subset(dataset, [0, 1, 2]), 2)):
        for one, other in zip(ours, plain, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one)


def test_batch_is_a_sequence():
    batch = dataset_of(10).__getitems__([0, 1])
    assert isinstance(batch, Batch)
    assert len(batch) == len(list(batch)) == 2
    assert batch[-1]["input_ids"].tolist() == [4, 5, 6, 7]
    assert batch[1:].input_ids.tolist() == [[4, 5, 6, 7]]


def test_overridden_getitem_is_honoured():
    class Shifted(TextDataset):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return {**sample, "labels": sample["labels"] + 1}

    dataset = Shifted.from_tokens(np.arange(8), TOKENIZER, 4)
    (batch,) = create_dataloader(dataset, 2, shuffle=False)
    assert torch.equal(batch["labels"], batch["input_ids"] + 1)
    assert isinstance(dataset.split(0.5)[1], Shifted)


def test_invalid_dataloader_arguments():
    with pytest.raises(TypeError, match="dataset must be a TextDataset, not list"):
        create_dataloader([1, 2], 2)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        create_dataloader(dataset_of(10), 0)
    with pytest.raises(ValueError, match="num_workers must be at least 0"):
        create_dataloader(dataset_of(10), 2, num_workers=-1)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_split(fraction):
    dataset = dataset_of(100, max_seq_len=8, overlap=3)
    train, val = dataset.split(fraction)
    cut = int(100 * (1 - fraction))
    assert train.tokens.tolist() == list(range(cut))
    assert val.tokens.tolist() == list(range(cut, 100))
    assert (train.overlap, val.overlap) == (3, 1)
    assert np.shares_memory(train.tokens, dataset.tokens)
    assert np.shares_memory(val.tokens, dataset.tokens)
    predicted = [token for chunk in val.sequences for token in chunk[1:]]
    assert predicted == list(range(cut + 1, 100))


@pytest.mark.parametrize(
    ("count", "max_seq_len", "fraction", "wrong"),
    [
        (100, 4, 0.0, "between 0 and 1"),
        (100, 4, 1.0, "between 0 and 1"),
        (100, 1, 0.5, "max_seq_len must be at least 2"),
        (10, 4, 0.1, "leaves 1 for validation"),
        (10, 4, 0.9, "leaves 0 for training|leaves 1 for training"),
        (0, 4, 0.5, "leaves 0 for training"),
    ],
)
def test_invalid_split_arguments(count, max_seq_len, fraction, wrong):
    with pytest.raises(ValueError, match=wrong):
        dataset_of(count, max_seq_len).split(fraction)


@pytest.mark.parametrize("part", ["whole", "train", "val", "half-of-val"])
def test_pickled_dataset_maps_the_file_again(tmp_path, part):
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij" * 10_000)
    dataset = TextDataset(path, TOKENIZER, 8, token_file=tmp_path / "tokens.bin")
    train, val = dataset.split(0.3)
    chosen = {"whole": dataset, "train": train, "val": val, "half-of-val": val.split(0.5)[1]}[part]
    pickled = pickle.dumps(chosen)
    assert len(pickled) < 5000
    again = pickle.loads(pickled)
    assert isinstance(again.tokens, np.memmap)
    assert np.array_equal(again.tokens, chosen.tokens)
    assert torch.equal(again[-1]["input_ids"], chosen[-1]["input_ids"])
    (tmp_path / "tokens.bin").unlink()
    with pytest.raises(ValueError, match="changed or removed"):
        pickle.loads(pickled)


def test_pickled_dataset_in_memory():
    again = pickle.loads(pickle.dumps(dataset_of(10)))
    assert again.sequences == dataset_of(10).sequences


@pytest.mark.subprocess
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers(text_file, tmp_path, start):
    dataset = TextDataset(text_file, TOKENIZER, 4, token_file=tmp_path / "tokens.bin")
    loader = create_dataloader(dataset, 2, shuffle=False, num_workers=2)
    loader.multiprocessing_context = start
    rows = [row for batch in loader for row in batch["input_ids"].tolist()]
    assert rows == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, PAD, PAD]]
