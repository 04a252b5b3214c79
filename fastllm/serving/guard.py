"""Authentication, size limits and timeouts: what happens before a request is parsed."""

import asyncio
import hmac
import ipaddress
from collections.abc import Collection
from typing import NamedTuple

from prometheus_client import Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastllm.serving.errors import ApiError, respond


class Limits(NamedTuple):
    """How much a client may ask for, and how long it may take."""

    body_bytes: int = 2**20
    choices: int = 128  # prompts times n
    tokens: int = 2**17
    """Of all choices together: new ones, and those of prompts whose log probabilities it wants."""
    connections: int = 256
    head_s: float = 10
    """To send a request's headers, from the start of the connection or the request."""
    body_s: float = 10
    """To send the body, from the end of the headers."""
    write_s: float = 30
    """To read what was written."""


class Guard:
    """Middleware that authenticates requests, limits their bodies and counts completions.

    Args:
        open_paths: what needs no API key.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None,
        open_paths: Collection[str],
        limits: Limits,
        requests: Counter,
    ) -> None:
        self._app, self._limits, self._requests = app, limits, requests
        self._open_paths = open_paths
        self._api_key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_and_count(message: Message) -> None:
            if message["type"] == "http.response.start" and scope["path"] == "/v1/completions":
                self._requests.labels(message["status"]).inc()
            await send(message)

        try:
            self._check_headers(scope)
            body = await asyncio.wait_for(self._read_body(receive), self._limits.body_s)
        except asyncio.TimeoutError:
            error = ApiError(408, f"the body did not arrive within {self._limits.body_s:g} s")
            await respond(send_and_count, error.response())
            return
        except ApiError as error:
            await respond(send_and_count, error.response())
            return
        if body is None:
            return
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, replay, send_and_count)

    def _check_headers(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if self._api_key is None:
            # DNS rebinding: a website may point its own name here to read the responses.
            host = headers.get(b"host", b"localhost").decode("latin-1")
            if not is_loopback(host_name(host)):
                raise ApiError(403, f"host {host!r} is not this computer; set an API key")
        elif scope["path"] not in self._open_paths:
            kind, _, key = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._api_key):
                raise ApiError(
                    401,
                    "this server requires an API key: Authorization: Bearer KEY",
                    None,
                    "invalid_api_key",
                )
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip()
        if scope["method"] == "POST" and kind.lower() != b"application/json":
            # Browsers send other types, or none, from any website without a CORS preflight.
            raise ApiError(415, "the body must be application/json")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._limits.body_bytes:
            raise self._too_large()

    async def _read_body(self, receive: Receive) -> bytes | None:
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
        return ApiError(413, f"the body is larger than {self._limits.body_bytes:,} bytes")


def host_name(host: str) -> str:
    """The name in a Host header, without port and brackets."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def is_loopback(name: str) -> bool:
    """Whether a name or an address can be reached from this computer only."""
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def connection_class(limits: Limits) -> type[H11Protocol]:
    """uvicorn's HTTP connections, closed when the client is too slow.

    uvicorn itself limits only the time between two requests, and any byte ends that.
    """

    class Connection(H11Protocol):
        _head_timer: asyncio.TimerHandle | None = None
        _write_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            # Writing pauses, and the timer starts, as soon as the client leaves anything unread.
            transport.set_write_buffer_limits(0)
            if len(self.connections) > limits.connections:
                transport.abort()
            self._head_timer = self.loop.call_later(limits.head_s, transport.abort)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                cancel(self._head_timer)
                self._head_timer = None
            elif self._head_timer is None:
                self._head_timer = self.loop.call_later(limits.head_s, self.transport.abort)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._write_timer = self.loop.call_later(limits.write_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            cancel(self._write_timer)

        def connection_lost(self, exc: Exception | None) -> None:
            cancel(self._head_timer)
            cancel(self._write_timer)
            super().connection_lost(exc)

    def cancel(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()

    return Connection
