"""Text that continues prompts, handed out as soon as it is certain."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from fastllm.generation.decoding import generate_batch, generate_tokens
from fastllm.models.decoder import DecoderModel
from fastllm.ops.sampling import Sampling
from fastllm.tokenization import Tokenizer

# Decoded in place of bytes that are not, or not yet, a character.
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
LONGEST_WINDOW = 16  # tokens


def generate_text(
    model: DecoderModel,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    stop: str | None = None,
    **sampling: Any,
) -> Iterator[str]:
    """Yields pieces of the text that continues `prompt`, as soon as they are certain.

    Args:
        stop: end before this text, which is not yielded.
        sampling: see `generate_tokens`.

    Raises:
        KeyError: the tokenizer lacks a character of the prompt.
        ValueError: the prompt is empty, or a setting is out of range.
    """
    tokens = generate_tokens(model, tokenizer.encode(prompt), max_new_tokens, **sampling)
    return _pieces(tokenizer, tokens, stop)


def generate_texts(
    model: DecoderModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    stop: str | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008 - immutable
    seed: int = 0,
    precision: str = "fp32",
    batch_size: int = 16,
) -> Iterator[str]:
    """Yields the whole continuation of each prompt.

    Args:
        stop: end before this text, which is not yielded.
        sampling, seed, precision: see `generate_batch`.
        batch_size: prompts continued at the same time. More than 16 are hardly faster, and their
            keys and values take memory.

    Raises:
        KeyError: the tokenizer lacks a character of a prompt.
        ValueError: a prompt is empty, or a setting is out of range.
    """
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    for first in range(0, len(prompts), batch_size):
        batch = encoded[first : first + batch_size]
        continuations: list[list[int]] = [[] for _ in batch]
        for step in generate_batch(
            model, batch, max_new_tokens, sampling, seed + first, precision=precision
        ):
            for tokens, token in zip(continuations, step, strict=True):
                tokens.append(token)
        for tokens in continuations:
            yield "".join(_pieces(tokenizer, tokens, stop))


def _pieces(tokenizer: Tokenizer, tokens: Iterable[int], stop: str | None) -> Iterator[str]:
    stream = TextStream(tokenizer, [stop] if stop else [])
    for token in tokens:
        if piece := stream.push(token):
            yield piece
        if stream.stopped:
            return
    if piece := stream.end():
        yield piece


class TextStream:
    """The text of tokens that arrive one by one, as soon as it is certain.

    Args:
        stops: the text ends before any of these, and no part of them is handed out.

    Attributes:
        length: characters of the tokens so far, held back or not.
        shown: characters handed out.
        stopped: whether one of `stops` has appeared.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        # A subword's text depends on the one before it, and a character may span several tokens, so
        # a token's text is the difference that it makes to that of a short window.
        self._window: list[int] = []
        self._certain = 0  # characters of the window's text already taken
        self._held = ""  # may be the start of a stop text
        self.length = self.shown = 0
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that one more token makes certain, possibly empty."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        end = len(text.rstrip(UNFINISHED))
        full = len(self._window) >= LONGEST_WINDOW
        if full and end < len(text):
            end = len(text) - 1  # of several invalid bytes, only the last can become a character
        new = text[self._certain : end]
        self._certain = max(self._certain, end)
        if full or (end == len(text) and len(self._window) >= LONGEST_WINDOW // 2):
            self._shorten_window()
        return self._take(new)

    def end(self) -> str:
        """The rest of the text, unfinished characters and starts of stop texts included."""
        text = self._tokenizer.decode(self._window)[self._certain :]
        released = self._take(text)
        if not self.stopped:
            released += self._held
            self.shown += len(self._held)
        self._held = ""
        return released

    def _shorten_window(self) -> None:
        for size in range(4, 8):  # whole characters if possible
            window = self._window[-size:]
            text = self._tokenizer.decode(window)
            if UNFINISHED not in text:
                break
        self._window, self._certain = window, len(text) - text.endswith(UNFINISHED)

    def _take(self, new: str) -> str:
        self.length += len(new)
        self._held += new
        certain = len(self._held)
        # The stop text that ends first, so that it does not matter how the text is divided.
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            _, certain = min(found)
            self.stopped = True
        elif self._stops:
            certain -= max(_overlap(self._held, stop) for stop in self._stops)
        released, self._held = self._held[:certain], self._held[certain:]
        self.shown += certain
        return released


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` could be the start of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
