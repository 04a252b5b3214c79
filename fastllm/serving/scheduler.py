"""Continuous batching: sequences join and leave a running batch between any two tokens.

One thread computes. Each of its steps appends one token to every running sequence, and the whole
prompt to those that join, in one call of the kernel. The logits of a sequence do not depend on its
neighbours (see `Decoding`), so every sequence gets the tokens that it would get alone.
"""

import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastllm.generation.decoding import ContextWindow, ModuleDecoding, start_decoding
from fastllm.generation.text_stream import Prompt, TextStream
from fastllm.models.decoder import DecoderModel
from fastllm.ops.decode import Decoding
from fastllm.ops.sampling import Sampling, sample
from fastllm.tokenization import Tokenizer

# Prompt tokens that may join in one step, unless a single prompt is longer: the running sequences
# wait for them, and the memory of a step grows with them.
JOINING_TOKENS = 512
# Prompt tokens per step whose log probabilities are computed: each needs a row of logits.
SCORED_TOKENS = 64
# Stands for log(0), which JSON cannot represent.
MIN_LOGPROB = -9999.0

DEFAULT_SAMPLING = Sampling()

AnyDecoding: TypeAlias = Decoding | ModuleDecoding

STOPPED = "the server has stopped computing"
INTERNAL_ERROR = "internal server error; see the server's log"

logger = logging.getLogger(__name__)


class QueueFull(Exception):
    """The queue is full."""


class Draining(Exception):
    """The server is shutting down and takes no new jobs."""


@dataclass(eq=False)
class Job:
    """One sequence to compute for a client.

    Attributes:
        prompt: of at least one token.
        max_tokens: how many tokens to add, at least one unless `score_prompt` is set.
        seed: of the random draws, in [0, 2**64).
        stops: the continuation ends before any of these texts.
        logprobs: alternatives to list for each token; None for no log probabilities at all.
        echo: whether the client gets the text of the prompt's tokens too.
        score_prompt: whether the tokens of the prompt get log probabilities too.
        decoding: the model to compute with, the scheduler's newest when the job was submitted.
    """

    prompt: Prompt
    max_tokens: int
    sampling: Sampling = DEFAULT_SAMPLING
    seed: int = 0
    stops: Sequence[str] = ()
    logprobs: int | None = None
    echo: bool = False
    score_prompt: bool = False
    submitted: float = field(default_factory=time.monotonic)
    decoding: AnyDecoding = field(init=False, repr=False)


class TokenLogprob(NamedTuple):
    """The model's own probability of a token, before temperature, penalties and filters.

    Attributes:
        logprob: natural logarithm; None for the first token of a prompt.
        top: the likeliest tokens and this one, with their log probabilities; never padding, which
            is not predicted.
        offset: where the token's text begins, in characters of prompt and continuation.
    """

    token: str
    logprob: float | None
    top: dict[str, float] | None
    offset: int


class Delta(NamedTuple):
    """What a step added to a job.

    Attributes:
        text: newly certain text of the continuation.
        logprobs: of the tokens of that text, or of prompt tokens.
        tokens: how many tokens were drawn.
        first_token_s: with the first token, the seconds since the job was submitted; else None.
        finish_reason: "stop" or "length" in the last delta.
        error: why the job failed; nothing follows it.
    """

    text: str = ""
    logprobs: Sequence[TokenLogprob] = ()
    tokens: int = 0
    first_token_s: float | None = None
    finish_reason: str | None = None
    error: str | None = None

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


class RunningJob:
    """A job that has a slot.

    Attributes:
        context: what the model sees of prompt and continuation.
        drawn: how many tokens were drawn.
        scored: how many tokens of the prompt the decoding has taken to compute log probabilities.
        scoring: whether log probabilities of prompt tokens are still to be computed.
    """

    def __init__(self, job: Job, tokenizer: Tokenizer, vocab_size: int, max_seq_len: int) -> None:
        self.job = job
        self.stream = TextStream(tokenizer, job.stops, job.prompt, job.echo)
        self.prompt_stream = TextStream(tokenizer)
        self.scoring = job.score_prompt
        self.scored = 0
        self.context = ContextWindow(max_seq_len, () if self.scoring else job.prompt.tokens)
        self.drawn = 0
        self.held_logprobs: list[TokenLogprob] = []  # of tokens whose text is held back
        self.cancelled = False
        self.seen: Tensor | None = None
        if job.sampling.repetition_penalty != 1:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool)
            self.seen[job.prompt.tokens] = True


