"""Text from a trained model: `python -m fastllm.generate --checkpoint DIR --prompt "..."`."""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fastllm.command import (
    CommandSettings,
    Device,
    Precision,
    autocast,
    check_quantize,
    choose_device,
    choose_precision,
    errors_in_one_line,
    parse_settings,
)
from fastllm.data.text import read_text
from fastllm.models.decoder import DecoderModel
from fastllm.ops import decode, dispatch
from fastllm.ops.embedding import check_token_ids
from fastllm.ops.sampling import Sampling, sample
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
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    precision: str = "fp32",
) -> Iterator[int]:
    """Token after token that continues `prompt`: `generate_batch` for one."""
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    batch = generate_batch(model, [prompt], max_new_tokens, sampling, seed, use_cache, precision)
    return (token for (token,) in batch)


def generate_batch(
    model: DecoderModel,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 - it cannot be changed
    seed: int = 0,
    use_cache: bool = True,
    precision: str = "fp32",
) -> Iterator[list[int]]:
    """Token after token that continues each of B prompts, whatever their lengths.

    The model sees at most `max_seq_len - 1` tokens, the most that training gave it to predict
    from. When they are used up, the older half is forgotten: positions are absolute, so a window
    that slid with every token could keep nothing in the cache.

    Where something is attached to the model (hooks, replaced layers), its modules run one after the
    other; otherwise a step is one kernel, with the weights of the beginning (see `Decoding`).

    Args:
        model: as it stands; call `model.eval()` first.
        prompts: each of at least one token.
        sampling: how tokens are chosen.
        seed: the same seed gives the same text. It is the first prompt's; each further one has the
            next. A prompt's continuation does not depend on the others.
        use_cache: keep keys and values of earlier tokens; without, everything is computed again
            for every token, for the same result.
        precision: of the products: `fp32` (`bf16` under autocast to it), `bf16`, `fp16`, or `int8`
            for weights rounded to 8 bits, with a scale for each output. All but the first read less
            memory for a token.

    Yields:
        The next token of each prompt.

    Raises:
        ValueError: there is no prompt, or an empty one; a setting is out of range; or `int8` is
            asked of a model that the kernel cannot run.
        IndexError: a token of a prompt is outside the vocabulary.
    """
    if not prompts or not all(prompts):
        raise ValueError("the prompt is empty; give at least one token to continue")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative, got {max_new_tokens}")
    if not 0 <= seed <= 2**64 - len(prompts):
        raise ValueError(f"seed must be in [0, 2**64), for every prompt, got {seed}")
    sampling.check()
    for prompt in prompts:  # also what lies before the window
        check_token_ids(torch.tensor(prompt), model.vocab_size)
    window = max(1, model.max_seq_len - 1)
    longest = max(map(len, prompts)) + max_new_tokens
    capacity = max(1, min(window, longest))
    decoding = start_decoding(model, len(prompts), use_cache, precision, capacity)
    contexts = [list(prompt[-window:]) for prompt in prompts]
    unseen = list(contexts)  # what the caches do not hold yet
    seeds = [seed + b for b in range(len(prompts))]
    seen = None
    if sampling.repetition_penalty != 1:
        seen = torch.zeros(len(prompts), model.vocab_size, dtype=torch.bool)
        for row, prompt in zip(seen, prompts, strict=True):
            row[list(prompt)] = True
    for step in range(max_new_tokens):
        logits = decoding.extend(unseen)
        if model.padding_idx is not None:
            logits[:, model.padding_idx] = -math.inf  # never a target, so its logit means nothing
        tokens = sample(logits, sampling, seeds, step, seen).tolist()
        for b, token in enumerate(tokens):
            contexts[b].append(token)
            unseen[b] = [token]
            if seen is not None:
                seen[b, token] = True
            if len(contexts[b]) > window:
                contexts[b] = contexts[b][-max(1, window // 2) :]
                unseen[b] = contexts[b]
                decoding.clear(b)
        yield tokens


class ModuleDecoding:
    """What `decode.Decoding` does, by way of the modules: whatever is attached to them runs."""

    def __init__(
        self, model: DecoderModel, batch_size: int, use_cache: bool, precision: str
    ) -> None:
        self._model, self._use_cache, self._precision = model, use_cache, precision
        self._device = next(model.parameters()).device
        self._logits = [torch.empty(model.vocab_size, dtype=torch.float32)] * batch_size
        self._tokens: list[list[int]] = [[] for _ in range(batch_size)]
        self._caches = [model.new_caches() for _ in range(batch_size)]

    def extend(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        for b, new in enumerate(tokens):
            if new:
                self._logits[b] = self._forward(b, new)[-1]
        return torch.stack(self._logits)

    def append(self, tokens: Mapping[int, Sequence[int]], every: bool = False) -> Tensor:
        kept = slice(None) if every else slice(-1, None)
        return torch.cat([self._forward(b, new)[kept] for b, new in sorted(tokens.items())])

    def _forward(self, b: int, new: Sequence[int]) -> Tensor:
        self._tokens[b] += new
        ids = torch.tensor([new if self._use_cache else self._tokens[b]], device=self._device)
        # Around the forward only: the caller's own code runs between two tokens.
        with torch.no_grad(), self._autocast():
            logits = self._model(ids, caches=self._caches[b] if self._use_cache else None)
        return logits[0, -len(new) :].float().cpu()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._precision == "fp32":  # the caller's, if there is one
            return nullcontext()
        return autocast(self._device.type, self._precision)

    @property
    def lengths(self) -> list[int]:
        return [len(tokens) for tokens in self._tokens]

    def clear(self, sequence: int) -> None:
        self._tokens[sequence] = []
        self._caches[sequence] = self._model.new_caches()


def start_decoding(
    model: DecoderModel,
    batch_size: int,
    use_cache: bool = True,
    precision: str = "fp32",
    capacity: int | None = None,
) -> decode.Decoding | ModuleDecoding:
    """The kernel where it can serve, else the modules.

    Args:
        capacity: positions that a sequence needs; the kernel keeps memory for so many. The model's
            `max_seq_len` unless given.

    Raises:
        ValueError: the precision is unknown, or `int8` and the modules alone can serve.
    """
    if precision not in (*dispatch.PRECISIONS, "fp16"):
        known = ", ".join(dispatch.PRECISIONS)
        raise ValueError(f"there is no precision '{precision}'; choose from {known}, fp16")
    decoder = model.fused(torch.empty(1, capacity or model.max_seq_len), None)
    if decoder is None:
        reason: str | None = "something is attached to the model, or a part of it is replaced"
    elif precision == "fp16":
        reason = "the kernel does not know fp16"
    elif any(decoder.dropout_ps()):
        reason = "dropout is on; call model.eval() first"
    else:
        reason = decode.why_not(decoder)
    if use_cache and decoder is not None and reason is None:
        if precision == "fp32":  # autocast may ask for less
            precision = dispatch.PRECISIONS[dispatch.precision()]
        return decode.Decoding(decoder, batch_size, precision)
    if precision == "int8":
        raise ValueError(f"int8 needs the kernel and its cache: {reason or 'no cache asked'}")
    return ModuleDecoding(model, batch_size, use_cache, precision)


def generate_text(
    model: DecoderModel,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    stop: str | None = None,
    **sampling: Any,
) -> Iterator[str]:
    """Pieces of text that continue `prompt`, as soon as they are certain.

    Args:
        stop: end before this text; it is not given out.
        sampling: see `generate_tokens`.

    Raises:
        KeyError: the tokenizer lacks a character of the prompt.
        ValueError: the prompt is empty or a setting out of range.
    """
    tokens = generate_tokens(model, tokenizer.encode(prompt), max_new_tokens, **sampling)
    return _pieces(TextStream(tokenizer, [stop] if stop else []), tokens)


def _pieces(stream: "TextStream", tokens: Iterator[int]) -> Iterator[str]:
    for token in tokens:
        if piece := stream.push(token):
            yield piece
        if stream.stopped:
            return
    if piece := stream.end():
        yield piece


class TextStream:
    """Text of tokens that come one by one, as soon as it is certain.

    Args:
        stops: texts before which it ends; none of them is given out, nor a part of one.

    Attributes:
        length: characters that the tokens have come to, held back or not.
        shown: characters that were given out.
        stopped: whether one of `stops` has come.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        # A subword's text depends on the one before it, and a character may span several tokens:
        # what a token adds is the difference that it makes to a short window.
        self._window: list[int] = []
        self._certain = 0  # characters of the window's text that were taken
        self._held = ""  # may be the beginning of a stop text
        self.length = self.shown = 0
        self.stopped = False

    def push(self, token: int) -> str:
        """What became certain with one more token, perhaps nothing."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        end = len(text.rstrip(UNFINISHED))
        full = len(self._window) >= LONGEST_WINDOW
        if full and end < len(text):
            end = len(text) - 1  # of bytes that are no character, the last may still become one
        new = text[self._certain : end]
        self._certain = max(self._certain, end)
        if full or (end == len(text) and len(self._window) >= LONGEST_WINDOW // 2):
            self._shorten()
        return self._take(new)

    def end(self) -> str:
        """What is left when no token follows: halves of characters, halves of stop texts."""
        text = self._tokenizer.decode(self._window)[self._certain :]
        given = self._take(text)
        if not self.stopped:
            given += self._held
            self.shown += len(self._held)
        self._held = ""
        return given

    def _shorten(self) -> None:
        for size in range(4, 8):  # a whole character's bytes where there is one
            window = self._window[-size:]
            text = self._tokenizer.decode(window)
            if UNFINISHED not in text:
                break
        self._window, self._certain = window, len(text) - text.endswith(UNFINISHED)

    def _take(self, new: str) -> str:
        self.length += len(new)
        self._held += new
        sure = len(self._held)
        # The stop text that is complete first, however the text comes in pieces.
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            _, sure = min(found)
            self.stopped = True
        elif self._stops:
            sure -= max(_overlap(self._held, stop) for stop in self._stops)
        given, self._held = self._held[:sure], self._held[sure:]
        self.shown += sure
        return given


# What a tokenizer gives for bytes that are no character, or not yet.
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
LONGEST_WINDOW = 16


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` could be the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


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
            text = "".join(_pieces(stream, iter(new)))
            print("---\n" * (b > 0) + line + text, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
