"""Text from a trained model: `python -m fastllm.generate --checkpoint DIR --prompt "..."`."""

import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fastllm.command import CommandSettings, errors_in_one_line, parse_settings
from fastllm.data.text import read_text
from fastllm.device import (
    Device,
    Precision,
    check_quantize,
    choose_device,
    choose_precision,
)
from fastllm.generation.decoding import generate_batch
from fastllm.generation.text_stream import TextStream, generate_text, stream_text
from fastllm.models.decoder import DecoderModel
from fastllm.ops.sampling import Sampling
from fastllm.threads import set_threads
from fastllm.tokenization import Tokenizer
from fastllm.training.checkpoint import CheckpointError, find_checkpoint, load_model

# Of a file of prompts. More would hardly be faster, and their keys and values take memory.
LINES_AT_ONCE = 16


class GenerateConfig(CommandSettings):
    """Continue a prompt with a trained model."""

    checkpoint: Path
    """Folder of a run, or a checkpoint in it."""
    prompt: str | None = None
    """Text to continue."""
    prompt_file: Path | None = None
    """UTF-8 text whose lines are prompts, empty ones aside; several are continued at a time."""
    max_new_tokens: Annotated[int, Field(ge=0)] = 300
    """Tokens to add."""
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.8
    """Below 1 likelier, above 1 more surprising text; 0 always takes the likeliest token."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Choose among this many likeliest tokens; 0 for all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Choose among the likeliest tokens that together have this probability."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Choose among tokens at least so probable, in parts of the likeliest one's probability."""
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Above 1, tokens that were there before become less likely."""
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    """The same seed gives the same text; further lines of a prompt file have the next ones."""
    stop: str | None = None
    """End before this text."""
    precision: Precision = "fp32"
    """What matrix products round their operands to; auto takes bf16 on CPUs that have it."""
    device: Device = "cpu"
    """Where to compute; the CPU serves where there is no CUDA."""
    quantize: Literal["int8"] | None = None
    """Round the weights to 8 bits: a quarter of the memory to be read for each token."""
    threads: Annotated[int, Field(ge=0, le=4096)] = 0
    """CPU threads; 0 for OMP_NUM_THREADS, or the physical cores that this process may use."""

    @model_validator(mode="after")
    def _check_together(self) -> "GenerateConfig":
        if (self.prompt is None) == (self.prompt_file is None):
            raise ValueError("give either a prompt or a prompt_file")
        check_quantize(self.quantize, self.precision)
        if self.stop == "":
            raise ValueError("stop is empty: leave it out, or give the text to end before")
        return self


def main(arguments: list[str]) -> None:
    config = parse_settings(GenerateConfig, arguments)
    set_threads(config.threads)
    with errors_in_one_line(CheckpointError, OSError, KeyError, ValueError, ImportError):
        model, tokenizer, _ = load_model(find_checkpoint(config.checkpoint))
        model.eval()
        device = choose_device(config.device)
        model.to(device)
        chosen = choose_precision(config.precision, model.hidden_size, device)
        precision = config.quantize or chosen
        sampling = Sampling(
            config.temperature,
            config.top_k,
            config.top_p,
            config.min_p,
            config.repetition_penalty,
        )
        if config.prompt_file is not None:
            continue_lines(config.prompt_file, config, model, tokenizer, sampling, precision)
            return
        prompt = config.prompt or ""
        pieces = generate_text(
            model,
            tokenizer,
            prompt,
            config.max_new_tokens,
            config.stop,
            **sampling._asdict(),
            seed=config.seed,
            precision=precision,
        )
        first = next(pieces, "")  # what can go wrong has, before anything is printed
        sys.stdout.write(prompt + first)
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    sys.stdout.write("\n")


def continue_lines(
    path: Path,
    config: GenerateConfig,
    model: DecoderModel,
    tokenizer: Tokenizer,
    sampling: Sampling,
    precision: str,
) -> None:
    """Continues every line of a file, and prints them with a line of dashes between."""
    lines = [line for line in "".join(read_text(path)).split("\n") if line]
    if not lines:
        raise ValueError(f"{path} has no line to continue")
    prompts = [tokenizer.encode(line) for line in lines]
    for first in range(0, len(lines), LINES_AT_ONCE):
        group = slice(first, first + LINES_AT_ONCE)
        steps = generate_batch(
            model,
            prompts[group],
            config.max_new_tokens,
            sampling,
            config.seed + first,
            precision=precision,
        )
        tokens = list(zip(*steps, strict=True)) or [()] * len(lines[group])
        for b, (line, new) in enumerate(zip(lines[group], tokens, strict=True), first):
            stream = TextStream(tokenizer, [config.stop] if config.stop else [])
            text = "".join(stream_text(stream, iter(new)))
            print("---\n" * (b > 0) + line + text, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
