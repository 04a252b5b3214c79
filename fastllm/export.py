"""Take a trained model elsewhere: `python -m fastllm.export --checkpoint DIR --format gguf`."""

import json
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from pydantic import field_validator
from torch import Tensor

from fastllm import __version__
from fastllm.command import CommandSettings, errors_in_one_line, log, parse_settings
from fastllm.data.tokens import read_header
from fastllm.files import flush
from fastllm.integrations import gguf, hf_tokenizer, onnx
from fastllm.models import gpt2
from fastllm.models.decoder import DecoderModel
from fastllm.tokenization import Tokenizer
from fastllm.training.checkpoint import (
    CheckpointError,
    find_checkpoint,
    load_model,
    read_progress,
)
from fastllm.training.config import TrainConfig
from fastllm.training.metrics import read_metrics

Format = Literal["hf", "onnx", "gguf"]

PACKAGES = {
    "hf": ["tokenizers"],
    "onnx": ["tokenizers", "onnx", "onnxscript", "onnxruntime"],
    "gguf": ["tokenizers", "gguf"],
}
FILES = {
    "hf": ["config.json", "model.safetensors", "tokenizer.json", hf_tokenizer.CONFIG],
    "onnx": ["model.onnx", "tokenizer.json", hf_tokenizer.CONFIG],
    "gguf": ["model.gguf"],
}
CARD = "README.md"


class ExportConfig(CommandSettings):
    """Write a trained model for transformers, for ONNX or for llama.cpp, with a model card."""

    checkpoint: Path
    """Folder of a run of train, or a checkpoint in it."""
    format: Format
    """hf for transformers, onnx for onnxruntime and others, gguf for llama.cpp."""
    out: Path | None = None
    """Folder to write, or a file NAME.onnx or NAME.gguf; a folder of the format's name in the run's
    folder unless given."""
    license: str = "unknown"
    """Licence of the model, for its card, as Hugging Face spells it: mit, cc-by-4.0, other."""

    @field_validator("license")
    @classmethod
    def _check_license(cls, license: str) -> str:
        if not license or not set(license) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-"):
            raise ValueError("it must be spelt as Hugging Face does: mit, cc-by-4.0, other")
        return license


class ExportError(Exception):
    """What was written does not compute what the model does."""


def main(arguments: list[str]) -> None:
    config = parse_settings(ExportConfig, arguments)
    with errors_in_one_line(CheckpointError, ExportError, OSError, ValueError, ImportError):
        check_packages(config.format)
        check_not_there_already(config.checkpoint)
        checkpoint = find_checkpoint(config.checkpoint)
        in_run = checkpoint.parent.name == "checkpoints"
        run_dir = checkpoint.parent.parent if in_run else checkpoint
        model, tokenizer, settings = load_model(checkpoint)
        model.eval()
        folder, files = choose_files(config, run_dir)
        check(model, tokenizer, config.format)
        folder.mkdir(parents=True, exist_ok=True)
        # All files get their names only when all are there.
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as path:
            aside = Path(path)
            name = run_dir.resolve().name
            difference = write(model, tokenizer, config.format, aside, name)
            text = card(config, files, model, settings, checkpoint, run_dir, difference)
            (aside / CARD).write_text(text, encoding="utf-8")
            for written in files:
                flush(aside / written)
            for written, file in files.items():
                os.replace(aside / written, file)
            flush(folder)
    for file in files.values():
        log(f"{file.stat().st_size:14,} bytes  {file}")
    log(f"largest difference of a logit, on random tokens: {difference:.1e}")


def check_packages(format: Format) -> None:
    """Raises an `ImportError` that names the packages that are missing, and how to get them."""
    missing = [name for name in PACKAGES[format] if find_spec(name) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} missing: pip install '.[export]'")


def check_not_there_already(folder: Path) -> None:
    """Raises a `ValueError` where a model of transformers is in the folder or in its `model/`."""
    for place in (folder, folder / "model"):
        try:
            settings = json.loads((place / "config.json").read_bytes())
        except (OSError, ValueError):
            continue  # it is no such folder; what else is wrong with it is said by who reads it
        if isinstance(settings, dict) and "model_type" in settings:
            raise ValueError(
                f"{place} is a folder of Hugging Face's transformers already: from_pretrained "
                "loads it as it is, optimum makes ONNX of it, and llama.cpp's "
                "convert_hf_to_gguf.py GGUF"
            )


def choose_files(config: ExportConfig, run_dir: Path) -> tuple[Path, dict[str, Path]]:
    """The folder to write to, and where each of the files is to be in the end.

    Raises:
        ValueError: one of them is there already, or `--out` is the name of another format's file.
    """
    folder = config.out or run_dir / config.format
    names = {name: name for name in [*FILES[config.format], CARD]}
    if folder.suffix in (".onnx", ".gguf"):
        if folder.suffix != f".{config.format}":
            raise ValueError(f"{folder} is no name for what --format {config.format} writes")
        names[f"model.{config.format}"] = folder.name
        names[CARD] = f"{folder.stem}.md"
        folder = folder.parent
    files = {written: folder / name for written, name in names.items()}
    for file in files.values():
        if file.exists():
            raise ValueError(f"{file} is there already; give another --out, or remove it")
    return folder, files


def check(model: DecoderModel, tokenizer: Tokenizer, format: Format) -> None:
    """Raises a `ValueError` with the reason where the format cannot express the model."""
    if format == "gguf":
        gguf.check(model, tokenizer)
        return
    if format == "hf":
        gpt2.check_gpt2(model, convertible=True)
    else:
        onnx.check(model)
    hf_tokenizer.describe(tokenizer)


