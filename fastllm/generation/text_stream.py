"""Text that continues prompts, handed out as soon as it is certain."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from fastllm.generation.decoding import generate_batch, generate_tokens
from fastllm.models.decoder import DecoderModel
from fastllm.ops.sampling import Sampling
from fastllm.tokenization import Tokenizer

# Decoded in place of bytes that are not, or not yet, a character.
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
SHORTEST_WINDOW, LONGEST_WINDOW = 4, 16  # tokens


class Prompt(NamedTuple):
    """A prompt as the model reads it.

    Attributes:
        tokens: its ids.
        text: what they decode to, without a character that they leave unfinished.
        given: the prompt as it was given; `text` if that was as ids.
        start: how many of the tokens precede the text: the tokenizer's `start_tokens`.
    """

    tokens: list[int]
    text: str
    given: str
    start: int = 0

    @property
    def overlap(self) -> str:
        """The end of `given` that the tokens lost, such as white space under WordPiece.

        A continuation that begins with it repeats it.
        """
        if self.given.startswith(self.text):
            return self.given[len(self.text) :]
        space = self.given[len(self.given.rstrip()) :]
        return "" if self.text.endswith(space) else space


def encode_prompt(tokenizer: Tokenizer, prompt: str | list[int]) -> Prompt:
    """Encodes a text, after the tokenizer's `start_tokens`, or takes token ids as they are.

    Raises:
        KeyError: the tokenizer lacks a character or an id of the prompt.
        ValueError: the prompt has a lone surrogate.
    """
    start = list(tokenizer.start_tokens) if isinstance(prompt, str) else []
    tokens = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    text = tokenizer.decode(tokens).removesuffix(UNFINISHED)
    given = prompt if isinstance(prompt, str) else text
    return Prompt([*start, *tokens], text, given, len(start))


def generate_text(
    model: DecoderModel,
    tokenizer: Tokenizer,
    prompt: str | list[int],
    max_new_tokens: int,
    stop: str | None = None,
    echo: bool = False,
    **sampling: Any,
) -> Iterator[str]:
    """Yields pieces of the text that continues `prompt`, as soon as they are certain.

    With `echo`, the pieces join to the text that the tokenizer decodes from all tokens, those of
    the prompt and the new ones; without, to what follows the prompt in it. The tokenizer's
    `start_tokens` are not part of the text, and it ends before any of its `end_tokens`.

    Args:
        prompt: a text, or token ids that are taken as they are.
        stop: end before this text, which is not yielded.
        echo: yield the text of the prompt's tokens first.
        sampling: see `generate_tokens`.

    Raises:
        KeyError: the tokenizer lacks a character of the prompt.
        ValueError: the prompt is empty, or a setting is out of range.
    """
    encoded = encode_prompt(tokenizer, prompt)
    tokens = generate_tokens(model, encoded.tokens, max_new_tokens, **sampling)
    return _pieces(tokenizer, encoded, tokens, stop, echo)


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
    echo: bool = False,
) -> Iterator[str]:
    """Yields the whole continuation of each prompt, up to the tokenizer's `end_tokens`.

    Args:
        stop: end before this text, which is not yielded.
        sampling, seed, precision: see `generate_batch`.
        batch_size: prompts continued at the same time. More than 16 are hardly faster, and their
            keys and values take memory.
        echo: see `generate_text`.

    Raises:
        KeyError: the tokenizer lacks a character of a prompt.
        ValueError: a prompt is empty, or a setting is out of range.
    """
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    for first in range(0, len(prompts), batch_size):
        batch = encoded[first : first + batch_size]
        continuations: list[list[int]] = [[] for _ in batch]
        unended = set(range(len(batch)))
        for step in generate_batch(
            model,
            [prompt.tokens for prompt in batch],
            max_new_tokens,
            sampling,
            seed + first,
            precision=precision,
        ):
            for tokens, token in zip(continuations, step, strict=True):
                tokens.append(token)
            unended -= {b for b in unended if step[b] in tokenizer.end_tokens}
            if not unended:
                break
        for prompt, tokens in zip(batch, continuations, strict=True):
            yield "".join(_pieces(tokenizer, prompt, tokens, stop, echo))


def _pieces(
    tokenizer: Tokenizer, prompt: Prompt, tokens: Iterable[int], stop: str | None, echo: bool
) -> Iterator[str]:
    stream = TextStream(tokenizer, [stop] if stop else [], prompt, echo)
    unseen = prompt.text if echo else ""
    for token in tokens:
        if token in tokenizer.end_tokens:
            break
        if piece := unseen + stream.push(token):
            yield piece
        unseen = ""
        if stream.stopped:
            return
    if piece := unseen + stream.end():
        yield piece


class TextStream:
    """The text of tokens that arrive one by one, as soon as it is certain.

    Args:
        stops: the text ends before any of these, and no part of them is handed out.
        prompt: what the tokens continue; a subword's text depends on the one before it.
        echo: whether the text will follow `prompt.text`. Otherwise, it will follow `prompt.given`,
            and does not repeat `prompt.overlap`.

    Attributes:
        length: characters of the tokens so far, held back or not.
        start: characters before the text of the last token.
        shown: characters handed out or left out as overlap.
        overlapped: characters left out as overlap.
        stopped: whether one of `stops` has appeared.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        prompt: Prompt = Prompt([], "", ""),  # noqa: B008 - never changed
        echo: bool = False,
    ) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        # A subword's text depends on the one before it, and a character may span several tokens, so
        # a token's text is the difference that it makes to that of a short window.
        self._window = prompt.tokens[prompt.start :][-SHORTEST_WINDOW - 3 :]
        self._certain = 0  # characters of the window's text already taken
        self._unfinished = False  # whether the window's text ends within a character
        self._held = ""  # may be the start of a stop text
        # The prompt's own end does not stop the text.
        self._given = len(prompt.overlap)
        self._overlap = "" if echo else prompt.overlap
        self.length = self.start = self.shown = self.overlapped = 0
        self.stopped = False
        if self._window:
            self._shorten_window()

    def push(self, token: int) -> str:
        """The text that one more token makes certain, possibly empty."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        end = len(text) - text.endswith(UNFINISHED)  # only the last can become a character
        new = text[self._certain : end]
        # If the character before stays unfinished, the token begins after it.
        self.start = self.length + (self._unfinished and new.startswith(UNFINISHED))
        self._unfinished = end < len(text)
        self._certain = max(self._certain, end)
        full = len(self._window) >= LONGEST_WINDOW
        if full or (end == len(text) and len(self._window) >= LONGEST_WINDOW // 2):
            self._shorten_window()
        return self._take(new)

    def end(self) -> str:
        """The rest of the text, unfinished characters and starts of stop texts included."""
        text = self._tokenizer.decode(self._window)[self._certain :]
        released = self._take(text)
        if not self.stopped:
            released += self._release(len(self._held))
        self._held = ""
        return released

    def _shorten_window(self) -> None:
        for size in range(SHORTEST_WINDOW, SHORTEST_WINDOW + 4):  # whole characters if possible
            window = self._window[-size:]
            text = self._tokenizer.decode(window)
            if UNFINISHED not in text:
                break
        self._unfinished = text.endswith(UNFINISHED)
        self._window, self._certain = window, len(text) - self._unfinished

    def _take(self, new: str) -> str:
        self.length += len(new)
        self._held += new
        certain = len(self._held)
        given = max(0, self._given - self.shown)
        # The stop text that ends first, so that it does not matter how the text is divided.
        found = [
            (at + len(stop), at)
            for stop in self._stops
            if (at := self._held.find(stop, max(0, given + 1 - len(stop)))) >= 0
        ]
        if found:
            _, certain = min(found)
            self.stopped = True
        elif self._stops:
            certain -= max(_overlap(self._held, stop) for stop in self._stops)
        return self._release(certain)

    def _release(self, count: int) -> str:
        """Hands out this many of the characters held, but for those that overlap the prompt."""
        released, self._held = self._held[:count], self._held[count:]
        self.shown += count
        new = released
        while self._overlap and new.startswith(self._overlap[0]):
            new, self._overlap = new[1:], self._overlap[1:]
        if new:
            self._overlap = ""
        self.overlapped += count - len(new)
        return new


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` could be the start of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
