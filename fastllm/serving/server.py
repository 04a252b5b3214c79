"""The listening socket, and a server that drains before it exits."""

import asyncio
import errno
import os
import signal
import socket
import time
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from fastllm.command import log
from fastllm.serving.guard import Limits, connection_class, is_loopback
from fastllm.serving.scheduler import Scheduler


def listen(host: str, port: int, api_key: str | None) -> socket.socket:
    """A listening socket; connections wait until the server is ready.

    Raises:
        ValueError: others could reach the server, and there is no API key.
        OSError: the address is not this computer's, or the port is in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise OSError(f"unknown host '{host}': {error.strerror}") from None
    if api_key is None and not is_loopback(str(address[0])):
        raise ValueError(
            f"others can reach {host}: set an --api_key (or FASTLLM_API_KEY), or listen on "
            "127.0.0.1"
        )
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        flag = "host" if error.errno == errno.EADDRNOTAVAIL else "port"
        raise OSError(
            f"cannot listen on {host}, port {port}: {error.strerror}; choose another --{flag}"
        ) from None
    return listener


class Server(uvicorn.Server):
    """Ends on a signal or after `drain`, as soon as the running requests have finished.

    Args:
        renewal: runs beside the requests; see `keep_newest`.

    Attributes:
        failed: whether it ended because its scheduler had stopped.
    """

    def __init__(
        self,
        app: FastAPI,
        limits: Limits,
        drain_seconds: float,
        renewal: Callable[[], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=connection_class(limits),
                ws="none",
                lifespan="off",
                loop="asyncio",
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=20,  # longer than clients keep idle connections
                timeout_graceful_shutdown=2,
            )
        )
        self._scheduler: Scheduler = app.state.service.scheduler
        self._drain_seconds = drain_seconds
        self._renewal = renewal
        self._drain_until: float | None = None  # in the time of time.monotonic()
        self.failed = False

    def drain(self) -> None:
        self._drain_until = time.monotonic() + self._drain_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._drain_until is None:
            self.drain()
        elif sig == signal.SIGINT:
            os._exit(128 + sig)

    async def main_loop(self) -> None:
        renewal = asyncio.create_task(self._renewal()) if self._renewal else None
        await super().main_loop()
        if renewal:
            renewal.cancel()

    async def on_tick(self, counter: int) -> bool:
        scheduler = self._scheduler
        if self._drain_until is not None and not scheduler.draining:
            # Not in the signal handler, which may interrupt a holder of the scheduler's lock.
            scheduler.drain()
            left = scheduler.running + scheduler.queued
            log(f"stopping after the remaining sequences ({left}); Ctrl-C stops at once")
        late = self._drain_until is not None and time.monotonic() > self._drain_until
        # A request is a task until its response is written.
        drained = scheduler.draining and not self.server_state.tasks
        self.failed = not scheduler.alive
        self.should_exit = self.should_exit or late or drained or self.failed
        if self.should_exit:
            scheduler.close()  # unfinished requests get an error
        return await super().on_tick(counter)