Deliver = Callable[[list[tuple[Job, Delta]]], None]


class Scheduler:
    """Computes up to `slots` jobs at a time; the others queue in order of arrival.

    An error while computing one job ends that job alone.

    Args:
        model: in evaluation mode.
        precision: as for `generate_batch`.
        slots: jobs that run at the same time. Each slot, once used, keeps memory for the keys and
            values of `max_seq_len` positions.
        max_seq_len: tokens of a sequence that the model sees; by default as many as it can.
        max_queue: jobs that may wait for a slot.
        deliver: called by the computing thread with the deltas of each step.

    Raises:
        ValueError: the precision needs the kernel, which cannot run this model.
    """

    def __init__(
        self,
        model: DecoderModel,
        tokenizer: Tokenizer,
        precision: str,
        slots: int,
        max_queue: int,
        deliver: Deliver,
        max_seq_len: int | None = None,
    ) -> None:
        # Not the model, whose weights the kernel has packed.
        self._vocab_size, self._padding_idx = model.vocab_size, model.padding_idx
        self._max_seq_len = max_seq_len or model.max_seq_len
        self.tokenizer, self._deliver = tokenizer, deliver
        self._decoding = self._newest = start_decoding(
            model, slots, precision=precision, capacity=self._max_seq_len
        )
        self._slots, self._max_queue = slots, max_queue
        self._changed = threading.Condition()  # on a reentrant lock
        self._queue: deque[Job] = deque()
        self._running: dict[int, RunningJob] = {}  # by slot
        self._deltas: list[tuple[Job, Delta]] = []
        self._texts: dict[int, str] = {}  # of single tokens, which many alternatives repeat
        self._draining = self._closing = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Jobs that have a slot."""
        return len(self._running)

    @property
    def queued(self) -> int:
        """Jobs that wait for a slot."""
        return len(self._queue)

    @property
    def alive(self) -> bool:
        """Whether the computing thread is running."""
        return self._thread.is_alive()

    @property
    def draining(self) -> bool:
        return self._draining

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues all of the jobs, or none.

        Raises:
            QueueFull: they do not fit into the queue.
            Draining: after `drain` or `close`.
        """
        with self._changed:
            if self._draining or not self.alive:
                raise Draining
            # Free slots promised to queued jobs count as taken.
            count = len(self._running) + len(self._queue) + len(jobs)
            if count > self._slots + self._max_queue:
                raise QueueFull
            for job in jobs:
                job.decoding = self._newest
            self._queue += jobs
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Drops jobs; their slots are free before the next token."""
        with self._changed:
            for job in jobs:
                if job in self._queue:
                    self._queue.remove(job)
            for running in self._running.values():
                running.cancelled |= running.job in jobs

    def renew(self, decoding: AnyDecoding) -> None:
        """Computes later jobs with another model; earlier ones finish with theirs first.

        Args:
            decoding: of a model with the same vocabulary and `max_seq_len`, for as many sequences.
        """
        with self._changed:
            self._newest = decoding
            self._changed.notify()

    def drain(self) -> None:
        """Refuses new jobs; running and queued ones finish."""
        with self._changed:
            self._draining = True

    def close(self) -> None:
        """Stops the thread before the next token; unfinished jobs get an error."""
        with self._changed:
            self._draining = self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._admit():
                self._step()
                self._deliver(self._deltas)
                self._deltas = []
        finally:  # even after an error, so that no client waits forever
            with self._changed:
                self._draining = True
                unfinished = [running.job for running in self._running.values()] + [*self._queue]
                self._running.clear()
                self._queue.clear()
            stopped = Delta(error=STOPPED)
            self._deliver([*self._deltas, *((job, stopped) for job in unfinished)])

    def _admit(self) -> bool:
        """Waits for jobs and moves them from the queue to free slots; False when closing."""
        with self._changed:
            while not (self._running or self._queue or self._closing):
                self._decoding = self._newest  # frees the memory of the one before
                self._changed.wait()
            for slot in [slot for slot, running in self._running.items() if running.cancelled]:
                self._free(slot)
            joining = 0
            # The lowest slots first: the higher ones take no memory until they are needed.
            free = (slot for slot in range(self._slots) if slot not in self._running)
            while self._queue and len(self._running) < self._slots:
                decoding = self._queue[0].decoding
                size = min(len(self._queue[0].prompt.tokens), self._max_seq_len)
                if decoding is not self._decoding:
                    if self._running:  # with the model before
                        break
                    self._decoding = decoding
                if joining and joining + size > JOINING_TOKENS:
                    break
                joining += size
                job = self._queue.popleft()
                try:
                    running = RunningJob(job, self.tokenizer, self._vocab_size, self._max_seq_len)
                except Exception as error:
                    self._deltas.append((job, Delta(error=_describe(error))))
                else:
                    self._running[next(free)] = running
            return not self._closing

    def _free(self, slot: int) -> None:
        with self._changed:
            del self._running[slot]
        self._decoding.clear(slot)

    def _fail(self, slot: int, error: Exception) -> None:
        """Ends one job with an error."""
        self._deltas.append((self._running[slot].job, Delta(error=_describe(error))))
        self._free(slot)

    def _step(self) -> None:
        scoring = next((slot for slot, running in self._running.items() if running.scoring), None)
        if scoring is not None:
            try:
                self._score_prompt(scoring)
            except Exception as error:
                self._fail(scoring, error)
        slots = sorted(slot for slot, running in self._running.items() if not running.scoring)
        if slots:
            self._decode(slots)

    def _decode(self, slots: Sequence[int]) -> None:
        """Appends the pending tokens of these slots, and draws the next ones.

        If that fails for several slots, each is tried alone, so that only the jobs at fault fail.
        """
        try:
            logits = self._decoding.append(
                {slot: self._running[slot].context.pending for slot in slots}
            )
        except Exception as error:
            if len(slots) == 1:
                self._fail(slots[0], error)
                return
        else:
            self._draw(slots, logits)
            return
        lengths = self._decoding.lengths
        for slot in slots:
            context = self._running[slot].context
            if lengths[slot] != len(context.tokens) - len(context.pending):
                # The failed call has changed this sequence: recompute it.
                self._decoding.clear(slot)
                context.pending = context.tokens[:]
            self._decode([slot])

    def _score_prompt(self, slot: int) -> None:
        """Appends some tokens of a prompt and reports their log probabilities."""
        running = self._running[slot]
        job, context, tokens = running.job, running.context, running.job.prompt.tokens
        start = running.scored
        moved = context.append(tokens[start])
        if moved:
            self._decoding.clear(slot)
            added = context.pending
            running.scored += 1
        else:
            room = context.size - len(context.tokens) + 1
            added = tokens[start : start + min(SCORED_TOKENS, room)]
            context.tokens += added[1:]
            running.scored += len(added)
        logits = self._without_padding(self._decoding.append({slot: added}, every=not moved))
        logprobs = []
        before_text = job.prompt.start  # tokens whose text is not part of the prompt's
        if start == 0:
            text = self.tokenizer.decode(tokens[:1])
            logprobs.append(TokenLogprob(text, None, None, 0))
            if not before_text:
                running.prompt_stream.push(tokens[0])
        targets = tokens[start + 1 : running.scored + 1]  # a row predicts the token after its own
        for i, (row, token) in enumerate(zip(logits, targets, strict=False), start + 1):
            if i >= before_text:
                running.prompt_stream.push(token)
            logprobs.append(self._logprob(row, token, job, running.prompt_stream.start))
        self._deltas.append((job, Delta(logprobs=logprobs)))
        if running.scored < len(tokens):
            return
        running.scoring = False
        if job.max_tokens and len(tokens) > context.size:  # as if it had not been scored
            self._decoding.clear(slot)
            running.context = ContextWindow(self._max_seq_len, tokens)
        elif job.max_tokens:
            self._draw([slot], logits[-1:])
        else:
            self._deltas.append((job, Delta(running.stream.end(), finish_reason="length")))
            self._free(slot)

    def _draw(self, slots: Sequence[int], logits: Tensor) -> None:
        """Draws a token for each of the slots from its row of logits."""
        running = [self._running[slot] for slot in slots]
        try:
            tokens = self._sample(running, self._without_padding(logits))
        except Exception as error:
            if len(slots) == 1:
                self._fail(slots[0], error)
                return
        else:
            for slot, each, token, row in zip(slots, running, tokens, logits, strict=True):
                try:
                    finished = self._advance(each, token, row)
                except Exception as error:
                    self._fail(slot, error)
                else:
                    if finished:
                        self._free(slot)
                    elif each.context.append(token):
                        self._decoding.clear(slot)
            return
        for i, slot in enumerate(slots):  # find the job at fault
            self._draw([slot], logits[i : i + 1])

    def _sample(self, running: Sequence[RunningJob], logits: Tensor) -> list[int]:
        seen = None
        if any(each.seen is not None for each in running):
            nothing = torch.zeros(logits.size(1), dtype=torch.bool)
            seen = torch.stack([nothing if each.seen is None else each.seen for each in running])
        return sample(
            logits,
            [each.job.sampling for each in running],
            [each.job.seed for each in running],
            [each.drawn for each in running],
            seen,
        ).tolist()

    def _advance(self, running: RunningJob, token: int, logits: Tensor) -> bool:
        """Adds a drawn token to its job; returns whether that was the last one."""
        job, stream = running.job, running.stream
        if running.seen is not None:
            running.seen[token] = True
        running.drawn += 1
        has_ended = token in self.tokenizer.end_tokens
        text, finish_reason = "" if has_ended else stream.push(token), None
        if job.logprobs is not None and not has_ended:
            running.held_logprobs.append(self._logprob(logits, token, job, stream.start))
        if not stream.stopped and (has_ended or running.drawn == job.max_tokens):
            text += stream.end()
            finish_reason = "stop" if has_ended else "length"
        if stream.stopped:
            finish_reason = "stop"
        ready = []
        if running.held_logprobs:
            before = len(job.prompt.text if job.echo else job.prompt.given) - stream.overlapped
            ready = [
                logprob._replace(offset=before + logprob.offset)
                for logprob in running.held_logprobs
                if (finish_reason and not stream.stopped) or logprob.offset < stream.shown
            ]
            del running.held_logprobs[: len(ready)]
        first_token_s = time.monotonic() - job.submitted if running.drawn == 1 else None
        self._deltas.append((job, Delta(text, ready, 1, first_token_s, finish_reason)))
        return finish_reason is not None

    def _without_padding(self, logits: Tensor) -> Tensor:
        if self._padding_idx is not None:
            logits[:, self._padding_idx] = -torch.inf
        return logits

    def _logprob(self, logits: Tensor, token: int, job: Job, offset: int) -> TokenLogprob:
        logprobs = logits.log_softmax(-1).clamp_(min=MIN_LOGPROB)
        own, count = float(logprobs[token]), job.logprobs or 0
        if math.isnan(own):
            raise ValueError(
                "the model's scores are not numbers: its weights may be damaged, or its training "
                "diverged; serve another checkpoint"
            )
        best = logprobs.topk(min(count + 1, len(logprobs)))  # one more, in case of padding
        tokens = [each for each in best.indices.tolist() if each != self._padding_idx][:count]
        if token != self._padding_idx:
            tokens.append(token)
        top: dict[str, float] = {}
        for each in tokens:
            with contextlib.suppress(KeyError):  # a vocabulary may have ids without a token
                top.setdefault(self._text_of(each), float(logprobs[each]))
        return TokenLogprob(self._text_of(token), own, top, offset)

    def _text_of(self, token: int) -> str:
        """What a token adds to the text: after another one, which may be a space more."""
        text = self._texts.get(token)
        if text is None:
            padding = self.tokenizer.pad_token_id
            before = self.tokenizer.decode([padding])
            text = self.tokenizer.decode([padding, token]).removeprefix(before)
            self._texts[token] = text
        return text


def _describe(error: Exception) -> str:
    """The message for the client. Every error goes to the log with its traceback."""
    if isinstance(error, (ValueError, LookupError)):
        logger.warning("a job failed", exc_info=error)
        return str(error.args[0] if error.args else error)  # str() of a KeyError adds quotes
    logger.error("a job failed", exc_info=error)
    return "the server ran out of memory" if isinstance(error, MemoryError) else INTERNAL_ERROR
