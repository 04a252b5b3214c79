"""Continuous batching: sequences join and leave one decoding between any two tokens.

One thread computes. Each of its steps appends a token to every running sequence and the prompts of
those that join, as one call of the kernel; what comes of it depends on no neighbour (see
`Decoding`), so every sequence gets the tokens that it would get alone.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastllm.generation.decoding import start_decoding
from fastllm.generation.text_stream import TextStream
from fastllm.models.decoder import DecoderModel
from fastllm.ops.sampling import Sampling, sample
from fastllm.tokenization import Tokenizer

# Tokens of prompts that join in one step, if it is more than one prompt: the running sequences wait
# so long, and the memory of a step grows with it.
JOINING_TOKENS = 512
# Tokens of a prompt whose probabilities are wanted, in one step: a row of logits for each.
SCORED_TOKENS = 64
# What stands for the logarithm of 0, which JSON cannot write.
LEAST_LOGPROB = -9999.0

DEFAULT_SAMPLING = Sampling()


class Busy(Exception):
    """More sequences wait than may."""


class Draining(Exception):
    """Nothing new is taken up: the server is about to end."""


@dataclass(eq=False)
class Job:
    """One sequence that somebody waits for.

    Attributes:
        prompt: token ids, one at least.
        max_tokens: how many to add, one at least unless the prompt is scored; with the prompt no
            more than the model's `max_seq_len`.
        seed: of the draws, in [0, 2**64).
        stops: texts before which it ends.
        logprobs: alternatives to list for each token; None for no probabilities at all.
        score_prompt: whether the prompt's own tokens get theirs as well.
        first_offset: characters of the prompt: where the offsets of new tokens begin.
    """

    prompt: list[int]
    max_tokens: int
    sampling: Sampling = DEFAULT_SAMPLING
    seed: int = 0
    stops: Sequence[str] = ()
    logprobs: int | None = None
    score_prompt: bool = False
    first_offset: int = 0
    submitted: float = field(default_factory=time.monotonic)


class Score(NamedTuple):
    """The model's own probability of a token, before temperature, penalties and cuts.

    Attributes:
        logprob: natural logarithm; None for the first token of a prompt.
        top: the likeliest tokens with theirs, and the token itself.
        offset: where its text begins, in characters of prompt and continuation.
    """

    token: str
    logprob: float | None
    top: dict[str, float] | None
    offset: int


class Piece(NamedTuple):
    """What a step brought to a job.

    Attributes:
        text: what became certain of the continuation.
        scores: of the tokens whose text that is, or of the prompt's.
        tokens: how many were drawn.
        first_after: with the first token, the seconds since the job came; else None.
        finish: "stop" or "length" with the last piece.
        error: why nothing more will come.
    """

    text: str = ""
    scores: Sequence[Score] = ()
    tokens: int = 0
    first_after: float | None = None
    finish: str | None = None
    error: str | None = None


class Running:
    """A job that has a place in the decoding."""

    def __init__(self, job: Job, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.job = job
        self.stream = TextStream(tokenizer, job.stops)
        self.prompt_stream = TextStream(tokenizer)
        self.unscored = list(job.prompt) if job.score_prompt else []
        self.pending = [] if job.score_prompt else job.prompt  # what the decoding does not hold
        self.count = 0
        self.scores: list[Score] = []  # of tokens whose text is held back
        self.cancelled = False
        self.seen: Tensor | None = None
        if job.sampling.repetition_penalty != 1:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool)
            self.seen[job.prompt] = True


Post = Callable[[list[tuple[Job, Piece]]], None]


class Scheduler:
    """Computes jobs, some at a time, the others waiting in their order.

    Args:
        model: in evaluation mode; `precision` as for `generate_batch`.
        places: jobs that are computed at the same time. Each takes memory for keys and values of
            `max_seq_len` positions from its first use on.
        longest_queue: jobs that may wait.
        post: called by the computing thread with what each step brought.

    Raises:
        ValueError: the kernel is needed for this precision and cannot serve.
    """

    def __init__(
        self,
        model: DecoderModel,
        tokenizer: Tokenizer,
        precision: str,
        places: int,
        longest_queue: int,
        post: Post,
    ) -> None:
        self._model, self._tokenizer, self._post = model, tokenizer, post
        self._decoding = start_decoding(model, places, precision=precision)
        self._places, self._longest_queue = places, longest_queue
        self._changed = threading.Condition()  # its lock may be taken again by who has it
        self._waiting: deque[Job] = deque()
        self._running: dict[int, Running] = {}  # by place
        self._events: list[tuple[Job, Piece]] = []
        self._draining = self._closing = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Jobs that are computed."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Jobs that wait for a place."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether the thread still computes."""
        return self._thread.is_alive()

    @property
    def draining(self) -> bool:
        return self._draining

    def submit(self, jobs: Sequence[Job]) -> None:
        """Takes all of the jobs, or none.

        Raises:
            Busy: they would make the queue longer than it may be.
            Draining: after `drain`.
        """
        with self._changed:
            if self._draining or not self.alive:
                raise Draining
            # Places that fall to who waits already are not yet taken, but as good as.
            there = len(self._running) + len(self._waiting)
            if there + len(jobs) > self._places + self._longest_queue:
                raise Busy
            self._waiting += jobs
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Lets go of jobs that nobody waits for; their places are free before the next token."""
        with self._changed:
            for job in jobs:
                if job in self._waiting:
                    self._waiting.remove(job)
            for running in self._running.values():
                running.cancelled |= running.job in jobs

    def drain(self) -> None:
        """Takes no more jobs; those that it has come to their end."""
        with self._changed:
            self._draining = True

    def close(self) -> None:
        """Ends the thread before the next token; jobs that were not done get an error."""
        with self._changed:
            self._draining = self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._take_up():
                self._step()
                self._post(self._events)
                self._events = []
        finally:  # also where the step raised: nobody may wait for ever
            with self._changed:
                self._draining = True
                left = [running.job for running in self._running.values()] + list(self._waiting)
                self._running.clear()
                self._waiting.clear()
            broken = Piece(error="the server has stopped computing")
            self._post([*self._events, *((job, broken) for job in left)])

    def _take_up(self) -> bool:
        """Waits until there is something to compute; False when it is time to end."""
        with self._changed:
            while not (self._running or self._waiting or self._closing):
                self._changed.wait()
            for place in [place for place, r in self._running.items() if r.cancelled]:
                self._free(place)
            joining = 0
            # The lowest places first: those above take no memory while few are needed.
            free = (place for place in range(self._places) if place not in self._running)
            while self._waiting and len(self._running) < self._places:
                size = len(self._waiting[0].prompt)
                if joining and joining + size > JOINING_TOKENS:
                    break
                joining += size
                running = Running(self._waiting.popleft(), self._tokenizer, self._model.vocab_size)
                self._running[next(free)] = running
            return not self._closing

    def _free(self, place: int) -> None:
        with self._changed:
            del self._running[place]
        self._decoding.clear(place)

    def _step(self) -> None:
        scoring = next((place for place, r in self._running.items() if r.unscored), None)
        if scoring is not None:
            self._score_prompt(scoring)
        tokens = {place: r.pending for place, r in sorted(self._running.items()) if r.pending}
        if tokens:
            self._draw(list(tokens), self._decoding.append(tokens))

    def _score_prompt(self, place: int) -> None:
        running = self._running[place]
        job = running.job
        tokens = running.unscored[:SCORED_TOKENS]
        logits = self._without_padding(self._decoding.append({place: tokens}, every=True))
        scores = []
        if len(running.unscored) == len(job.prompt):
            scores.append(Score(self._tokenizer.decode(tokens[:1]), None, None, 0))
            running.prompt_stream.push(tokens[0])
        for row, token in zip(logits, running.unscored[1:], strict=False):
            scores.append(self._score(row, token, job, running.prompt_stream.length))
            running.prompt_stream.push(token)
        del running.unscored[: len(tokens)]
        self._events.append((job, Piece(scores=scores)))
        if running.unscored:
            return
        if job.max_tokens:
            self._draw([place], logits[-1:])
        else:
            self._events.append((job, Piece(finish="length")))
            self._free(place)

    def _draw(self, places: Sequence[int], logits: Tensor) -> None:
        """A token for each of these places, from its row of logits."""
        logits = self._without_padding(logits)
        drawn = [self._running[place] for place in places]
        seen = None
        if any(running.seen is not None for running in drawn):
            nothing = torch.zeros(logits.size(1), dtype=torch.bool)
            seen = torch.stack([nothing if r.seen is None else r.seen for r in drawn])
        try:
            tokens = sample(
                logits,
                [running.job.sampling for running in drawn],
                [running.job.seed for running in drawn],
                [running.count for running in drawn],
                seen,
            ).tolist()
        except ValueError as error:  # one's logits are no numbers: the others are not to blame
            if len(drawn) > 1:
                for i, place in enumerate(places):
                    self._draw([place], logits[i : i + 1])
            else:
                self._events.append((drawn[0].job, Piece(error=str(error))))
                self._free(places[0])
            return
        for place, running, token, row in zip(places, drawn, tokens, logits, strict=True):
            try:
                self._advance(place, running, token, row)
            except KeyError as error:  # a vocabulary may have ids without a token
                self._events.append((running.job, Piece(error=str(error.args[0]))))
                self._free(place)

    def _advance(self, place: int, running: Running, token: int, logits: Tensor) -> None:
        job, stream = running.job, running.stream
        if job.logprobs is not None:
            offset = job.first_offset + stream.length
            running.scores.append(self._score(logits, token, job, offset))
        if running.seen is not None:
            running.seen[token] = True
        running.count += 1
        running.pending = [token]
        text, finish = stream.push(token), None
        if not stream.stopped and running.count == job.max_tokens:
            text += stream.end()
            finish = "length"
        if stream.stopped:
            finish = "stop"
        shown = job.first_offset + stream.shown
        ready = [s for s in running.scores if finish == "length" or s.offset < shown]
        running.scores = running.scores[len(ready) :]
        first_after = time.monotonic() - job.submitted if running.count == 1 else None
        self._events.append((job, Piece(text, ready, 1, first_after, finish)))
        if finish:
            self._free(place)

    def _without_padding(self, logits: Tensor) -> Tensor:
        if self._model.padding_idx is not None:
            logits[:, self._model.padding_idx] = -torch.inf
        return logits

    def _score(self, logits: Tensor, token: int, job: Job, offset: int) -> Score:
        logprobs = logits.log_softmax(-1).clamp_(min=LEAST_LOGPROB)
        best = logprobs.topk(min(job.logprobs or 0, len(logprobs)))
        top: dict[str, float] = {}
        for each, logprob in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            with contextlib.suppress(KeyError):  # a vocabulary may have ids without a token
                top.setdefault(self._tokenizer.decode([each]), logprob)
        text, own = self._tokenizer.decode([token]), float(logprobs[token])
        top.setdefault(text, own)
        return Score(text, own, top, offset)
