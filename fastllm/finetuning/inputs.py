"""What a run reads: where it is, and whether a resumed run reads the same again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fastllm.data.corpus import Corpus, find_corpus
from fastllm.data.sources import absolute, is_local
from fastllm.files import replace_file
from fastllm.finetuning.config import FinetuneConfig

if TYPE_CHECKING:
    from datasets import Dataset

MODEL_FILES = {".json", ".safetensors", ".bin", ".gguf", ".model", ".txt", ".jinja"}


def find_inputs(config: FinetuneConfig) -> dict[str, Corpus]:
    """The documents that --dataset and --eval_dataset name.

    Raises:
        FileNotFoundError: what a flag names does not exist.
        ValueError: it is neither file nor folder, or no text.
    """
    found = {}
    for flag in ("model", "tokenizer", "dataset", "eval_dataset"):
        given = getattr(config, flag)
        try:
            if isinstance(given, list) and given:
                found[flag] = find_corpus(given, config.text_column)
            elif given and is_local(given):
                _check_path(given)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error}; if it is elsewhere, give its place by --{flag}"
            ) from None
        except ValueError as error:
            raise ValueError(f"{flag}: {error}") from error
    return found


def _check_path(name: str) -> None:
    path = Path(name)
    if not path.exists():
        raise FileNotFoundError(f"{name} does not exist")
    if not path.is_file() and not path.is_dir():
        raise ValueError(
            f"{name} is a pipe or a device, which cannot be read twice; save its content in a file"
        )


def with_absolute_paths(config: FinetuneConfig) -> FinetuneConfig:
    """The settings as a run records them, for commands in another current folder."""

    def everywhere(word: str) -> str:
        return str(absolute(word)) if is_local(word) else word

    return config.model_copy(
        update={
            "model": everywhere(config.model),
            "tokenizer": config.tokenizer and everywhere(config.tokenizer),
            "dataset": [everywhere(word) for word in config.dataset],
            "eval_dataset": [everywhere(word) for word in config.eval_dataset],
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
