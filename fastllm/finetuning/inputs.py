"""What a run reads: where it is, and whether a resumed run reads the same again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fastllm.data.corpus import file_format
from fastllm.files import replace_file
from fastllm.finetuning.config import FinetuneConfig
from fastllm.integrations import hub

if TYPE_CHECKING:
    from datasets import Dataset

MODEL_FILES = {".json", ".safetensors", ".bin", ".gguf", ".model", ".txt", ".jinja"}


def check_paths(config: FinetuneConfig) -> None:
    """Raises an error that names the flag if what it names is not there, or is a pipe.

    Raises:
        FileNotFoundError: a file or folder does not exist.
        ValueError: it is neither file nor folder.
    """
    given = {
        "model": [config.model],
        "tokenizer": [config.tokenizer] if config.tokenizer else [],
        "dataset": config.dataset,
        "eval_dataset": config.eval_dataset,
    }
    for flag, words in given.items():
        for number, word in enumerate(words):
            path = Path(word)
            if path.exists() and not path.is_file() and not path.is_dir():
                raise ValueError(
                    f"{flag}: {word} is a pipe or a device, which cannot be read twice; save its "
                    "content in a file"
                )
            # Words after the first are files, or the configuration of a dataset.
            if not path.exists() and hub.is_local(word) and (not number or path.suffix):
                raise FileNotFoundError(
                    f"{word} does not exist; if it is elsewhere, give its place by --{flag}"
                )


def with_absolute_paths(config: FinetuneConfig) -> FinetuneConfig:
    """The settings as a run records them, for commands in another current folder."""

    def absolute(word: str) -> str:
        return str(Path(word).absolute()) if Path(word).exists() else word

    def all_absolute(words: list[str]) -> list[str]:
        files = len(words) if words and file_format(words) else 1
        return [*map(absolute, words[:files]), *words[files:]]

    return config.model_copy(
        update={
            "model": absolute(config.model),
            "tokenizer": config.tokenizer and absolute(config.tokenizer),
            "dataset": all_absolute(config.dataset),
            "eval_dataset": all_absolute(config.eval_dataset),
        }
    )


class Inputs:
    """The digests of what a run reads, in inputs.json of its folder.

    Args:
        run_dir: None for a command that writes nothing.
        resume: whether the run goes on, and must read the same.
    """

    def __init__(self, run_dir: Path | None, resume: bool) -> None:
        self.file = run_dir and run_dir / "inputs.json"
        self.digests: dict[str, str] = {}
        self.expected: dict[str, str] = {}
        if resume and self.file and self.file.exists():
            self.expected = json.loads(self.file.read_text(encoding="utf-8"))

    def add(self, flag: str, digest: Callable[[], str]) -> None:
        """Notes the digest of what a flag names.

        Raises:
            ValueError: the resumed run began with another.
        """
        if self.file is None:
            return
        self.digests[flag] = digest()
        if self.expected.get(flag, self.digests[flag]) != self.digests[flag]:
            raise ValueError(
                f"{flag}: this is not what the run began with; give the same by --{flag}, or start "
                "a new run in another --out_dir"
            )

    def write(self) -> None:
        if self.file:
            with replace_file(self.file) as file:
                file.write(json.dumps(self.digests, indent=2).encode() + b"\n")


def model_digest(name: str, file_digest: Callable[[Path], str]) -> str:
    """A digest of the files of a model or tokenizer; of its name if it is on the hub.

    Args:
        file_digest: the SHA-256 of a file.
    """
    path = Path(name)
    digest = hashlib.sha256()
    if not path.exists():
        digest.update(name.encode())
    files = [path] if path.is_file() else sorted(path.glob("*"))
    for file in files:
        if file.is_file() and file.suffix in MODEL_FILES:
            digest.update(f"{file.name}\0{file_digest(file.resolve())}\0".encode())
    return digest.hexdigest()


def sequences_digest(*datasets: Dataset | None) -> str:
    """A digest of the tokens of all sequences."""
    digest = hashlib.sha256()
    for sequences in datasets:
        digest.update(b"\0")
        for batch in sequences.with_format("arrow").iter(1_000) if sequences is not None else ():
            column = batch["input_ids"].combine_chunks()
            for values in (column.value_lengths(), column.flatten()):
                digest.update(values.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()
