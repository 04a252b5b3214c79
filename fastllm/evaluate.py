"""Evaluate a trained model on a text: `fastllm evaluate --checkpoint DIR book.txt`."""

import json
import math
import sys
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from fastllm.command import command, errors_in_one_line, parse_settings
from fastllm.flags import CommandSettings, Device, Precision, Threads, check_quantize
from fastllm.training.config import FileNames


class EvaluateConfig(CommandSettings):
    """Loss, perplexity and bits per character of a trained model on a text."""

    positional: ClassVar = "file_path"
    aliases: ClassVar = {"dataset": "file_path"}
    examples: ClassVar = """
fastllm evaluate --checkpoint runs/book other.txt
"""

    checkpoint: Path
    """Folder of a run, or a checkpoint in it."""
    file_path: FileNames
    """UTF-8 texts to predict, or .jsonl, .json, .csv or .parquet, each also compressed (.gz, .xz,
    .zst): files, folders or patterns, read as one text."""
    text_column: str = "text"
    """Column of tables that holds the text."""
    batch_size: Annotated[int, Field(ge=1, le=2**24)] = 32
    """Sequences in a batch."""
    precision: Precision = "fp32"
    """Type that matrix products round their operands to; auto is bf16 on CPUs that support it."""
    device: Device = "cpu"
    """Device to compute on; falls back to the CPU if CUDA is not available."""
    quantize: Literal["int8"] | None = None
    """Round the weights to 8 bits, as `generate --quantize` does, to see how much worse it gets."""
    json_: Annotated[bool, Field(alias="json")] = False
    """Print one JSON object instead of a table."""
    threads: Threads = 0
    """CPU threads; 0 for OMP_NUM_THREADS, or the physical cores that this process may use."""

    @model_validator(mode="after")
    def _check_together(self) -> "EvaluateConfig":
        check_quantize(self.quantize, self.precision)
        return self


@command
def main(arguments: list[str]) -> None:
    config = parse_settings(EvaluateConfig, arguments)
    # After the flags: help and their errors need not wait for PyTorch.
    from fastllm.data.loader import TextDataset
    from fastllm.data.sources import find_texts
    from fastllm.device import autocast, choose_device, choose_precision
    from fastllm.ops.decode import round_weights_to_int8
    from fastllm.threads import set_threads
    from fastllm.training.checkpoint import CheckpointError, find_checkpoint, load_model
    from fastllm.training.evaluation import bits_per_character, evaluate

    set_threads(config.threads)
    with errors_in_one_line(CheckpointError, OSError, KeyError, ValueError, ImportError):
        texts = find_texts(config.file_path, config.text_column)
        texts.check()
        model, tokenizer, _ = load_model(find_checkpoint(config.checkpoint))
        if config.quantize:
            round_weights_to_int8(model)
        device = choose_device(config.device)
        model.to(device)
        precision = choose_precision(config.precision, model.hidden_size, device)
        # With an overlap of one, the sequences predict every token but the first exactly once.
        dataset = TextDataset(texts, tokenizer, model.max_seq_len, overlap=1)
        with autocast(device, precision):
            result = evaluate(model, dataset, config.batch_size)
        if not math.isfinite(result.loss):
            raise ValueError(
                f"the loss is {result.loss}: the weights may be damaged, or the training diverged; "
                "evaluate another checkpoint"
            )
    values = {
        "loss": result.loss,
        "perplexity": result.perplexity if math.isfinite(result.perplexity) else None,
        "bits_per_character": bits_per_character(result.loss, dataset),
        "tokens": result.tokens,
    }
    if config.json_:
        print(json.dumps(values, allow_nan=False))
    else:
        for name, value in values.items():
            number = "unknown" if value is None else f"{value:,.4f}".removesuffix(".0000")
            print(f"{name.replace('_', ' '):20} {number}")


if __name__ == "__main__":
    main(sys.argv[1:])
