"""Who may ask the server, how much, and how long it may take; and how that is refused."""

import asyncio
import hmac
import ipaddress
from typing import NamedTuple

from fastapi.responses import JSONResponse, Response
from prometheus_client import Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

RETRY_AFTER_S = "1"


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


async def respond(send: Send, response: Response) -> None:
    """Sends a whole response that asks nothing of the request."""
    await response({"type": "http"}, _nothing, send)


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


OPEN_PATHS = ("/", "/health")


class Guard:
    """Who may ask, and how much: what is decided before a request is looked at."""

    def __init__(self, app: ASGIApp, api_key: str | None, limits: Limits, answers: Counter) -> None:
        self._app, self._limits, self._answers = app, limits, answers
        self._api_key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start" and scope["path"] == "/v1/completions":
                self._answers.labels(message["status"]).inc()
            await send(message)

        try:
            self._check_headers(scope)
            body = await asyncio.wait_for(self._read(receive), self._limits.body_s)
        except asyncio.TimeoutError:
            error = ApiError(408, f"the body did not come within {self._limits.body_s:g} s")
            await respond(counting, error.response())
            return
        except ApiError as error:
            await respond(counting, error.response())
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