def write(
    model: DecoderModel, tokenizer: Tokenizer, format: Format, folder: Path, name: str
) -> float:
    """Writes all files but the card; returns the largest difference of a logit.

    For GGUF that is the one of the weights that were written, computed here.

    Raises:
        ExportError: a logit differs by more than rounding.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(model.max_seq_len, 256)  # longer ones' logits may not fit into memory
    ids = torch.randint(model.vocab_size, (2, length), generator=generator)
    if format == "onnx":
        onnx.save(model, folder / "model.onnx")
        theirs = onnx.logits(folder / "model.onnx", ids)
    elif format == "hf":
        gpt2.convert_to_gpt2(model).save_gpt2(folder)
        theirs = logits(DecoderModel.from_gpt2(folder).eval(), ids)
    else:
        gguf.save(model, tokenizer, folder / "model.gguf", name)
        theirs = logits(gpt2.convert_to_gpt2(model), ids)
    if format != "gguf":
        hf_tokenizer.save(tokenizer, folder, model.max_seq_len)
    return compare(logits(model, ids), theirs)


@torch.no_grad()
def logits(model: DecoderModel, ids: Tensor) -> Tensor:
    return model(ids)


def compare(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference; raises an `ExportError` where it is more than 1e-4 of the scale."""
    difference = (ours - theirs).abs().max().item()
    scale = max(1.0, ours.abs().max().item())
    if not difference <= 1e-4 * scale:
        raise ExportError(
            f"what was written is not this model: a logit differs by {difference:.3g}. Please "
            "report this, with the run's config.json"
        )
    return difference


LOADING = {
    "hf": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
inputs = tokenizer("A beginning", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_length=LENGTH)[0]))
```""",
    "onnx": """```python
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

session = onnxruntime.InferenceSession("FILE")
tokenizer = Tokenizer.from_file("tokenizer.json")
ids = tokenizer.encode("A beginning").ids
(logits,) = session.run(["logits"], {"input_ids": np.array([ids])})  # [batch, length, vocabulary]
print(tokenizer.decode([int(logits[0, -1].argmax())]))  # the likeliest next token
```""",
    "gguf": """```bash
llama-completion -m FILE -c LENGTH -n HALF -no-cnv -p "A beginning"
```

or in Python `llama_cpp.Llama("FILE", n_ctx=LENGTH)("A beginning", max_tokens=HALF)`.

A prompt and what is asked for may be LENGTH tokens together: beyond that llama.cpp, which rounds
its context up to a multiple of 256, aborts the whole program. It takes GELU from a table of fp16
numbers and keeps keys and values in fp16, which changes logits in about the fourth digit. What it
does not know of a prompt's characters it leaves out.""",
}
WIDER = """

GPT-2 has no place for a bias of the head. Here it is in a few more channels of width than the
settings below say, one for each attention head; what is computed is the same."""


def card(
    config: ExportConfig,
    files: dict[str, Path],
    model: DecoderModel,
    settings: TrainConfig,
    checkpoint: Path,
    run_dir: Path,
    difference: float,
) -> str:
    """The model card: Markdown under a head in YAML, as Hugging Face reads it."""
    name = run_dir.resolve().name
    rows = {
        "text": settings.file_path.name if settings.file_path else "Python's own documentation",
        "longest sequence": f"{model.max_seq_len:,} tokens, of {model.vocab_size:,} kinds",
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "exactness": f"logits differ by {difference:.1e} at most from those of the trained model, "
        "on random tokens",
    }
    progress, header = read_progress(checkpoint), read_header(run_dir / "tokens.bin")
    if progress is not None:
        lines = read_metrics(run_dir / "metrics.jsonl")
        losses = [line["loss"] for line in lines if line["step"] <= progress.step]
        if progress.text_sha256:
            rows["SHA-256 of the text"] = f"`{progress.text_sha256}`"
        if header is not None and header.text_sha256 == progress.text_sha256:
            rows["tokens of the text"] = f"{header.count:,}"
        rows["training"] = f"{progress.step:,} steps, over {progress.tokens:,} tokens"
        if losses:
            rows["training loss"] = f"{losses[-1]:.4f} nats per token in the last step noted"
        if progress.val_loss is not None:
            rows["validation loss"] = f"{progress.val_loss:.4f} nats per token"
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    # Where files lay is nobody's business.
    private = {"file_path"} | ({"tokenizer"} if isinstance(settings.tokenizer, Path) else set())
    kept = settings.model_dump(mode="json", exclude={*settings.of_one_command, *private})
    loading = LOADING[config.format] + ("" if config.format == "onnx" else WIDER)
    for word, value in (
        ("FILE", files.get(f"model.{config.format}", run_dir).name),
        ("LENGTH", model.max_seq_len),
        ("HALF", model.max_seq_len // 2),
    ):
        loading = loading.replace(word, str(value))
    licence = (
        "Unknown: whoever trained or exported this model did not say. Ask before you use it."
        if config.license == "unknown"
        else f"`{config.license}`, says whoever exported it."
    )
    library = "library_name: transformers\n" if config.format == "hf" else ""
    return f"""---
license: {config.license}
{library}pipeline_tag: text-generation
tags:
- fastllm
- {config.format}
---

# {name}

A small language model, trained by fastllm {__version__} on one text. It continues text and knows no
instructions; what it writes is made up.

| | |
| --- | --- |
{table}

## How to load it

{loading}

## Licence

{licence}

## Settings of the training

```json
{json.dumps(kept, indent=2)}
```
"""


if __name__ == "__main__":
    main(sys.argv[1:])
