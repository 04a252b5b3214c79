"""The HTTP side: OpenAI's completions, what the page shows, and metrics."""

import asyncio
import base64
import hashlib
import json
import math
import secrets
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from fastllm.command import describe_error
from fastllm.models.decoder import DecoderModel
from fastllm.ops.sampling import Sampling
from fastllm.serving.guard import ApiError, Guard, Limits, respond
from fastllm.serving.scheduler import Busy, Draining, Job, Piece, Scheduler, Score
from fastllm.tokenization import Tokenizer
from fastllm.training.config import TrainConfig
from fastllm.training.metrics import read_metrics

# Characters, or token ids, whose encoding takes so long that others need not wait for it.
LONG_PROMPTS = 10_000
# Seconds between two chunks of a stream; nobody reads faster.
CHUNKS_APART_S = 0.01
# Points of a curve in one answer; of more, every so-manieth is given.
CURVE_POINTS = 4000


class Served(NamedTuple):
    """The model that is served, and what is known of it.

    Attributes:
        name: by which requests call it.
        run_dir: the folder with its metrics.jsonl, if there is one.
        progress: what its checkpoint says of the training: step, tokens, losses.
    """

    name: str
    model: DecoderModel
    tokenizer: Tokenizer
    config: TrainConfig
    precision: str
    run_dir: Path
    progress: dict[str, Any]
    created: int


def _prompts(value: Any) -> list[str | list[int]]:
    def is_ids(item: Any) -> bool:
        return isinstance(item, list) and all(type(token) is int for token in item)

    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if is_ids(value):
            return [value]
        if all(isinstance(item, str) for item in value) or all(map(is_ids, value)):
            return value
    raise ValueError("must be a text, a list of texts, a list of token ids, or a list of such")


