"""Small models to serve, and a server in a thread of the test process."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from fastapi import FastAPI

from fastllm import DecoderModel, SimpleCharacterTokenizer
from fastllm.generation.text_stream import Prompt, generate_text
from fastllm.serving.app import Service, create_app
from fastllm.serving.guard import Limits
from fastllm.serving.model import ServedModel
from fastllm.serving.scheduler import Scheduler
from fastllm.serving.server import Server, listen
from fastllm.tokenization import SubwordTokenizer, Tokenizer
from fastllm.training.config import TrainConfig

TEXT = "Grüße an 世界 and 🙂 the wonderful words of the world. " * 30


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """More would not speed up such small models, and several schedulers may run at a time."""
    torch.set_num_threads(1)


def make_model(tokenizer: Tokenizer, max_seq_len: int = 300) -> DecoderModel:
    torch.manual_seed(0)
    padding = tokenizer.pad_token_id
    model = DecoderModel(tokenizer.vocab_size, 32, 2, 2, max_seq_len, padding_idx=padding).eval()
    for parameter in model.parameters():  # the logits of an untrained model are nearly uniform
        parameter.data *= 3
    return model


@pytest.fixture(scope="session")
def characters() -> tuple[DecoderModel, Tokenizer]:
    tokenizer = SimpleCharacterTokenizer(["abcdefghij klmno"])
    return make_model(tokenizer), tokenizer


@pytest.fixture(scope="session")
def subwords() -> tuple[DecoderModel, Tokenizer]:
    """A model whose tokens are often parts of a character."""
    tokenizer = SubwordTokenizer.train([TEXT], "bpe", 300)
    return make_model(tokenizer), tokenizer


def prompt_of(*tokens: int) -> Prompt:
    """A prompt without text, after which offsets begin at 0."""
    return Prompt(list(tokens), "", "")


Model = tuple[DecoderModel, Tokenizer]


def alone(model: Model, prompt: str, max_tokens: int, seed: int, **sampling: Any) -> str:
    """The continuation without a server."""
    return "".join(generate_text(*model, prompt, max_tokens, seed=seed, **sampling))


class RunningServer(NamedTuple):
    url: str
    port: int
    service: Service

    @property
    def scheduler(self) -> Scheduler:
        return self.service.scheduler

    @property
    def served(self) -> ServedModel:
        return self.service.served


@contextmanager
def running_server(
    model: DecoderModel,
    tokenizer: Tokenizer,
    slots: int = 5,
    max_queue: int = 100,
    api_key: str | None = None,
    limits: Limits = Limits(),  # noqa: B008 - immutable
    run_dir: Path = Path("nowhere"),
) -> Iterator[RunningServer]:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    served = ServedModel(
        "tiny",
        tokenizer,
        TrainConfig().model_dump(mode="json"),
        "fp32",
        parameters,
        model.max_seq_len,
        run_dir,
        {"step": 7},
        123,
        ["ab cd"],
    )
    app = create_app(served, model, slots, max_queue, api_key, limits)
    with running_app(app, limits) as server:
        yield server


@contextmanager
def running_app(
    app: FastAPI,
    limits: Limits = Limits(),  # noqa: B008 - immutable
    renewal: Any = None,
) -> Iterator[RunningServer]:
    server = Server(app, limits, 0.5, renewal)
    listener = listen("127.0.0.1", 0, None)
    port = listener.getsockname()[1]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield RunningServer(f"http://127.0.0.1:{port}", port, app.state.service)
    finally:
        server.drain()
        thread.join()
    assert not server.failed


@pytest.fixture(scope="module")
def server(characters: Model) -> Iterator[RunningServer]:
    with running_server(*characters) as server:
        yield server


@contextmanager
def slowed(scheduler: Scheduler, seconds: float) -> Iterator[None]:
    """Delays every step."""
    decoding = scheduler._decoding  # which a newer checkpoint replaces
    append: Callable[..., Any] = decoding.append

    def slow(*arguments: Any, **keywords: Any) -> torch.Tensor:
        time.sleep(seconds)
        return append(*arguments, **keywords)

    decoding.append = slow  # type: ignore[method-assign]
    try:
        yield
    finally:
        decoding.append = append  # type: ignore[method-assign]


def wait_until(condition: Callable[[], Any], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.005)


def raw_exchange(port: int, data: bytes, seconds: float = 10) -> bytes:
    """Everything that the server sends, until it closes the connection or is silent this long."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        with contextlib.suppress(ConnectionError):  # it need not read everything
            connection.sendall(data)
        return received(connection)


def received(connection: socket.socket) -> bytes:
    answer = b""
    with contextlib.suppress(TimeoutError, ConnectionError):
        while part := connection.recv(65536):
            answer += part
    return answer
