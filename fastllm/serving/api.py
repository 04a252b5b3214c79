"""The HTTP side: OpenAI's completions, what the page shows, metrics, and the bounds around them."""

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import json
import math
import secrets
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
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastllm.command import describe
from fastllm.models.decoder import DecoderModel
from fastllm.ops.sampling import Sampling
from fastllm.serving.engine import Busy, Draining, Engine, Job, Piece, Score
from fastllm.tokenization import Tokenizer
from fastllm.training.config import TrainConfig
from fastllm.training.metrics import read_metrics

RETRY_AFTER_S = "1"
# Characters, or token ids, whose encoding takes so long that others need not wait for it.
LONG_PROMPTS = 10_000
# Between two chunks of a stream; nobody reads faster.
CHUNKS_APART_S = 0.01
# Points of a curve in one answer; of more, every so-manieth is given.
CURVE_POINTS = 4000


class Limits(NamedTuple):
    """What a client may ask for, and how long it may take over it."""

    body_bytes: int = 2**20
    choices: int = 128  # prompts times n
    connections: int = 256
    head_s: float = 10
    """Until a request's headers are there, from its first byte or the connection's beginning."""
    body_s: float = 10
    """Until its body is there, from the headers on."""
    write_s: float = 30
    """Until a client takes what was written to it."""


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


