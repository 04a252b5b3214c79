"""Delivery of the scheduler's deltas to clients, as one JSON body or as a stream of events."""

import asyncio
import json
import secrets
import threading
import time
from collections.abc import Sequence
from typing import Any

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from fastllm.generation.defaults import choose_sampling
from fastllm.generation.text_stream import Prompt, TextStream
from fastllm.serving.errors import ApiError, respond
from fastllm.serving.metrics import Metrics
from fastllm.serving.model import ServedModel
from fastllm.serving.requests import CompletionRequest
from fastllm.serving.scheduler import Delta, Job, Scheduler, TokenLogprob

# Seconds between two chunks of a stream; nobody reads faster.
CHUNK_INTERVAL_S = 0.01


class DeltaQueue:
    """Deltas of one request's jobs, until the request takes them.

    Args:
        whole: whether to wait until a job ends before handing anything out.
    """

    def __init__(self, whole: bool) -> None:
        self._deltas: list[tuple[Job, Delta]] = []
        self._ready = asyncio.Event()
        self._whole = whole

    def put(self, job: Job, delta: Delta) -> None:
        self._deltas.append((job, delta))
        if delta.is_last or not self._whole:
            self._ready.set()

    async def take(self) -> list[tuple[Job, Delta]]:
        await self._ready.wait()
        self._ready.clear()
        deltas, self._deltas = self._deltas, []
        return deltas


