"""The words that name texts mean the same in train, finetune and evaluate."""

import gzip
import json
import lzma
from pathlib import Path

import datasets
import pytest

from fastllm.data import sources
from fastllm.data.corpus import load_documents
from fastllm.finetuning.config import FinetuneConfig
from fastllm.finetuning.inputs import find_inputs
from fastllm.training.config import TrainConfig
from fastllm.training.run import read_texts
from tests.commands import run_command
from tests.conftest import MakeTrainer

LINES = ["the cat sat\n", "on the mat\n", "the quick brown fox\n"]
# The words, and the files that they name: each has all lines, or one of three its own.
FILES: dict[str, list[str]] = {
    **{
        name: [name]
        for name in ("book", "book.txt", "book.md", "book.txt.gz", "book.xz", "book.jsonl",
                     "book.jsonl.gz", "book.json", "book.csv", "book.csv.xz", "book.parquet")
    },
    "1.txt 2.csv 3.jsonl.gz": ["1.txt", "2.csv", "3.jsonl.gz"],
    "folder": ["folder/1.txt", "folder/2.csv", "folder/3.jsonl.gz"],
    "folder/[0-9]*": ["folder/1.txt", "folder/2.csv.gz", "folder/3"],
    "**/?.*": ["folder/1.txt", "folder/2.csv.gz", "folder/3.parquet"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write(name: str, lines: list[str]) -> None:
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    rows = [line.removesuffix("\n") for line in lines]
    records = [{"number": i, "line": row} for i, row in enumerate(rows)]
    if ".json" in name:
        text = "".join(json.dumps(record) + "\n" for record in records)
    elif ".csv" in name:
        text = "number,line\n" + "".join(f"{i},{row}\n" for i, row in enumerate(rows))
    else:
        text = "".join(lines)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(records).to_parquet(name)
    else:
        compress = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, lambda data: data)
        path.write_bytes(compress(text.encode()))


@pytest.mark.parametrize("given", FILES)
def test_the_same_words_are_the_same_text(given: str, make_trainer: MakeTrainer) -> None:
    words, files = given.split(), FILES[given]
    for name, line in zip(files, LINES, strict=False):
        write(name, LINES if len(files) == 1 else [line])
    text = "".join(LINES)
    texts = read_texts(TrainConfig(file_path=list(map(Path, words)), text_column="line"))
    assert texts is not None and "".join(texts.pieces()) == text

    config = FinetuneConfig(model="gpt2", dataset=words, text_column="line")
    parts, held_out = load_documents(find_inputs(config)["dataset"])
    found = [row.removesuffix("\n") for part in parts for row in part.rows["text"]]
    assert found == text.splitlines() and not held_out

    trainer = make_trainer("run", "--max_steps", "1")
    trainer.train()
    flags = ("--checkpoint", str(trainer.run_dir), "--text_column", "line", "--json")
    result = run_command("evaluate", *words, *flags)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["tokens"] == len(text) - 1


WRONG = {
    "picture.png": (b"\x89PNG\r\n\x1a\n\0", "is not text but a PNG image"),
    "photo.txt": (b"\xff\xd8\xff\xe0\0", "is not text but a JPEG image"),
    "paper.pdf": (b"%PDF-1.7\n%\xe2\xe3", "is not text but a PDF document"),
    "letter.docx": (b"PK\x03\x04\x14\0", "is not text but a Word document"),
    "table.csv": (b"PK\x03\x04\x14\0", "is not text but a ZIP archive"),
    "paper.gz": (gzip.compress(b"%PDF-1.7"), "is not text but a PDF document"),
    "broken.xz": (b"plain", "is damaged, or is not what its ending says"),
    "table.jsonl": (b'{"body": "a"}', "has no column 'text'; choose one by --text_column: body"),
    "folder/a.txt": (b"some\0thing", "is not text but a binary file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_text_is_named_in_every_command(name: str, make_trainer: MakeTrainer) -> None:
    content, message = WRONG[name]
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_bytes(content)
    word = name.partition("/")[0]
    run = ("--checkpoint", str(make_trainer("run", "--max_steps", "1").run_dir))
    Path("gpt2").mkdir()
    for command in (["train"], ["finetune", "--model", "gpt2"], ["evaluate", *run]):
        result = run_command(*command, "--file_path", word)
        assert result.returncode == 1
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ") and f"{name} {message}" in line
    assert not Path("runs").exists()


def test_a_folder_is_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    searched = []
    search = sources._texts_in
    monkeypatch.setattr(sources, "_texts_in", lambda path: searched.append(path) or search(path))
    write("folder/1.txt", LINES * 9)
    flags = "folder --tokenizer char --max_steps 1 --num_layers 1 --threads 1 --out_dir run"
    assert run_command("train", *flags.split()).returncode == 0
    assert run_command("evaluate", "folder", "--checkpoint", "run").returncode == 0
    assert searched == [Path("folder")] * 2
