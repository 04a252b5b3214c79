"""The HTTP application: OpenAI's completions, the page and its data, and metrics."""

import asyncio
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from fastllm.command import describe_setting
from fastllm.models.decoder import DecoderModel
from fastllm.serving.completion import Completion, Dispatcher
from fastllm.serving.errors import ApiError
from fastllm.serving.guard import Guard, Limits
from fastllm.serving.metrics import Metrics
from fastllm.serving.model import ServedModel
from fastllm.serving.requests import encode_prompts, parse_request
from fastllm.serving.scheduler import (
    INTERNAL_ERROR,
    STOPPED,
    AnyDecoding,
    Draining,
    QueueFull,
    Scheduler,
)
from fastllm.training.metrics import read_metrics

# Prompts of more characters or token ids are encoded in a thread, so that nobody else waits.
LONG_PROMPTS = 10_000
# Points of a curve in one response; longer curves are subsampled evenly.
CURVE_POINTS = 4000
CURVE_FIELDS = ("step", "loss", "val_loss", "lr", "tokens", "tokens_per_second", "elapsed_s")
SHUTTING_DOWN = "the server is shutting down and takes no new requests"

PAGE_FILES = {
    "/": ("index.html", "text/html"),
    "/style.css": ("style.css", "text/css"),
    "/script.js": ("script.js", "text/javascript"),
}
PAGE_HEADERS = {
    # The page runs its own script and style, talks to this server, and does nothing else.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        # The script may not turn text into markup.
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

router = APIRouter()


@dataclass
class Service:
    """What the routes work with: `app.state.service`."""

    served: ServedModel
    scheduler: Scheduler
    dispatcher: Dispatcher
    metrics: Metrics
    slots: int
    max_choices: int
    max_tokens: int

    def check_model(self, name: str) -> None:
        if name != self.served.name:
            raise ApiError(
                404,
                f"model {name[:100]!r} not found; this server has {self.served.name!r}",
                "model",
                "model_not_found",
            )

    def renew(self, served: ServedModel, decoding: AnyDecoding) -> None:
        """Serves other weights from the next request on: see `Scheduler.renew`."""
        self.served = served
        self.scheduler.renew(decoding)

    def description(self) -> dict[str, Any]:
        """The model as an object of OpenAI's API."""
        return {
            "id": self.served.name,
            "object": "model",
            "created": self.served.created,
            "owned_by": "fastllm",
            "max_model_len": self.served.max_seq_len,
        }


def create_app(
    served: ServedModel,
    model: DecoderModel,
    slots: int,
    max_queue: int,
    api_key: str | None = None,
    limits: Limits = Limits(),  # noqa: B008 - immutable
) -> FastAPI:
    """The application. The caller closes its scheduler, `app.state.service.scheduler`.

    Args:
        slots, max_queue: see `Scheduler`.
        api_key: required of every request, except for the page itself and /health.
    """
    metrics = Metrics()
    dispatcher = Dispatcher(metrics)
    scheduler = Scheduler(
        model,
        served.tokenizer,
        served.precision,
        slots,
        max_queue,
        dispatcher,
        served.max_seq_len,
    )
    metrics.watch(scheduler)
    app = FastAPI(
        title="fastllm",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            RequestValidationError: _invalid_query,
            Exception: _internal_error,
        },
    )
    max_choices = min(limits.choices, slots + max_queue)
    app.state.service = Service(
        served, scheduler, dispatcher, metrics, slots, max_choices, limits.tokens
    )
    app.add_middleware(
        Guard,
        api_key=api_key,
        open_paths=(*PAGE_FILES, "/health"),
        limits=limits,
        requests=metrics.requests,
    )
    app.include_router(router)
    return app


async def _api_error(request: Request, error: ApiError) -> JSONResponse:
    return error.response()


async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    response = ApiError(error.status_code, f"{request.url.path}: {error.detail}").response()
    response.headers.update(error.headers or {})  # such as Allow
    return response


