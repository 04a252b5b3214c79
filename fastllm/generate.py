"""Text from a trained model: `fastllm generate --checkpoint DIR --prompt "..."`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from fastllm.command import command, errors_in_one_line, first_line, log, parse_settings
from fastllm.flags import CommandSettings, Device, Precision, Quantize, Threads, check_quantize


class GenerateConfig(CommandSettings):
    """Continue a prompt with a trained model."""

    examples: ClassVar = """
fastllm generate --checkpoint runs/book --prompt "Once upon a time"
fastllm generate --checkpoint runs/book --prompt_file lines.txt --top_p 0.9
fastllm generate --checkpoint HuggingFaceTB/SmolLM2-135M --prompt "It was"
"""
    groups: ClassVar = {
        "Model and text": "checkpoint prompt prompt_file max_new_tokens stop",
        "Sampling": "temperature top_k top_p min_p repetition_penalty seed",
        "Machine": "threads device precision quantize",
    }

    checkpoint: Path
    """A run of train or finetune, or a checkpoint in it; a folder in Hugging Face's format, a name
    on its hub, or a GGUF file. A model's generation_config.json overrides the defaults below."""
    prompt: str | None = None
    """Text to continue. Without it, a prompt is asked for again and again, or the whole of standard
    input is continued if that is a pipe or a file."""
    prompt_file: Path | None = None
    """UTF-8 file with a prompt on each line; empty lines are skipped, and several prompts are
    continued at a time."""
    max_new_tokens: Annotated[int, Field(ge=0)] = 300
    """Tokens to add."""
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.8
    """Below 1 makes the text more likely, above 1 more surprising; 0 always takes the likeliest
    token."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Choose among this many of the likeliest tokens; 0 for all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Choose among the fewest likeliest tokens whose probabilities add up to this."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Choose among tokens at least this fraction as likely as the likeliest one."""
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Above 1, tokens that have already appeared become less likely."""
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    """The same seed gives the same text; each further prompt uses the next one."""
    stop: str | None = None
    """End before this text."""
    precision: Precision = "fp32"
    """Precision of matrix products; auto uses bf16 on CPUs that support it."""
    device: Device = "cpu"
    """Where to compute; without CUDA, cuda falls back to the CPU."""
    quantize: Quantize | None = None
    """Round the weights to 8 or 4 bits: less memory to read for each token."""
    threads: Threads = 0
    """CPU threads; 0 uses OMP_NUM_THREADS or the physical cores available to this process."""

    @model_validator(mode="after")
    def _check_together(self) -> GenerateConfig:
        if self.prompt is not None and self.prompt_file is not None:
            raise ValueError("give either --prompt or --prompt_file")
        check_quantize(self.quantize, self.precision)
        if self.stop == "":
            raise ValueError("--stop is empty; leave it out, or give the text to end before")
        return self


@command
def main(arguments: list[str]) -> None:
    config = parse_settings(GenerateConfig, arguments)
    # After the flags: help and their errors need not wait for PyTorch.
    from fastllm.generation.decoding import prepare_for_decoding
    from fastllm.generation.defaults import choose_sampling, describe_defaults
    from fastllm.generation.text_stream import generate_text, generate_texts
    from fastllm.integrations.any_model import load_trained_model
    from fastllm.threads import set_threads
    from fastllm.training.checkpoint import CheckpointError

    set_threads(config.threads)
    with errors_in_one_line(CheckpointError, OSError, LookupError, ValueError, ImportError):
        trained = load_trained_model(config.checkpoint)
        model, tokenizer = trained.model, trained.tokenizer
        sampling = choose_sampling(config, trained.sampling)
        if decided := describe_defaults(tokenizer, trained.sampling, config.model_fields_set):
            log(decided)
        precision = prepare_for_decoding(model, config.device, config.precision, config.quantize)
        if config.prompt_file is not None:
            lines = read_lines(config.prompt_file)
            texts = generate_texts(
                model,
                tokenizer,
                lines,
                config.max_new_tokens,
                config.stop,
                sampling,
                config.seed,
                precision,
                echo=True,
            )
            for i, text in enumerate(texts):
                if i:
                    print("---")
                print(text, flush=True)
            return

        def write(prompt: str, seed: int) -> None:
            pieces = generate_text(
                model,
                tokenizer,
                prompt,
                config.max_new_tokens,
                config.stop,
                echo=True,
                **sampling._asdict(),
                seed=seed,
                precision=precision,
            )
            for piece in pieces:  # any error comes before the first piece
                sys.stdout.write(piece)
                sys.stdout.flush()
            sys.stdout.write("\n")

        if config.prompt is not None:
            write(config.prompt, config.seed)
        elif sys.stdin is not None and sys.stdin.isatty():
            ask_for_prompts(write, config.seed)
        else:
            write(read_standard_input(), config.seed)


def ask_for_prompts(write: Callable[[str, int], None], seed: int) -> None:
    """Continues what is typed, line by line, until the input ends.

    Ctrl-C stops a text, and ends the loop where a prompt is typed.

    Args:
        write: prints the text that continues a prompt, drawn with a seed.
        seed: of the first prompt; each further one has the next.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - arrow keys and history; Windows has its own
    log("Type the beginning of a text and press Enter; Ctrl-C stops a text, Ctrl-D ends.")
    while True:
        try:
            prompt = input("> " if sys.stdout.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            sys.stdout.write("\n")
            return
        if not prompt:
            continue
        try:
            write(prompt, seed)
        except KeyboardInterrupt:
            sys.stdout.write("\n")
        except (KeyError, ValueError) as error:  # such as a character that the tokenizer lacks
            # str() of a KeyError would add quotes.
            log(f"error: {error.args[0] if error.args else first_line(error)}")
        seed += 1


def read_standard_input() -> str:
    """All of standard input but its last line end.

    Raises:
        ValueError: it is closed, empty or not UTF-8.
    """
    data = b"" if sys.stdin is None else sys.stdin.buffer.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"standard input is not UTF-8: {error.reason}, byte {error.start}"
        ) from None
    text = text.replace("\r\n", "\n").removesuffix("\n")
    if not text:
        raise ValueError("there is no prompt on standard input; give --prompt or --prompt_file")
    return text


def read_lines(path: Path) -> list[str]:
    """The nonempty lines of a file.

    Raises:
        ValueError: the file has no nonempty line.
    """
    from fastllm.data.sources import find_texts

    lines = [line for line in "".join(find_texts(path).pieces()).split("\n") if line]
    if not lines:
        raise ValueError(f"{path} has no line to continue")
    return lines


if __name__ == "__main__":
    main(sys.argv[1:])
