"""Evaluate a trained model on a text: `fastllm evaluate --checkpoint DIR book.txt`."""

import json
import math
import sys
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from fastllm.command import command, errors_in_one_line, log, parse_settings
from fastllm.flags import CommandSettings, Device, Precision, Quantize, Threads, check_quantize
from fastllm.training.config import FileNames


class EvaluateConfig(CommandSettings):
    """Loss, perplexity, and bits per character and byte of a trained model on a text."""

    positional: ClassVar = "file_path"
    aliases: ClassVar = {"dataset": "file_path"}
    examples: ClassVar = """
fastllm evaluate --checkpoint runs/book other.txt
fastllm evaluate --checkpoint runs/gpt2 other.txt --stride 512
"""

    checkpoint: Path
    """A run of train or finetune, or a checkpoint in it; a folder in Hugging Face's format, a name
    on its hub, or a GGUF file."""
    file_path: FileNames
    """UTF-8 texts to predict, or .jsonl, .json, .csv or .parquet, each also compressed (.gz, .xz,
    .zst): files, folders or patterns, read as one text."""
    text_column: str = "text"
    """Column of tables that holds the text."""
    max_seq_len: Annotated[int, Field(ge=2)] | None = None
    """Tokens in a window on the text: at most the model's, which is the default."""
    stride: Annotated[int, Field(ge=1)] | None = None
    """Tokens between the beginnings of two windows. Each window predicts only its last tokens, so
    many, from all that are before them in it; by default, all but its first. A smaller stride
    takes longer, and gives a lower loss."""
    batch_size: Annotated[int, Field(ge=1, le=2**24)] = 32
    """Sequences in a batch, at most; long ones come in smaller batches."""
    precision: Precision = "fp32"
    """Type that matrix products round their operands to; auto is bf16 on CPUs that support it."""
    device: Device = "cpu"
    """Device to compute on; falls back to the CPU if CUDA is not available."""
    quantize: Quantize | None = None
    """Round the weights as `generate --quantize` does, to see how much worse it gets."""
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
    import numpy as np

    from fastllm.data.loader import TextDataset
    from fastllm.data.sources import find_texts
    from fastllm.device import autocast, choose_device, choose_precision
    from fastllm.integrations.any_model import load_trained_model
    from fastllm.ops.decode import round_linear_layers
    from fastllm.threads import set_threads
    from fastllm.training.checkpoint import CheckpointError
    from fastllm.training.evaluation import bits_of_text, evaluate_windows

    set_threads(config.threads)
    with errors_in_one_line(CheckpointError, OSError, LookupError, ValueError, ImportError):
        texts = find_texts(config.file_path, config.text_column)
        texts.check()
        trained = load_trained_model(config.checkpoint)
        model, tokenizer = trained.model, trained.tokenizer
        window = config.max_seq_len or model.max_seq_len
        stride = config.stride or window - 1
        check_windows(window, stride, model.max_seq_len)
        if config.quantize:
            round_linear_layers(model, config.quantize)
        device = choose_device(config.device)
        model.to(device)
        precision = choose_precision(config.precision, model.hidden_size, device)
        dataset = TextDataset(texts, tokenizer, window, overlap=window - stride)
        start, tokens = list(tokenizer.start_tokens), dataset.tokens
        if start:
            log(f"the text begins with {tokenizer.decode(start)}, which the model expects there")
            tokens = np.concatenate([np.array(start, tokens.dtype), tokens])
        windows = TextDataset.from_tokens(tokens, tokenizer, window, window - stride)
        with autocast(device, precision):
            result = evaluate_windows(model, windows, config.batch_size)
        if not math.isfinite(result.loss):
            raise ValueError(
                f"the loss is {result.loss}: the weights may be damaged, or the training diverged; "
                "evaluate another checkpoint"
            )
    bits = bits_of_text(result.loss, dataset)
    values = {
        "loss": result.loss,
        "perplexity": result.perplexity if math.isfinite(result.perplexity) else None,
        "bits_per_character": bits and bits.per_character,
        "bits_per_byte": bits and bits.per_byte,
        "tokens": result.tokens,
    }
    if config.json_:
        print(json.dumps(values, allow_nan=False))
    else:
        for name, value in values.items():
            number = "unknown" if value is None else f"{value:,.4f}".removesuffix(".0000")
            print(f"{name.replace('_', ' '):20} {number}")


def check_windows(window: int, stride: int, longest: int) -> None:
    """Raises a `ValueError` unless the model can see a window, and the windows predict all."""
    if window > longest:
        raise ValueError(f"--max_seq_len {window} is more than the model's {longest}")
    if stride >= window:
        raise ValueError(
            f"--stride must be less than the window of {window} tokens, whose first cannot be "
            f"predicted (got {stride})"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