class Dispatcher:
    """Carries deltas from the scheduler's thread to the requests' queues in the event loop.

    First tokens and ends of jobs go at once, everything else at most every `CHUNK_INTERVAL_S`: a
    small model makes thousands of tokens per second, each of which costs more to send than to
    compute.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._loop: asyncio.AbstractEventLoop | None = None
        self._queues: dict[Job, DeltaQueue] = {}
        self._deltas: list[tuple[Job, Delta]] = []
        self._lock = threading.Lock()
        self._next_due = 0.0

    def subscribe(self, jobs: Sequence[Job], whole: bool) -> DeltaQueue:
        self._loop = asyncio.get_running_loop()
        queue = DeltaQueue(whole)
        self._queues.update(dict.fromkeys(jobs, queue))
        return queue

    def unsubscribe(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._queues.pop(job, None)

    def __call__(self, deltas: list[tuple[Job, Delta]]) -> None:
        if self._loop is None or self._loop.is_closed():
            return
        with self._lock:
            first = not self._deltas
            self._deltas += deltas
        now = time.monotonic()
        urgent = any(delta.first_token_s is not None or delta.is_last for _, delta in deltas)
        if urgent or now >= self._next_due:
            self._next_due = now + CHUNK_INTERVAL_S
            self._loop.call_soon_threadsafe(self._dispatch)
        elif first:  # the next step may take long
            delay = self._next_due - now
            self._loop.call_soon_threadsafe(self._loop.call_later, delay, self._dispatch)

    def _dispatch(self) -> None:
        with self._lock:
            deltas, self._deltas = self._deltas, []
        self._metrics.generated_tokens.inc(sum(delta.tokens for _, delta in deltas))
        for job, delta in deltas:
            if delta.first_token_s is not None:
                self._metrics.first_token.observe(delta.first_token_s)
            if queue := self._queues.get(job):  # else its client has disconnected
                queue.put(job, delta)


class Completion(Response):
    """The response to one request. If the client disconnects, its jobs are cancelled.

    Raises:
        QueueFull, Draining: see `Scheduler.submit`.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        request: CompletionRequest,
        prompts: Sequence[Prompt],
        served: ServedModel,
        scheduler: Scheduler,
        dispatcher: Dispatcher,
        metrics: Metrics,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._request, self._scheduler = request, scheduler
        self._dispatcher, self._metrics = dispatcher, metrics
        self._common = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": served.fingerprint,
        }
        self._prompt_tokens = sum(len(prompt.tokens) for prompt in prompts)
        seed = secrets.randbits(63) if request.seed is None else request.seed
        sampling = choose_sampling(request, served.sampling)
        repeated = [prompt for prompt in prompts for _ in range(request.n)]
        self._echoes = [prompt.text if request.echo else "" for prompt in repeated]
        self._jobs = [
            Job(
                prompt,
                request.max_tokens,
                sampling,
                (seed + i) % 2**64,
                request.stop,
                request.logprobs,
                request.echo,
                request.scores_prompt,
            )
            for i, prompt in enumerate(repeated)
        ]
        self._index = {job: i for i, job in enumerate(self._jobs)}
        self._deltas = dispatcher.subscribe(self._jobs, whole=not request.stream)
        trivial = request.max_tokens == 0 and not request.scores_prompt
        try:
            scheduler.submit([] if trivial else self._jobs)
        except Exception:
            dispatcher.unsubscribe(self._jobs)
            raise
        if trivial:
            for job in self._jobs:
                stream = TextStream(scheduler.tokenizer, (), job.prompt, job.echo)
                self._deltas.put(job, Delta(stream.end(), finish_reason="length"))
        metrics.prompt_tokens.inc(self._prompt_tokens)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        send_response = self._send_stream if self._request.stream else self._send_whole
        response = asyncio.ensure_future(send_response(send))
        disconnect = asyncio.ensure_future(_disconnected(receive))
        try:
            with self._metrics.duration.time():
                await asyncio.wait({response, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            if response.done():
                response.result()
            else:
                self._metrics.disconnects.inc()
        finally:
            for task in (response, disconnect):
                task.cancel()
            await asyncio.gather(response, disconnect, return_exceptions=True)
            self._scheduler.cancel(self._jobs)
            self._dispatcher.unsubscribe(self._jobs)

    async def _send_whole(self, send: Send) -> None:
        deltas: dict[Job, list[Delta]] = {job: [] for job in self._jobs}
        finished = 0
        while finished < len(self._jobs):
            for job, delta in await self._deltas.take():
                if delta.error:
                    await respond(send, ApiError(500, delta.error).response())
                    return
                deltas[job].append(delta)
                finished += delta.finish_reason is not None
        # In a thread, so that other requests need not wait: it may be megabytes.
        body = await asyncio.to_thread(self._body, deltas)
        await respond(send, Response(body, media_type="application/json"))

    def _body(self, deltas: dict[Job, list[Delta]]) -> str:
        # json.dumps holds the interpreter lock. For 128 choices of 512 tokens with 20 alternatives
        # each, that was 0.7 s without a token for anybody; one choice at a time, it is 5 ms.
        choices = [
            json.dumps(self._choice(job, deltas[job], echo), allow_nan=False)
            for job, echo in zip(self._jobs, self._echoes, strict=True)
        ]
        drawn = sum(delta.tokens for each in deltas.values() for delta in each)
        rest = json.dumps({**self._common, "usage": self._usage(drawn)})
        return f'{{"choices": [{", ".join(choices)}], {rest.removeprefix("{")}'

    async def _send_stream(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        drawn = finished = 0
        if self._request.echo:
            echoes = [
                self._choice(job, [], echo)
                for job, echo in zip(self._jobs, self._echoes, strict=True)
            ]
            await self._send_choices(send, echoes)
        while finished < len(self._jobs):
            deltas: dict[Job, list[Delta]] = {}
            for job, delta in await self._deltas.take():
                if delta.error:
                    await self._send_events(send, [ApiError(500, delta.error).body], more=False)
                    return
                deltas.setdefault(job, []).append(delta)
                drawn += delta.tokens
                finished += delta.finish_reason is not None
            choices = [self._choice(job, each) for job, each in deltas.items()]
            # The start of a character, or of a possible stop text, shows nothing yet.
            await self._send_choices(
                send, [c for c in choices if c["text"] or c["logprobs"] or c["finish_reason"]]
            )
        last: list[Any] = ["[DONE]"]
        if self._request.stream_options.include_usage:
            last.insert(0, {**self._common, "choices": [], "usage": self._usage(drawn)})
        await self._send_events(send, last, more=False)

    async def _send_choices(self, send: Send, choices: Sequence[dict[str, Any]]) -> None:
        usage = {"usage": None} if self._request.stream_options.include_usage else {}
        if choices:
            await self._send_events(
                send, [{**self._common, "choices": [choice], **usage} for choice in choices]
            )

    async def _send_events(self, send: Send, events: Sequence[Any], more: bool = True) -> None:
        lines = [e if isinstance(e, str) else json.dumps(e, allow_nan=False) for e in events]
        body = "".join(f"data: {line}\n\n" for line in lines).encode()
        await send({"type": "http.response.body", "body": body, "more_body": more})

    def _choice(self, job: Job, deltas: Sequence[Delta], echo: str = "") -> dict[str, Any]:
        logprobs = [logprob for delta in deltas for logprob in delta.logprobs]
        return {
            "index": self._index[job],
            "text": echo + "".join(delta.text for delta in deltas),
            "logprobs": _columns(logprobs) if logprobs else None,
            "finish_reason": deltas[-1].finish_reason if deltas else None,
        }

    def _usage(self, drawn: int) -> dict[str, int]:
        prompt = self._prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": drawn,
            "total_tokens": prompt + drawn,
        }


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _columns(logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {
        "tokens": [each.token for each in logprobs],
        "token_logprobs": [each.logprob for each in logprobs],
        "top_logprobs": [each.top for each in logprobs],
        "text_offset": [each.offset for each in logprobs],
    }
