"""Model cards: Markdown under a head in YAML, as Hugging Face reads it."""

import json
from pathlib import Path
from string import Template
from typing import Any

from fastllm.data.tokens import read_header
from fastllm.flags import Format
from fastllm.models.decoder import DecoderModel
from fastllm.training.checkpoint import read_progress
from fastllm.training.config import TrainConfig
from fastllm.training.metrics import read_metrics
from fastllm.training.trained_model import TrainedModel
from fastllm.version import __version__

LOADING = {
    "hf": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
inputs = tokenizer("A beginning", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_length=$length)[0]))
```""",
    "onnx": """```python
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

session = onnxruntime.InferenceSession("$file")
tokenizer = Tokenizer.from_file("tokenizer.json")
ids = tokenizer.encode("A beginning").ids
(logits,) = session.run(["logits"], {"input_ids": np.array([ids])})  # [batch, length, vocabulary]
print(tokenizer.decode([int(logits[0, -1].argmax())]))  # the most likely next token
```""",
    "gguf": """```bash
llama-completion -m $file -c $length -n $half -no-cnv -p "A beginning"
```

or in Python `llama_cpp.Llama("$file", n_ctx=$length)("A beginning", max_tokens=$half)`.

Prompt and completion together may have $length tokens: beyond that llama.cpp, which rounds its
context up to a multiple of 256, aborts the whole program. It takes GELU from a table of fp16
numbers and keeps keys and values in fp16, which changes logits in about the fourth digit. It skips
characters of a prompt that the vocabulary lacks.""",
}
WIDER = """

GPT-2 has no bias in its head. The model stores it in more channels and attention heads than the
settings below say; the results are the same."""


def model_card(
    format: Format,
    license: str,
    file_name: str,
    trained: TrainedModel,
    difference: float,
) -> str:
    """The content of README.md for an exported model.

    Args:
        file_name: the model's file, for the lines that load it.
        difference: the largest difference of a logit.
    """
    model, settings = trained.model, trained.settings
    rows = model_rows(model, settings, difference) | run_rows(trained.folder, trained.run_dir)
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    bias = model.lm_head.bias
    wider = format != "onnx" and bias is not None and bool(bias.any())
    loading = Template(LOADING[format] + (WIDER if wider else "")).substitute(
        file=file_name, length=model.max_seq_len, half=model.max_seq_len // 2
    )
    licence = (
        "Unknown: no licence was given when this model was exported. Ask before you use it."
        if license == "unknown"
        else f"`{license}`, according to the person who exported it."
    )
    kept = model.settings if settings is None else public_settings(settings)
    library = "library_name: transformers\n" if format == "hf" else ""
    origin = f"A language model, written in this format by fastllm {__version__}."
    if settings is not None:
        origin = (
            f"A small language model, trained by fastllm {__version__} on one text. It continues "
            "text and does not\nfollow instructions; what it writes is made up."
        )
    return f"""---
license: {license}
{library}pipeline_tag: text-generation
tags:
- fastllm
- {format}
---

# {trained.name}

{origin}

| | |
| --- | --- |
{table}

## How to load it

{loading}

## Licence

{licence}

## {"Model" if settings is None else "Training"} settings

```json
{json.dumps(kept, indent=2)}
```
"""


def public_settings(settings: TrainConfig) -> dict[str, Any]:
    """A run's settings without paths of the machine that trained the model."""
    private = {"file_path"} | ({"tokenizer"} if isinstance(settings.tokenizer, Path) else set())
    return settings.model_dump(mode="json", exclude={*settings.of_one_command, *private})


def model_rows(
    model: DecoderModel, settings: TrainConfig | None, difference: float
) -> dict[str, str]:
    """Rows of the card's table about the model."""
    rows = {}
    if settings is not None:
        texts = ", ".join(path.name for path in settings.file_path or ())
        rows["text"] = texts or "Python's own documentation"
    return rows | {
        "longest sequence": f"{model.max_seq_len:,} tokens from a vocabulary of "
        f"{model.vocab_size:,}",
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "exactness": f"logits differ by at most {difference:.1e} from those of the trained model, "
        "on random tokens",
    }


def run_rows(checkpoint: Path, run_dir: Path) -> dict[str, str]:
    """Rows of the card's table about the training, as far as the run's folder records it."""
    progress, header = read_progress(checkpoint), read_header(run_dir / "tokens.bin")
    if progress is None:
        return {}
    rows = {}
    if progress.text_sha256:
        rows["SHA-256 of the text"] = f"`{progress.text_sha256}`"
    if header is not None and header.text_sha256 == progress.text_sha256:
        rows["tokens of the text"] = f"{header.count:,}"
    rows["training"] = f"{progress.step:,} steps, over {progress.tokens:,} tokens"
    lines = read_metrics(run_dir / "metrics.jsonl")
    losses = [line["loss"] for line in lines if line["step"] <= progress.step]
    losses = [loss for loss in losses if loss is not None]
    if losses:
        rows["training loss"] = f"{losses[-1]:.4f} nats per token in the last recorded step"
    if progress.val_loss is not None:
        rows["validation loss"] = f"{progress.val_loss:.4f} nats per token"
    return rows