async def _invalid_query(request: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    _, *name = first["loc"]  # "query" comes first
    return ApiError(422, describe_setting({**first, "loc": name}), ".".join(name)).response()


async def _internal_error(request: Request, error: Exception) -> JSONResponse:
    return ApiError(500, INTERNAL_ERROR).response()


async def page(request: Request) -> Response:
    name, media_type = PAGE_FILES[request.scope["path"]]
    file = Path(__file__).parent / "page" / name
    return FileResponse(file, media_type=media_type, headers=PAGE_HEADERS)


for path in PAGE_FILES:
    router.add_api_route(path, page)


@router.get("/health")
async def health(request: Request) -> JSONResponse:
    scheduler = request.app.state.service.scheduler
    if not scheduler.alive:
        raise ApiError(503, STOPPED)
    if scheduler.draining:
        raise ApiError(503, SHUTTING_DOWN)
    return JSONResponse({"status": "ok"})


@router.get("/metrics")
async def prometheus(request: Request) -> Response:
    registry = request.app.state.service.metrics.registry
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/models")
async def models(request: Request) -> JSONResponse:
    return JSONResponse({"object": "list", "data": [request.app.state.service.description()]})


@router.get("/v1/models/{name:path}")
async def model_by_name(request: Request, name: str) -> JSONResponse:
    service: Service = request.app.state.service
    service.check_model(name)
    return JSONResponse(service.description())


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    service: Service = request.app.state.service
    body = parse_request(await request.body())
    if body.model is not None:
        service.check_model(body.model)
    choices = len(body.prompt) * body.n
    if choices > service.max_choices:
        raise ApiError(
            400,
            f"{choices} choices (prompts times n) are more than {service.max_choices}; send fewer "
            "prompts at a time, or a smaller n",
            "n",
        )
    encoding = body, service.served.tokenizer
    if sum(map(len, body.prompt)) < LONG_PROMPTS:
        prompts = encode_prompts(*encoding)
    else:
        prompts = await asyncio.to_thread(encode_prompts, *encoding)
    tokens = choices * body.max_tokens
    if body.scores_prompt:
        tokens += body.n * sum(len(prompt.tokens) for prompt in prompts)
    if tokens > service.max_tokens:
        raise ApiError(
            400,
            f"{tokens:,} tokens in all choices are more than {service.max_tokens:,}; send a "
            "smaller max_tokens, or fewer prompts at a time",
            "max_tokens",
        )
    scheduler = service.scheduler
    try:
        return Completion(
            body, prompts, service.served, scheduler, service.dispatcher, service.metrics
        )
    except QueueFull:
        raise ApiError(
            429,
            f"all {service.slots} slots are in use and {scheduler.queued} sequences are queued; "
            "try again later",
            None,
            "rate_limit_exceeded",
        ) from None
    except Draining:
        raise ApiError(503, SHUTTING_DOWN) from None


@router.get("/api/card")
async def card(request: Request) -> JSONResponse:
    service: Service = request.app.state.service
    served = service.served
    return JSONResponse(
        {
            "name": served.name,
            "created": served.created,
            "parameters": served.parameters,
            "vocab_size": served.tokenizer.vocab_size,
            "tokenizer": type(served.tokenizer).__name__,
            "characters": served.characters,
            "examples": served.examples,
            "max_seq_len": served.max_seq_len,
            "precision": served.precision,
            "slots": service.slots,
            "settings": served.settings,
            "progress": {
                name: _finite(value) if isinstance(value, float) else value
                for name, value in served.progress.items()
            },
        }
    )


@router.get("/api/curve")
def curve(request: Request, after: int = -1) -> JSONResponse:
    """The training's metrics of later steps than `after`, and the step that is served."""
    served = request.app.state.service.served
    file = served.run_dir / "metrics.jsonl"
    points = [
        {name: _finite(line.get(name)) for name in CURVE_FIELDS}
        for line in read_metrics(file, after)
    ]
    stride = math.ceil(len(points) / CURVE_POINTS) or 1
    last = len(points) - 1
    kept = [
        point
        for i, point in enumerate(points)
        if i % stride == 0 or i == last or point["val_loss"] is not None
    ]
    last_step = points[-1]["step"] if points else after
    return JSONResponse({"points": kept, "last_step": last_step, "served_step": served.step})


def _finite(value: Any) -> Any:
    """Numbers as they are, None for everything that JSON cannot write."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None
