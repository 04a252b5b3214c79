"""A trained model behind OpenAI's HTTP interface: `fastllm serve --checkpoint DIR`."""

from __future__ import annotations

import importlib
import os
import re
import socket
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, model_validator

from fastllm.command import command, errors_in_one_line, log, parse_settings
from fastllm.flags import CommandSettings, Device, Precision, Quantize, Threads, check_quantize

if TYPE_CHECKING:
    from fastllm.models.decoder import DecoderModel
    from fastllm.serving.model import ServedModel

# Models with fewer parameters compute on one thread and leave the other cores to the requests. On
# two cores, that was faster with 0.8 million parameters and slower with 3 million.
FEW_PARAMETERS = 2_000_000


class ServeConfig(CommandSettings):
    """Answer OpenAI's /v1/completions with a trained model."""

    examples: ClassVar = """
fastllm serve --checkpoint runs/book
FASTLLM_API_KEY=... fastllm serve --checkpoint runs/book --host 0.0.0.0
"""
    groups: ClassVar = {
        "Model": "checkpoint",
        "Server": "host port api_key max_active max_seq_len max_queue drain_seconds",
        "Machine": "threads device precision quantize",
    }

    checkpoint: Path
    """A run of train, whose newest checkpoint is served as soon as training has saved it, or one
    checkpoint in it; a run of finetune, a folder in Hugging Face's format, a name on its hub, or
    a GGUF file."""
    host: str = "127.0.0.1"
    """Address to listen on; all but loopback addresses require an API key."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 picks a free one."""
    api_key: str | None = None
    """Key that requests must send as Authorization: Bearer KEY; by default that of the environment
    variable FASTLLM_API_KEY. Other users of this computer can see flags, but not variables."""
    max_active: Annotated[int, Field(ge=1, le=4096)] = 16
    """Sequences computed at the same time; each takes memory for its keys and values."""
    max_seq_len: Annotated[int, Field(ge=2)] = 4096
    """Tokens of a sequence that the model sees, at most: each slot in use takes memory for them."""
    max_queue: Annotated[int, Field(ge=0, le=2**20)] = 64
    """Sequences that may wait for a slot; beyond that, requests receive 429."""
    drain_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 30
    """Seconds that running requests get to finish after SIGTERM or Ctrl-C."""
    precision: Precision = "fp32"
    """Precision of matrix products; auto uses bf16 on CPUs that support it."""
    device: Device = "cpu"
    """Where to compute; without CUDA, cuda falls back to the CPU."""
    quantize: Quantize | None = None
    """Round the weights to 8 or 4 bits: less memory to read for each token."""
    threads: Threads = 0
    """CPU threads that compute; 0 uses OMP_NUM_THREADS or the physical cores available to this
    process, but only one thread for models of less than 2 million parameters, which leaves the
    other cores to the requests."""

    @model_validator(mode="after")
    def _check_together(self) -> ServeConfig:
        check_quantize(self.quantize, self.precision)
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("--api_key is empty; leave it out, or give one")
        return self


@command
def main(arguments: list[str]) -> None:
    config = parse_settings(ServeConfig, arguments)
    # After the flags: help and their errors need not wait for PyTorch.
    from fastllm.threads import set_threads
    from fastllm.training.checkpoint import CheckpointError

    # A key from a file may end with a newline, which no header can contain.
    api_key = (config.api_key or os.environ.get("FASTLLM_API_KEY", "")).strip() or None
    set_threads(config.threads)
    # The computing thread needs the interpreter after every step. By default, it would wait up to
    # 5 ms for the other thread, in which a small model computes many steps.
    sys.setswitchinterval(0.0005)
    with errors_in_one_line(CheckpointError, OSError, KeyError, ValueError, ImportError):
        if api_key and not re.fullmatch("[!-~]+", api_key):
            raise ValueError("an API key consists of printable ASCII characters without spaces")
        check_packages()
        from fastllm.serving.server import listen

        # Before the model is loaded, which may take a while.
        listener = listen(config.host, config.port, api_key)
        raise SystemExit(serve(config, listener, api_key))


def check_packages() -> None:
    """Raises an `ImportError` that says what to install."""
    try:
        for name in ("fastapi", "uvicorn", "prometheus_client"):
            importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"serving needs the package {error.name}: pip install '.[serve]'"
        ) from error


def serve(config: ServeConfig, listener: socket.socket, api_key: str | None) -> int:
    """Serves until a signal ends it; returns the exit status."""
    from fastllm.generation.defaults import describe_defaults
    from fastllm.integrations.any_model import load_trained_model
    from fastllm.serving.app import create_app
    from fastllm.serving.guard import Limits
    from fastllm.serving.model import prepare_served_model
    from fastllm.serving.renewal import keep_newest
    from fastllm.serving.server import Server
    from fastllm.threads import set_threads

    def load(source: Path) -> tuple[ServedModel, DecoderModel]:
        trained = load_trained_model(source)
        return prepare_served_model(
            trained, config.device, config.precision, config.quantize, config.max_seq_len
        )

    served, model = load(config.checkpoint)
    if decided := describe_defaults(served.tokenizer, served.sampling):
        log(decided)
    if served.max_seq_len < model.max_seq_len:
        log(
            f"a sequence has {served.max_seq_len:,} of the model's {model.max_seq_len:,} tokens, "
            "to save memory; --max_seq_len gives it more"
        )
    parameters = served.parameters
    if parameters < FEW_PARAMETERS and not (config.threads or os.environ.get("OMP_NUM_THREADS")):
        set_threads(1)
    limits = Limits()
    app = create_app(served, model, config.max_active, config.max_queue, api_key, limits)
    del model  # its weights are packed now; the server keeps no second copy
    renewal = partial(keep_newest, app.state.service, config.checkpoint, load)
    server = Server(app, limits, config.drain_seconds, renewal)
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    log(f"serving {served.name} ({parameters:,} parameters) on http://{host}:{port}")
    try:
        server.run(sockets=[listener])
        return 1 if server.failed else 0
    finally:
        app.state.service.scheduler.close()


if __name__ == "__main__":
    main(sys.argv[1:])