def _stops(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _unsupported(value: Any) -> Any:
    if value:
        raise ValueError("is not supported; leave it out")
    return value


Unsupported = Annotated[Any, AfterValidator(_unsupported)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False


class CompletionRequest(BaseModel):
    """What `POST /v1/completions` takes: OpenAI's, and more ways of sampling."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts)]
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 16
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**63)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=1e-37, lt=1e38)] = 1.0
    n: Annotated[int, Field(ge=1, lt=2**31)] = 1
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]],
        BeforeValidator(_stops),
        Field(max_length=4),
    ] = Field(default_factory=list)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    user: str | None = None
    best_of: int | None = None
    suffix: Unsupported = None
    presence_penalty: Unsupported = None
    frequency_penalty: Unsupported = None
    logit_bias: Unsupported = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, values: Any) -> Any:
        if isinstance(values, dict):
            if len(values) > 100:  # an error for each would take its time
                raise ValueError(f"{len(values):,} fields are more than any request has")
            return {name: value for name, value in values.items() if value is not None}
        return values

    @model_validator(mode="after")
    def _check_best_of(self) -> "CompletionRequest":
        if self.best_of not in (None, self.n):
            raise ValueError("best_of is not supported other than as n; leave it out")
        return self

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty
        )


def parse_request(body: bytes) -> CompletionRequest:
    """Raises `ApiError` 400 for what is no JSON, 422 for what is no request."""
    try:
        return CompletionRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "json_invalid":
            raise ApiError(400, f"the body is not JSON: {first['ctx']['error']}") from None
        message = describe_error(error)
        if len(message) > 1000:  # it repeats what it was given
            message = message[:1000] + " ..."
        param = str(first["loc"][0]) if first["loc"] else None
        raise ApiError(422, message, param) from None


class Metrics:
    """What Prometheus reads."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "fastllm_requests", "Answers to /v1/completions.", ["status"], registry=registry
        )
        self.prompt_tokens = Counter(
            "fastllm_prompt_tokens", "Tokens of prompts taken up.", registry=registry
        )
        self.new_tokens = Counter("fastllm_generated_tokens", "Tokens drawn.", registry=registry)
        self.disconnects = Counter(
            "fastllm_disconnects", "Clients that hung up before the end.", registry=registry
        )
        steps = [0.001 * 2**i for i in range(16)]
        self.first_token = Histogram(
            "fastllm_time_to_first_token_seconds",
            "From a sequence's arrival to its first token.",
            buckets=steps,
            registry=registry,
        )
        self.duration = Histogram(
            "fastllm_request_seconds", "Whole requests.", buckets=steps, registry=registry
        )

    def watch(self, scheduler: Scheduler) -> None:
        for name, text, read in (
            ("fastllm_active", "Sequences that are computed.", lambda: scheduler.running),
            ("fastllm_queued", "Sequences that wait for a place.", lambda: scheduler.waiting),
        ):
            Gauge(name, text, registry=self.registry).set_function(read)


class Mailbox:
    """What came for the jobs of one request, until the request takes it.

    Args:
        whole: whether nothing is to be taken before a job is done.
    """

    def __init__(self, whole: bool) -> None:
        self._pieces: list[tuple[Job, Piece]] = []
        self._filled = asyncio.Event()
        self._whole = whole

    def put(self, job: Job, piece: Piece) -> None:
        self._pieces.append((job, piece))
        if piece.finish or piece.error or not self._whole:
            self._filled.set()

    async def take(self) -> list[tuple[Job, Piece]]:
        await self._filled.wait()
        self._filled.clear()
        pieces, self._pieces = self._pieces, []
        return pieces


class Post:
    """Carries pieces from the scheduler's thread to the mailboxes, in the event loop's.

    At once where somebody waits for a first token or an end, and else not more often than every
    `CHUNKS_APART_S`: a small model has thousands of tokens a second, each of which would cost more
    to be sent than to be computed.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._loop: asyncio.AbstractEventLoop | None = None
        self._boxes: dict[Job, Mailbox] = {}
        self._pieces: list[tuple[Job, Piece]] = []
        self._held = threading.Lock()
        self._next = 0.0

    def open(self, jobs: Sequence[Job], whole: bool) -> Mailbox:
        self._loop = asyncio.get_running_loop()
        box = Mailbox(whole)
        self._boxes.update(dict.fromkeys(jobs, box))
        return box

    def close(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._boxes.pop(job, None)

    def __call__(self, pieces: list[tuple[Job, Piece]]) -> None:
        if self._loop is None or self._loop.is_closed():
            return
        with self._held:
            first = not self._pieces
            self._pieces += pieces
        now = time.monotonic()
        waited_for = any(
            piece.first_after is not None or piece.finish or piece.error for _, piece in pieces
        )
        if waited_for or now >= self._next:
            self._next = now + CHUNKS_APART_S
            self._loop.call_soon_threadsafe(self._deliver)
        elif first:  # the next step may take long
            after = self._next - now
            self._loop.call_soon_threadsafe(self._loop.call_later, after, self._deliver)

    def _deliver(self) -> None:
        with self._held:
            pieces, self._pieces = self._pieces, []
        self._metrics.new_tokens.inc(sum(piece.tokens for _, piece in pieces))
        for job, piece in pieces:
            if piece.first_after is not None:
                self._metrics.first_token.observe(piece.first_after)
            if box := self._boxes.get(job):  # else its client has gone
                box.put(job, piece)


class Completion(Response):
    """The answer to a request: it ends with the client, and its jobs with it."""

    media_type = "text/event-stream"

    def __init__(
        self,
        request: CompletionRequest,
        served: Served,
        prompts: Sequence[tuple[list[int], str]],
        scheduler: Scheduler,
        post: Post,
        metrics: Metrics,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._request, self._scheduler, self._post, self._metrics = (
            request,
            scheduler,
            post,
            metrics,
        )
        self._common = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
        }
        self._prompt_tokens = sum(len(tokens) for tokens, _ in prompts)
        seed = secrets.randbits(63) if request.seed is None else request.seed
        self._echoes = [text for _, text in prompts for _ in range(request.n)]
        self._jobs = [
            Job(
                prompt,
                request.max_tokens,
                request.sampling,
                (seed + i) % 2**64,
                request.stop,
                request.logprobs,
                request.echo and request.logprobs is not None,
                len(self._echoes[i]),
            )
            for i, prompt in enumerate(p for p, _ in prompts for _ in range(request.n))
        ]
        self._index = {job: i for i, job in enumerate(self._jobs)}
        self._box = post.open(self._jobs, whole=not request.stream)
        computed = [job for job in self._jobs if job.max_tokens or job.score_prompt]
        try:
            scheduler.submit(computed)
        except (Busy, Draining):
            post.close(self._jobs)
            raise
        for job in set(self._jobs) - set(computed):
            self._box.put(job, Piece(finish="length"))
        metrics.prompt_tokens.inc(self._prompt_tokens)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = self._stream if self._request.stream else self._whole
        answer = asyncio.ensure_future(answering(send))
        gone = asyncio.ensure_future(_hung_up(receive))
        try:
            with self._metrics.duration.time():
                await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                answer.result()
            else:
                self._metrics.disconnects.inc()
        finally:
            for task in (answer, gone):
                task.cancel()
            await asyncio.gather(answer, gone, return_exceptions=True)
            self._scheduler.cancel(self._jobs)
            self._post.close(self._jobs)

    async def _whole(self, send: Send) -> None:
        pieces: dict[Job, list[Piece]] = {job: [] for job in self._jobs}
        finished = 0
        while finished < len(self._jobs):
            for job, piece in await self._box.take():
                if piece.error:
                    await respond(send, ApiError(500, piece.error).response())
                    return
                pieces[job].append(piece)
                finished += piece.finish is not None
        # Others are not to wait: with alternatives for each token it may be megabytes.
        body = await asyncio.to_thread(self._body, pieces)
        await respond(send, Response(body, media_type="application/json"))

    def _body(self, pieces: dict[Job, list[Piece]]) -> str:
        choices = []
        for job, echo in zip(self._jobs, self._echoes, strict=True):
            choice = self._choice(job, pieces[job], echo if self._request.echo else "")
            # One by one: while it encodes, `dumps` lets no other thread run.
            choices.append(json.dumps(choice, allow_nan=False))
        drawn = sum(piece.tokens for each in pieces.values() for piece in each)
        around = json.dumps({**self._common, "usage": self._usage(drawn)})
        return f'{around[:-1]}, "choices": [{", ".join(choices)}]}}'

    async def _stream(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        drawn = finished = 0
        if self._request.echo:
            echoes = [
                self._choice(job, [], text)
                for job, text in zip(self._jobs, self._echoes, strict=True)
            ]
            await self._send_choices(send, echoes)
        while finished < len(self._jobs):
            pieces: dict[Job, list[Piece]] = {}
            for job, piece in await self._box.take():
                if piece.error:
                    await self._send_events(send, [ApiError(500, piece.error).body], more=False)
                    return
                pieces.setdefault(job, []).append(piece)
                drawn += piece.tokens
                finished += piece.finish is not None
            choices = [self._choice(job, each) for job, each in pieces.items()]
            # A token that only began a character, or what may become a stop text, shows nothing.
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

    def _choice(self, job: Job, pieces: Sequence[Piece], before: str = "") -> dict[str, Any]:
        scores = [score for piece in pieces for score in piece.scores]
        return {
            "index": self._index[job],
            "text": before + "".join(piece.text for piece in pieces),
            "logprobs": _logprobs(scores) if scores else None,
            "finish_reason": pieces[-1].finish if pieces else None,
        }

    def _usage(self, drawn: int) -> dict[str, int]:
        prompt = self._prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": drawn,
            "total_tokens": prompt + drawn,
        }


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _logprobs(scores: Sequence[Score]) -> dict[str, Any]:
    return {
        "tokens": [score.token for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [score.top for score in scores],
        "text_offset": [score.offset for score in scores],
    }


def create_app(
    served: Served,
    places: int,
    longest_queue: int,
    api_key: str | None = None,
    limits: Limits = Limits(),  # noqa: B008 - it cannot be changed
) -> FastAPI:
    """The application; `app.state.scheduler` computes, until somebody closes it.

    Args:
        places, longest_queue: see `Scheduler`.
        api_key: what every request must bring, but those for the page itself and /health.
    """
    metrics = Metrics()
    post = Post(metrics)
    model, tokenizer = served.model, served.tokenizer
    scheduler = Scheduler(model, tokenizer, served.precision, places, longest_queue, post)
    metrics.watch(scheduler)
    app = FastAPI(title="fastllm", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.scheduler = scheduler
    app.add_middleware(Guard, api_key=api_key, limits=limits, answers=metrics.requests)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        return ApiError(error.status_code, f"{request.url.path}: {error.detail}").response()

    @app.exception_handler(RequestValidationError)
    async def bad_query(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return ApiError(422, f"{name}: {first['msg']}", name).response()

    @app.exception_handler(Exception)
    async def our_fault(request: Request, error: Exception) -> JSONResponse:
        return ApiError(500, "the server has made a mistake; its log says which").response()

    text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    page_headers = headers_of_page(text)

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(text, headers=page_headers)

    @app.get("/health")
    async def health() -> JSONResponse:
        if not scheduler.alive:
            return ApiError(503, "the server has stopped computing").response()
        if scheduler.draining:
            return ApiError(503, DRAINING).response()
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    description = {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "fastllm",
        "max_model_len": model.max_seq_len,
    }

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [description]})

    @app.get("/v1/models/{name:path}")
    async def model_of_name(name: str) -> JSONResponse:
        check_model(name)
        return JSONResponse(description)

    def check_model(name: str) -> None:
        if name != served.name:
            raise ApiError(
                404,
                f"there is no model {name[:100]!r} here; it is {served.name!r}",
                "model",
                "model_not_found",
            )

    @app.get("/api/card")
    async def card() -> JSONResponse:
        return JSONResponse(
            {
                "name": served.name,
                "created": served.created,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "vocab_size": tokenizer.vocab_size,
                "tokenizer": type(tokenizer).__name__,
                "max_seq_len": model.max_seq_len,
                "precision": served.precision,
                "places": places,
                "settings": served.config.model_dump(mode="json"),
                # Of a training that came to no number, JSON has none either.
                "progress": {
                    name: finite(value) if isinstance(value, float) else value
                    for name, value in served.progress.items()
                },
            }
        )

    @app.get("/api/curve")
    def curve(after: int = -1) -> JSONResponse:
        points = [
            {name: finite(line.get(name)) for name in CURVE_FIELDS}
            for line in read_metrics(served.run_dir / "metrics.jsonl", after)
        ]
        apart = -(-len(points) // CURVE_POINTS) or 1
        last = len(points) - 1
        kept = [
            point
            for i, point in enumerate(points)
            if i % apart == 0 or i == last or point["val_loss"] is not None
        ]
        return JSONResponse({"points": kept, "last_step": points[-1]["step"] if points else after})

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = parse_request(await request.body())
        if asked.model is not None:
            check_model(asked.model)
        choices = len(asked.prompt) * asked.n
        most = min(limits.choices, places + longest_queue)
        if choices > most:
            raise ApiError(400, f"{choices} choices (prompts times n) are more than {most}", "n")
        if sum(map(len, asked.prompt)) < LONG_PROMPTS:
            prompts = encode_prompts(asked, served)
        else:
            prompts = await asyncio.to_thread(encode_prompts, asked, served)
        try:
            return Completion(asked, served, prompts, scheduler, post, metrics)
        except Busy:
            raise ApiError(
                429,
                f"all {places} places are taken and {scheduler.waiting} sequences wait for one; "
                "try again",
                None,
                "rate_limit_exceeded",
            ) from None
        except Draining:
            raise ApiError(503, DRAINING) from None

    return app


def headers_of_page(text: str) -> dict[str, str]:
    """What has a browser run the page's own script and style, talk to this server, and no more."""

    def hash_of(tag: str) -> str:
        inside = text.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"

    policy = (
        f"default-src 'none'; script-src {hash_of('script')}; style-src {hash_of('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        # Nor may the script make markup of a text.
        "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    return {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


DRAINING = "the server is about to end; it takes no new requests"
CURVE_FIELDS = ("step", "loss", "val_loss", "lr", "tokens", "tokens_per_second", "elapsed_s")


def finite(value: Any) -> Any:
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def encode_prompts(asked: CompletionRequest, served: Served) -> list[tuple[list[int], str]]:
    """Token ids and text of each prompt; raises `ApiError` 400 where the model cannot take one."""
    result = []
    for prompt in asked.prompt:
        try:
            if isinstance(prompt, str):
                tokens, text = served.tokenizer.encode(prompt), prompt
            else:
                tokens, text = prompt, served.tokenizer.decode(prompt)
        except (KeyError, ValueError) as error:  # str() of a KeyError would add quotes
            raise ApiError(400, str(error.args[0]), "prompt") from None
        if not tokens:
            raise ApiError(400, "the prompt is empty; give at least one token", "prompt")
        longest = served.model.max_seq_len
        if len(tokens) + asked.max_tokens > longest:
            raise ApiError(
                400,
                f"the prompt has {len(tokens)} tokens and max_tokens is {asked.max_tokens}: "
                f"together {len(tokens) + asked.max_tokens}, but the model takes {longest}; "
                "shorten them, or train with a larger max_seq_len",
                "prompt" if len(tokens) >= longest else "max_tokens",
                "context_length_exceeded",
            )
        result.append((tokens, text))
    return result
