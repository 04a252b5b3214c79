"""Text that continues a prompt, piece by piece as soon as it is certain."""

from collections.abc import Iterator, Sequence
from typing import Any

from fastllm.generation.decoding import generate_tokens
from fastllm.models.decoder import DecoderModel
from fastllm.tokenization import Tokenizer


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
    return stream_text(TextStream(tokenizer, [stop] if stop else []), tokens)


def stream_text(stream: "TextStream", tokens: Iterator[int]) -> Iterator[str]:
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
