"""Text from a trained model: `python -m fastllm.generate --checkpoint DIR --prompt "..."`."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fastllm.command import CommandSettings, errors_in_one_line, parse_settings
from fastllm.models.decoder import DecoderModel
from fastllm.threads import set_threads
from fastllm.tokenization import Tokenizer
from fastllm.training.checkpoint import CheckpointError, find_checkpoint, load_model


def generate_tokens(
    model: DecoderModel,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    use_cache: bool = True,
) -> Iterator[int]:
    """Token after token that continues `prompt`.

    The model sees at most `max_seq_len - 1` tokens, the most that training gave it to predict
    from. When they are used up, the older half is forgotten: positions are absolute, so a window
    that slid with every token could keep nothing in the cache.

    Args:
        model: as it stands; call `model.eval()` first.
        prompt: at least one token.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: choose among this many likeliest tokens; 0 for all.
        top_p: choose among the likeliest tokens that together have this probability.
        seed: the same seed gives the same text.
        use_cache: keep keys and values of earlier tokens; without, everything is computed again
            for every token, for the same result.

    Raises:
        ValueError: the prompt is empty or a setting out of range.
        IndexError: a token of the prompt is outside the vocabulary.
    """
    if not prompt:
        raise ValueError("the prompt is empty; give at least one token to continue")
    if max_new_tokens < 0 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            "max_new_tokens, temperature and top_k must not be negative and top_p must be in "
            f"(0, 1], got {max_new_tokens}, {temperature}, {top_k}, {top_p}"
        )
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    window = max(1, model.max_seq_len - 1)
    context = prompt[-window:]
    caches = model.new_caches() if use_cache else None
    unseen = context  # what the caches do not hold yet
    for _ in range(max_new_tokens):
        ids = torch.tensor([unseen if use_cache else context], device=device)
        # Around the forward only: the caller's own code runs between two tokens.
        with torch.no_grad():
            logits = model(ids, caches=caches)[0, -1].float().cpu()
        if model.padding_idx is not None:
            logits[model.padding_idx] = -math.inf  # never a target, so its logit means nothing
        token = sample(logits, temperature, top_k, top_p, generator)
        yield token
        context = [*context, token]
        unseen = [token]
        if len(context) > window:
            context = context[-max(1, window // 2) :]
            unseen = context
            caches = model.new_caches() if use_cache else None


def sample(
    logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> int:
    """One token id drawn from `logits` [V]; see `generate_tokens`."""
    if temperature == 0:
        return int(logits.argmax())
    # Below the maximum nothing overflows, however small the temperature.
    scaled = (logits - logits.max()) / temperature
    ordered, ids = scaled.sort(descending=True, stable=True)
    if top_k:
        ordered = ordered[:top_k]
    probabilities = ordered.softmax(0)
    # A token stays while those before it fall short of top_p, so the likeliest always does.
    before = probabilities.cumsum(0) - probabilities
    kept = probabilities.masked_fill(before >= top_p, 0) if top_p < 1 else probabilities
    return int(ids[torch.multinomial(kept, 1, generator=generator)])


def generate_text(
    model: DecoderModel,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    stop: str | None = None,
    **sampling: float | int | bool,
) -> Iterator[str]:
    """Pieces of text that continue `prompt`, as soon as they are certain.

    Args:
        stop: end before this text; it is not given out.
        sampling: see `generate_tokens`.

    Raises:
        KeyError: the tokenizer lacks a character of the prompt.
        ValueError: the prompt is empty or a setting out of range.
    """
    tokens = generate_tokens(model, tokenizer.encode(prompt), max_new_tokens, **sampling)  # type: ignore[arg-type]
    return _until(stop, _decode_stream(tokenizer, tokens))


def _until(stop: str | None, pieces: Iterator[str]) -> Iterator[str]:
    held = ""  # may be the beginning of the stop text
    for piece in pieces:
        held += piece
        if stop:
            end = held.find(stop)
            if end >= 0:
                yield held[:end]
                return
            sure = len(held) - _overlap(held, stop)
        else:
            sure = len(held)
        if sure:
            yield held[:sure]
            held = held[sure:]
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` could be the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def _decode_stream(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    # A subword's text depends on the one before it, and a character may span several tokens: what
    # a token adds is the difference that it makes to a short window.
    window: list[int] = []
    shown = ""
    for token in tokens:
        window.append(token)
        text = tokenizer.decode(window)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(window) < 16:
            continue
        if len(text) > len(shown):
            yield text[len(shown) :]
        window = window[-4:]
        shown = tokenizer.decode(window)
    rest = tokenizer.decode(window)[len(shown) :]
    if rest:
        yield rest


class GenerateConfig(CommandSettings):
    """Continue a prompt with a trained model."""

    checkpoint: Path
    """Folder of a run, or a checkpoint in it."""
    prompt: str
    """Text to continue."""
    max_new_tokens: Annotated[int, Field(ge=0)] = 300
    """Tokens to add."""
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.8
    """Below 1 likelier, above 1 more surprising text; 0 always takes the likeliest token."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Choose among this many likeliest tokens; 0 for all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Choose among the likeliest tokens that together have this probability."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """The same seed gives the same text."""
    stop: str | None = None
    """End before this text."""
    threads: Annotated[int, Field(ge=0, le=4096)] = 0
    """CPU threads; 0 for OMP_NUM_THREADS, or the physical cores that this process may use."""


def main(arguments: list[str]) -> None:
    config = parse_settings(GenerateConfig, arguments)
    set_threads(config.threads)
    with errors_in_one_line(CheckpointError, KeyError, ValueError, ImportError):
        model, tokenizer, _ = load_model(find_checkpoint(config.checkpoint))
        model.eval()
        pieces = generate_text(
            model,
            tokenizer,
            config.prompt,
            config.max_new_tokens,
            config.stop,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=config.seed,
        )
        sys.stdout.write(config.prompt)
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    sys.stdout.write("\n")


if __name__ == "__main__":
    main(sys.argv[1:])
