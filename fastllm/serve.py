"""A trained model behind OpenAI's HTTP interface: `python -m fastllm.serve --checkpoint DIR`."""

import errno
import importlib
import os
import re
import signal
import socket
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from fastllm.command import CommandSettings, errors_in_one_line, log, parse_settings
from fastllm.device import Device, Precision, check_quantize, choose_device, choose_precision
from fastllm.threads import set_threads
from fastllm.training.checkpoint import (
    CheckpointError,
    find_checkpoint,
    load_model,
    read_progress,
)

if TYPE_CHECKING:
    from fastapi import FastAPI

    from fastllm.serving.api import Served
    from fastllm.serving.guard import Limits


# Of two cores, a model of 0.8 million parameters was measured to leave one to its requests with
# profit, and one of 3 million to need both.
FEW_PARAMETERS = 2_000_000


class ServeConfig(CommandSettings):
    """Answer OpenAI's /v1/completions with a trained model."""

    checkpoint: Path
    """Folder of a run, or a checkpoint in it."""
    host: str = "127.0.0.1"
    """Address to listen on; any but this computer's own needs an API key."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes a free one."""
    api_key: str | None = None
    """What requests must bring as Authorization: Bearer KEY; the variable FASTLLM_API_KEY unless
    given. Other users of this computer see flags, but not variables."""
    max_active: Annotated[int, Field(ge=1, le=4096)] = 16
    """Sequences that are computed at the same time; each takes memory for its keys and values."""
    max_queue: Annotated[int, Field(ge=0, le=2**20)] = 64
    """Sequences that may wait for a place; further ones are refused with 429."""
    drain_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 30
    """After SIGTERM or Ctrl-C, what runs has so long to come to its end."""
    precision: Precision = "fp32"
    """What matrix products round their operands to; auto takes bf16 on CPUs that have it."""
    device: Device = "cpu"
    """Where to compute; the CPU serves where there is no CUDA."""
    quantize: Literal["int8"] | None = None
    """Round the weights to 8 bits: a quarter of the memory to be read for each token."""
    threads: Annotated[int, Field(ge=0, le=4096)] = 0
    """CPU threads that compute; 0 for OMP_NUM_THREADS, or the physical cores that this process may
    use, and for a model of less than 2 million parameters one: the others are for its requests."""

    @model_validator(mode="after")
    def _check_together(self) -> "ServeConfig":
        check_quantize(self.quantize, self.precision)
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("api_key is empty: leave it out, or give one")
        return self


def main(arguments: list[str]) -> None:
    config = parse_settings(ServeConfig, arguments)
    # A key from a file may end with the line's end, which no header can have.
    api_key = (config.api_key or os.environ.get("FASTLLM_API_KEY", "")).strip() or None
    set_threads(config.threads)
    # The thread that computes asks for the interpreter after every step; it need not wait for the
    # other's 5 ms, in which a small model makes many.
    sys.setswitchinterval(0.0005)
    with errors_in_one_line(CheckpointError, OSError, KeyError, ValueError, ImportError):
        if api_key and not re.fullmatch("[!-~]+", api_key):
            raise ValueError("an API key has letters, digits and signs of ASCII, without spaces")
        check_packages()
        # Before the model is read, which may take its time.
        listener = listen(config.host, config.port, api_key)
        raise SystemExit(run(config, listener, api_key))


def check_packages() -> None:
    """Raises an `ImportError` that names what to install."""
    try:
        for name in ("fastapi", "uvicorn", "prometheus_client"):
            importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"serving needs the package {error.name}: pip install 'fastllm[serve]'"
        ) from error


def listen(host: str, port: int, api_key: str | None) -> socket.socket:
    """A socket that listens; who comes before the server is ready waits.

    Raises:
        ValueError: others could reach it, and there is no API key.
        OSError: the address is not this computer's, or the port is in use.
    """
    from fastllm.serving.guard import is_loopback

    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise OSError(f"there is no host '{host}': {error.strerror}") from None
    if api_key is None and not is_loopback(str(address[0])):
        raise ValueError(
            f"{host} can be reached by others: give an --api_key (or FASTLLM_API_KEY), or listen "
            "on 127.0.0.1"
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


def load(config: ServeConfig) -> "Served":
    """The model and what is known of it, from the checkpoint."""
    from fastllm.serving.api import Served

    checkpoint = find_checkpoint(config.checkpoint)
    model, tokenizer, settings = load_model(checkpoint)
    model.eval()
    device = choose_device(config.device)
    model.to(device)
    precision = config.quantize or choose_precision(config.precision, model.hidden_size, device)
    progress = read_progress(checkpoint)
    run_dir = checkpoint.resolve()
    if run_dir.parent.name == "checkpoints":
        run_dir = run_dir.parent.parent
    return Served(
        run_dir.name,
        model,
        tokenizer,
        settings,
        precision,
        run_dir,
        {} if progress is None else asdict(progress),
        int((checkpoint / "model.safetensors").stat().st_mtime),
    )


def run(config: ServeConfig, listener: socket.socket, api_key: str | None) -> int:
    """Serves until a signal has it end; gives the exit status."""
    from fastllm.serving.api import create_app
    from fastllm.serving.guard import Limits

    served = load(config)
    parameters = sum(parameter.numel() for parameter in served.model.parameters())
    if parameters < FEW_PARAMETERS and not (config.threads or os.environ.get("OMP_NUM_THREADS")):
        set_threads(1)
    limits = Limits()
    app = create_app(served, config.max_active, config.max_queue, api_key, limits)
    server = make_server(app, limits, config.drain_seconds)
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    log(f"serving {served.name} ({parameters:,} parameters) on http://{host}:{port}")
    try:
        server.run(sockets=[listener])
        return 1 if server.failed else 0
    finally:
        app.state.scheduler.close()


def make_server(app: "FastAPI", limits: "Limits", drain_seconds: float) -> Any:
    """A server that ends when it is told to, by a signal or `drain`, and what runs is done."""
    import uvicorn

    from fastllm.serving.guard import connection_class

    scheduler = app.state.scheduler

    class Server(uvicorn.Server):
        drain_until: float | None = None  # a time of time.monotonic()
        failed = False

        def drain(self) -> None:
            self.drain_until = time.monotonic() + drain_seconds

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.drain_until is None:
                self.drain()
            elif sig == signal.SIGINT:
                os._exit(128 + sig)

        async def on_tick(self, counter: int) -> bool:
            if self.drain_until is not None and not scheduler.draining:
                # Not in the signal handler, which may interrupt a holder of the scheduler's lock.
                scheduler.drain()
                left = scheduler.running + scheduler.waiting
                log(f"stopping when what runs is done ({left} sequences); Ctrl-C stops at once")
            late = self.drain_until is not None and time.monotonic() > self.drain_until
            # A request is a task until its answer is written.
            done = scheduler.draining and not self.server_state.tasks
            self.failed = not scheduler.alive
            self.should_exit = self.should_exit or late or done or self.failed
            if self.should_exit:
                scheduler.close()  # who still waits is told so
            return await super().on_tick(counter)

    return Server(
        uvicorn.Config(
            app,
            http=connection_class(limits),
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=20,  # longer than clients keep a connection that they do not use
            timeout_graceful_shutdown=2,
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