class ApiError(Exception):
    """An answer other than success, in OpenAI's format."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            status, "invalid_request_error" if status < 500 else "server_error"
        )
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        headers = {}
        if self.status in (429, 503):
            headers["Retry-After"] = RETRY_AFTER_S
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status in (408, 413):  # what still comes of the body is not read
            headers["Connection"] = "close"
        return JSONResponse(self.body, self.status, headers)


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
        message = describe(error)
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

    def watch(self, engine: Engine) -> None:
        for name, text, read in (
            ("fastllm_active", "Sequences that are computed.", lambda: engine.running),
            ("fastllm_queued", "Sequences that wait for a place.", lambda: engine.waiting),
        ):
            Gauge(name, text, registry=self.registry).set_function(read)


class Mailbox:
    """What the engine brought for the jobs of one request, until the request takes it.

    It may be taken when a job is done, and otherwise not sooner than `apart_s` seconds after the
    last time: a small model has thousands of tokens a second, each of which would cost more to be
    sent than to be computed.
    """

    def __init__(self, apart_s: float) -> None:
        self._pieces: list[tuple[Job, Piece]] = []
        self._filled = asyncio.Event()
        self._apart_s, self._next = apart_s, 0.0
        self._timer: asyncio.TimerHandle | None = None

    def put(self, job: Job, piece: Piece) -> None:
        self._pieces.append((job, piece))
        if piece.finish or piece.error:
            self._filled.set()
        elif self._timer is None and self._apart_s < math.inf:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(max(self._next, loop.time()), self._filled.set)

    async def take(self) -> list[tuple[Job, Piece]]:
        await self._filled.wait()
        self._filled.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._next = asyncio.get_running_loop().time() + self._apart_s
        pieces, self._pieces = self._pieces, []
        return pieces


class Post:
    """Carries pieces from the engine's thread to the mailboxes, in the event loop's."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._loop: asyncio.AbstractEventLoop | None = None
        self._boxes: dict[Job, Mailbox] = {}
        self._started: set[Job] = set()

    def open(self, jobs: Sequence[Job], apart_s: float) -> Mailbox:
        self._loop = asyncio.get_running_loop()
        box = Mailbox(apart_s)
        self._boxes.update(dict.fromkeys(jobs, box))
        return box

    def close(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._boxes.pop(job, None)
            self._started.discard(job)

    def __call__(self, pieces: list[tuple[Job, Piece]]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, pieces)

    def _deliver(self, pieces: list[tuple[Job, Piece]]) -> None:
        now = time.monotonic()
        for job, piece in pieces:
            self._metrics.new_tokens.inc(piece.tokens)
            box = self._boxes.get(job)
            if box is None:  # its client has gone
                continue
            if piece.tokens and job not in self._started:
                self._started.add(job)
                self._metrics.first_token.observe(now - job.submitted)
            box.put(job, piece)


class Completion(Response):
    """The answer to a request: it ends with the client, and its jobs with it."""

    media_type = "text/event-stream"

    def __init__(
        self,
        request: CompletionRequest,
        served: Served,
        prompts: Sequence[tuple[list[int], str]],
        engine: Engine,
        post: Post,
        metrics: Metrics,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._request, self._engine, self._post, self._metrics = request, engine, post, metrics
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
        self._box = post.open(self._jobs, CHUNKS_APART_S if request.stream else math.inf)
        computed = [job for job in self._jobs if job.max_tokens or job.score_prompt]
        try:
            engine.submit(computed)
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
            self._engine.cancel(self._jobs)
            self._post.close(self._jobs)

    async def _whole(self, send: Send) -> None:
        pieces: dict[Job, list[Piece]] = {job: [] for job in self._jobs}
        finished = 0
        while finished < len(self._jobs):
            for job, piece in await self._box.take():
                if piece.error:
                    await _respond(send, ApiError(500, piece.error).response())
                    return
                pieces[job].append(piece)
                finished += piece.finish is not None
        choices = [
            self._choice(job, pieces[job], self._echoes[i] if self._request.echo else "")
            for i, job in enumerate(self._jobs)
        ]
        drawn = sum(piece.tokens for each in pieces.values() for piece in each)
        body = {**self._common, "choices": choices, "usage": self._usage(drawn)}
        await _respond(send, JSONResponse(body))

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


async def _respond(send: Send, response: Response) -> None:
    """Sends a whole response that asks nothing of the request."""
    await response({"type": "http"}, _nothing, send)


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


def _logprobs(scores: Sequence[Score]) -> dict[str, Any]:
    return {
        "tokens": [score.token for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [score.top for score in scores],
        "text_offset": [score.offset for score in scores],
    }


OPEN_PATHS = ("/", "/health")


class Guard:
    """Who may ask, and how much: what is decided before a request is looked at."""

    def __init__(self, app: ASGIApp, api_key: str | None, limits: Limits, metrics: Metrics) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics
        self._api_key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start" and scope["path"] == "/v1/completions":
                self._metrics.requests.labels(message["status"]).inc()
            await send(message)

        try:
            self._check_headers(scope)
            body = await asyncio.wait_for(self._read(receive), self._limits.body_s)
        except asyncio.TimeoutError:
            error = ApiError(408, f"the body did not come within {self._limits.body_s:g} s")
            await _respond(counting, error.response())
            return
        except ApiError as error:
            await _respond(counting, error.response())
            return
        if body is None:
            return
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return unread.pop() if unread else await receive()

        await self._app(scope, replay, counting)

    def _check_headers(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if self._api_key is None:
            # A page somewhere on the web may have its own name lead here, and read the answers.
            host = headers.get(b"host", b"localhost").decode("latin-1")
            if not is_loopback(host_name(host)):
                raise ApiError(403, f"the host {host!r} is not this computer; use an API key")
        elif scope["path"] not in OPEN_PATHS:
            kind, _, key = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._api_key):
                raise ApiError(
                    401,
                    "give the server's API key: Authorization: Bearer KEY",
                    None,
                    "invalid_api_key",
                )
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip()
        if scope["method"] == "POST" and kind.lower() != b"application/json":
            # What any page could send, also without naming a type, before its browser asks us.
            raise ApiError(415, "the body must be application/json")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._limits.body_bytes:
            raise self._too_large()

    async def _read(self, receive: Receive) -> bytes | None:
        """The body; None if the client hung up."""
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._limits.body_bytes:
                raise self._too_large()
            if not message.get("more_body"):
                return body

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self._limits.body_bytes:,} bytes")


def host_name(host: str) -> str:
    """The name in a Host header: without port and brackets."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def is_loopback(name: str) -> bool:
    """Whether a name or an address is this computer's own, which nobody else can reach."""
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def connection_class(limits: Limits) -> type[H11Protocol]:
    """uvicorn's connections, which are cut off where the client is silent.

    uvicorn itself has a limit only for the time between two requests, and any byte ends that.
    """

    class Connection(H11Protocol):
        _head: asyncio.TimerHandle | None = None
        _write: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            transport.set_write_buffer_limits(0)  # what lies here has not been taken
            if len(self.connections) > limits.connections:
                transport.abort()
            self._head = self.loop.call_later(limits.head_s, transport.abort)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                stop(self._head)
                self._head = None
            elif self._head is None:
                self._head = self.loop.call_later(limits.head_s, self.transport.abort)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._write = self.loop.call_later(limits.write_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            stop(self._write)

        def connection_lost(self, exc: Exception | None) -> None:
            stop(self._head)
            stop(self._write)
            super().connection_lost(exc)

    def stop(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()

    return Connection


def create_app(
    served: Served,
    places: int,
    longest_queue: int,
    api_key: str | None = None,
    limits: Limits = Limits(),  # noqa: B008 - it cannot be changed
) -> FastAPI:
    """The application; `app.state.engine` computes, until somebody closes it.

    Args:
        places, longest_queue: see `Engine`.
        api_key: what every request must bring, but those for the page itself and /health.
    """
    metrics = Metrics()
    post = Post(metrics)
    model, tokenizer = served.model, served.tokenizer
    engine = Engine(model, tokenizer, served.precision, places, longest_queue, post)
    metrics.watch(engine)
    app = FastAPI(title="fastllm", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.engine = engine
    app.add_middleware(Guard, api_key=api_key, limits=limits, metrics=metrics)

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
        if not engine.alive:
            return ApiError(503, "the server has stopped computing").response()
        if engine.draining:
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
                "progress": served.progress,
            }
        )

    @app.get("/api/curve")
    def curve(after: int = -1) -> JSONResponse:
        points = [
            {name: finite(line.get(name)) for name in CURVE_FIELDS}
            for line in read_metrics(served.run_dir / "metrics.jsonl")
            if line["step"] > after
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
            return Completion(asked, served, prompts, engine, post, metrics)
        except Busy:
            raise ApiError(
                429,
                f"all {places} places are taken and {engine.waiting} sequences wait for one; "
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
                f"together {len(tokens) + asked.max_tokens}, but the model takes {longest}",
                "max_tokens",
                "context_length_exceeded",
            )
        result.append((tokens, text))
    return result
