import asyncio
import codecs
import contextlib
import json
import math
import random
import re
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

openai = pytest.importorskip("openai", reason="pip install '.[test]' brings the client")

from fastllm.generation.decoding import generate_tokens  # noqa: E402
from fastllm.generation.text_stream import UNFINISHED  # noqa: E402
from fastllm.serving.app import create_app  # noqa: E402
from fastllm.serving.guard import Limits  # noqa: E402
from fastllm.serving.model import ServedModel  # noqa: E402
from fastllm.tokenization import SubwordTokenizer  # noqa: E402
from tests.serving.conftest import (  # noqa: E402
    Model,
    RunningServer,
    alone,
    make_model,
    raw_exchange,
    received,
    running_server,
    slowed,
    wait_until,
)
from tests.tokenizer_kinds import TOKENIZERS, with_special_tokens  # noqa: E402

JSON = "content-type: application/json\r\n"


def client_of(server: RunningServer, api_key: str = "none") -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=api_key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Any:
    return client_of(server)


def posted(
    server: RunningServer, body: bytes | str, headers: str = JSON
) -> tuple[int, dict[str, Any]]:
    """Status and JSON body of the response to a completion request."""
    data = body.encode() if isinstance(body, str) else body
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{headers}"
    length = "" if "content-length" in headers else f"content-length: {len(data)}\r\n"
    answer = raw_exchange(server.port, f"{head}{length}\r\n".encode() + data)
    status, _, rest = answer.partition(b"\r\n")
    return int(status.split()[1]), json.loads(rest.partition(b"\r\n\r\n")[2])


def is_error(body: Any) -> bool:
    return set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}


# The client


def test_the_models(client: Any) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny" and client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="model 'gpt' not found; this server has 'tiny'"):
        client.models.retrieve("gpt")
    with pytest.raises(openai.NotFoundError, match="model 'gpt' not found"):
        client.completions.create(model="gpt", prompt="a")


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 0}, {"temperature": 0.8, "top_p": 0.9}],
    ids=["greedy", "sampled"],
)
def test_a_completion(client: Any, characters: Model, sampling: dict[str, float]) -> None:
    more = {"top_k": 9, "min_p": 0.01, "repetition_penalty": 1.1}
    settings = {"model": "tiny", "prompt": "abc", "max_tokens": 40, "seed": 5, **sampling}
    expected = alone(characters, "abc", 40, 5, **sampling, **more)
    answer = client.completions.create(**settings, extra_body=more)
    (choice,) = answer.choices
    assert choice.text == expected and choice.finish_reason == "length"
    assert choice.logprobs is None and answer.object == "text_completion"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 40)
    stream = client.completions.create(
        **settings, extra_body=more, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert last.choices == [] and last.usage.total_tokens == 43


def test_an_end_of_text_token_ends_a_completion(subwords: Model) -> None:
    """It is not shown, but counted; tokens before a prompt are counted and scored."""
    model, plain = subwords
    assert isinstance(plain, SubwordTokenizer)
    start = [9]
    tokens = list(generate_tokens(model, [*start, *plain.encode("the wor")], 40, temperature=0))
    end = next(i for i, token in enumerate(tokens) if i > 12 and token not in tokens[:i])
    expected = plain.decode(plain.encode("the wor") + tokens[:end]).removeprefix("the wor")
    tokenizer = with_special_tokens(plain, start, [tokens[end]])
    settings = {"model": "tiny", "prompt": "the wor", "temperature": 0, "max_tokens": 40}
    with running_server(model, tokenizer) as server:
        client = client_of(server)
        # The second stop text never comes; its beginning is held back until the end.
        for more in ({}, {"stop": [expected[-1] + "~~"]}, {"logprobs": 1}):
            answer = client.completions.create(**settings, **more)
            (choice,) = answer.choices
            assert (choice.text, choice.finish_reason) == (expected, "stop")
            assert answer.usage.prompt_tokens == 1 + len(plain.encode("the wor"))
            assert answer.usage.completion_tokens == end + 1
            *chunks, last = client.completions.create(
                **settings, **more, stream=True, stream_options={"include_usage": True}
            )
            assert "".join(chunk.choices[0].text for chunk in chunks) == expected
            assert [c.choices[0].finish_reason for c in chunks][-1] == "stop"
            assert last.usage == answer.usage
        assert len(choice.logprobs.tokens) == end
        echo = client.completions.create(**settings, logprobs=0, echo=True).choices[0]
        assert echo.text == "the wor" + expected
        assert echo.logprobs.tokens[0] == plain.decode(start)
        assert echo.logprobs.text_offset[:2] == [0, 0]
        ids = [*start, *plain.encode("the wor")]
        given = client.completions.create(**{**settings, "prompt": ids}, logprobs=0, echo=True)
        scores = given.choices[0].logprobs.token_logprobs
        assert echo.logprobs.token_logprobs == scores


def test_several_prompts_in_every_form(client: Any, characters: Model) -> None:
    a, b = (characters[1].encode(text) for text in ("ab", "cdef"))
    for prompt in (["ab", "cdef"], [a, b]):
        for stream in (False, True):
            answer = client.completions.create(
                model="tiny", prompt=prompt, n=2, max_tokens=9, seed=3, stream=stream
            )
            texts = [""] * 4
            for part in answer if stream else [answer]:
                for choice in part.choices:
                    texts[choice.index] += choice.text
            assert texts == [
                alone(characters, text, 9, 3 + i)
                for i, text in enumerate(["ab", "ab", "cdef", "cdef"])
            ]
    assert client.completions.create(
        model="tiny", prompt=a, max_tokens=9, temperature=0
    ).choices[0].text == alone(characters, "ab", 9, 0, temperature=0)  # fmt: skip


def test_echo_and_probabilities(client: Any) -> None:
    settings = {"model": "tiny", "prompt": "abcd", "temperature": 0, "logprobs": 2}
    plain = client.completions.create(**settings, max_tokens=5).choices[0]
    echo = client.completions.create(**settings, max_tokens=5, echo=True).choices[0]
    scored = client.completions.create(**settings, max_tokens=0, echo=True).choices[0]
    assert echo.text == "abcd" + plain.text and scored.text == "abcd"
    assert plain.logprobs.text_offset == [4, 5, 6, 7, 8]
    assert echo.logprobs.tokens == list(echo.text)
    assert echo.logprobs.text_offset == list(range(9))
    assert echo.logprobs.token_logprobs[0] is None and echo.logprobs.top_logprobs[0] is None
    assert echo.logprobs.token_logprobs[4:] == plain.logprobs.token_logprobs
    assert echo.logprobs.token_logprobs[:4] == scored.logprobs.token_logprobs
    assert scored.finish_reason == "length"
    for top, own in zip(plain.logprobs.top_logprobs, plain.logprobs.token_logprobs, strict=True):
        assert len(top) == 2 and max(top.values()) == own <= 0
    streamed = client.completions.create(**settings, max_tokens=5, echo=True, stream=True)
    parts = [chunk.choices[0] for chunk in streamed]
    assert "".join(part.text for part in parts) == echo.text
    tokens = [token for part in parts if part.logprobs for token in part.logprobs.tokens]
    assert tokens == echo.logprobs.tokens
    nothing = client.completions.create(model="tiny", prompt="ab", max_tokens=0)
    assert (nothing.choices[0].text, nothing.choices[0].finish_reason) == ("", "length")


def test_texts_may_be_longer_than_the_models_context(client: Any, characters: Model) -> None:
    for prompt, size in (("ab", 400), ("ab" * 200, 20)):
        settings = {"model": "tiny", "prompt": prompt, "max_tokens": size, "seed": 3}
        whole = client.completions.create(**settings)
        assert whole.choices[0].text == alone(characters, prompt, size, 3)
        assert whole.usage.completion_tokens == size
        assert whole.choices[0].finish_reason == "length"
        chunks = client.completions.create(**settings, stream=True, echo=True, logprobs=1)
        parts = [chunk.choices[0] for chunk in chunks]
        assert "".join(part.text for part in parts) == prompt + whole.choices[0].text
        scored = [each for part in parts if part.logprobs for each in part.logprobs.tokens]
        assert "".join(scored) == prompt + whole.choices[0].text


def test_stop_texts(client: Any, characters: Model) -> None:
    whole = alone(characters, "ab", 60, 5)
    stop = whole[20:22]
    expected = whole[: whole.index(stop)]
    for stops in (stop, [stop], ["zz", stop, "yy"]):
        settings = {"model": "tiny", "prompt": "ab", "max_tokens": 60, "seed": 5, "stop": stops}
        choice = client.completions.create(**settings).choices[0]
        assert (choice.text, choice.finish_reason) == (expected, "stop")
        parts = [chunk.choices[0] for chunk in client.completions.create(**settings, stream=True)]
        assert "".join(part.text for part in parts) == expected
        assert parts[-1].finish_reason == "stop"


def test_streams_never_split_a_character(subwords: Model) -> None:
    with running_server(*subwords) as server:
        client = client_of(server)
        for seed in range(4):
            settings = {"model": "tiny", "prompt": "世界", "max_tokens": 40, "seed": seed}
            with slowed(server.scheduler, 0.012):  # so that tokens arrive one by one
                parts = [
                    c.choices[0].text for c in client.completions.create(**settings, stream=True)
                ]
            whole = client.completions.create(**settings).choices[0].text
            assert "".join(parts) == whole == alone(subwords, "世界", 40, seed)
            assert len(parts) > 10


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"prompt": "abz"}, 400, "Character 'z' not found"),
        ({"prompt": ""}, 400, "the prompt is empty"),
        ({"prompt": [[1], []]}, 400, "the prompt is empty"),
        ({"prompt": [99]}, 400, "Token ID '99' not found"),
        ({"max_tokens": 2**17 + 1}, 400, "131,073 tokens in all choices are more than 131,072"),
        ({"n": 100, "max_tokens": 2000}, 400, "200,000 tokens in all choices"),
        (
            {"prompt": "ab" * 1000, "n": 100, "max_tokens": 0, "echo": True, "logprobs": 1},
            400,
            "200,000 tokens in all choices",
        ),
        ({"prompt": {"a": 1}}, 422, "must be a text, a list of texts"),
        ({"prompt": [True]}, 422, "must be a text, a list of texts"),
        ({"temperature": -1}, 422, r"^temperature: must be greater than or equal to 0 \(got -1\)$"),
        ({"temperature": "hot"}, 422, r"^temperature: must be a number \(got 'hot'\)$"),
        ({"top_p": 0}, 422, r"^top_p: must be greater than 0 \(got 0\)$"),
        ({"max_tokens": "5"}, 422, r"^max_tokens: must be a whole number \(got '5'\)$"),
        ({"stop": list("abcde")}, 422, r"^stop: must have at most 4 values \(got \['a', 'b', 'c'"),
        (
            {"stop": ["", 3]},
            422,
            "^stop.0: must not be empty .*; stop.1: must be a text",
        ),
        ({"stop": 5}, 422, r"^stop: must be a list \(got 5\)$"),
        ({"logprobs": 21}, 422, r"^logprobs: must be less than or equal to 20 \(got 21\)$"),
        ({"stream": "yes"}, 422, r"^stream: must be true or false \(got 'yes'\)$"),
        ({"stream_options": {"x": 3}}, 422, "^stream_options.x: there is no such setting"),
        ({"n": 129}, 400, "129 choices"),
        ({"best_of": 3}, 422, "best_of is not supported"),
        ({"suffix": "x"}, 422, "suffix: is not supported; leave it out"),
        ({"frequency_penalty": 1}, 422, "frequency_penalty: is not supported"),
        ({"logit_bias": {"1": 5}}, 422, "logit_bias: is not supported"),
        ({"unheard_of": 1}, 422, "unheard_of"),
        ({f"field{i}": 1 for i in range(99)}, 422, "102 fields are more than any request has"),
        ({"max_tokens": 10**4000}, 422, "max_tokens"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_errors_say_why(client: Any, change: dict[str, Any], status: int, message: str) -> None:
    body = {"prompt": "ab", "max_tokens": 5, **change}
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model="tiny", prompt="", extra_body=body)
    assert caught.value.status_code == status
    answer = caught.value.response.json()
    assert is_error(answer) and re.search(message, answer["error"]["message"])


def test_a_method_that_a_path_does_not_have(server: RunningServer) -> None:
    request = b"GET /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    head, _, body = raw_exchange(server.port, request).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 405") and b"allow: post" in head.lower()
    assert is_error(json.loads(body))


def test_null_means_the_default(client: Any) -> None:
    nulls = dict.fromkeys(["stop", "seed", "logprobs", "n", "temperature", "suffix", "top_k"])
    nulls |= {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "best_of": 1}
    answer = client.completions.create(model="tiny", prompt="ab", extra_body=nulls)
    assert answer.usage.completion_tokens == 16


def test_a_request_that_fails_gets_an_error_and_the_server_continues(characters: Model) -> None:
    tokenizer = characters[1]
    broken = make_model(tokenizer)
    broken.embedding_layer.token_embeddings.weight.data[tokenizer.encode("c")] = torch.nan
    with running_server(broken, tokenizer) as server:
        client = client_of(server)
        with pytest.raises(openai.InternalServerError, match="not numbers") as caught:
            client.completions.create(model="tiny", prompt=["ab", "c"], max_tokens=5)
        assert is_error(caught.value.response.json())
        with pytest.raises(openai.APIError, match="not numbers"):
            list(client.completions.create(model="tiny", prompt="c", stream=True))
        good = client.completions.create(model="tiny", prompt="ab", max_tokens=1, seed=5)
        assert good.choices[0].text == alone(characters, "ab", 1, 5)
        assert not server.scheduler.running and not server.scheduler.queued


# Card, curve and metrics


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_not_numbers_are_an_error(characters: Model, value: float) -> None:
    """In OpenAI's form, whole and streamed, for prompts and for continuations."""
    model = make_model(characters[1])
    model.lm_head.bias.data[2] = value
    with running_server(model, characters[1]) as server:
        for settings in ({}, {"echo": True}, {"echo": True, "max_tokens": 0}, {"logprobs": None}):
            body = {"prompt": "ab", "logprobs": 3, **settings}
            status, answer = posted(server, json.dumps(body))
            assert status == 500 and is_error(answer) and "not numbers" in str(answer)
            with pytest.raises(openai.APIError, match="not numbers"):
                for _ in client_of(server).completions.create(model="tiny", **body, stream=True):
                    pass


def test_a_body_may_begin_with_a_byte_order_mark(server: RunningServer) -> None:
    status, answer = posted(server, codecs.BOM_UTF8 + b'{"prompt": "ab", "max_tokens": 1}')
    assert status == 200 and answer["usage"]["total_tokens"] == 3


def test_card_curve_and_metrics(characters: Model, tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(f'{{"step": {i}, "loss": {9 - i}}}\n' for i in range(1, 4)))
    with running_server(*characters, run_dir=tmp_path) as server:
        client = client_of(server)

        def get(path: str) -> Any:
            return client.get(f"{server.url}{path}", cast_to=object)

        card = get("/api/card")
        assert card["parameters"] == sum(p.numel() for p in characters[0].parameters())
        assert card["settings"]["hidden_size"] == 64 and card["progress"] == {"step": 7}
        assert [point["loss"] for point in get("/api/curve")["points"]] == [8, 7, 6]
        with log.open("a") as file:  # a training in progress, in the middle of a line
            file.write('{"step": 4, "loss": 5, "val_loss": NaN}\n{"step": 5, "lo')
        curve = get("/api/curve?after=3")
        assert curve["last_step"] == 4
        assert [(p["step"], p["loss"], p["val_loss"]) for p in curve["points"]] == [(4, 5, None)]
        assert get("/api/curve?after=9") == {"points": [], "last_step": 9, "served_step": 7}
        server.served.progress.update(best_val_loss=math.nan)
        assert get("/api/card")["progress"] == {"step": 7, "best_val_loss": None}
        log.write_text("".join(f'{{"step": {i}, "loss": 1}}\n' for i in range(50_000)))
        points = get("/api/curve")["points"]
        assert len(points) <= 4001 and points[-1]["step"] == 49_999
        not_a_number = r"after: must be a whole number \(got 'x'\)"
        with pytest.raises(openai.UnprocessableEntityError, match=not_a_number):
            get("/api/curve?after=x")
        with pytest.raises(openai.NotFoundError):
            get("/nowhere")
        client.completions.create(model="tiny", prompt="abc", max_tokens=7)
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="tiny", prompt="Z", max_tokens=7)
        text = raw_exchange(
            server.port, b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
        ).decode()
        for line in (
            'fastllm_requests_total{status="200"} 1.0',
            'fastllm_requests_total{status="400"} 1.0',
            "fastllm_prompt_tokens_total 3.0",
            "fastllm_generated_tokens_total 7.0",
            "fastllm_active 0.0",
            "fastllm_queued 0.0",
            "fastllm_time_to_first_token_seconds_count 1.0",
        ):
            assert f"\n{line}\n" in text


# Load


def test_many_streams_and_clients_that_disconnect(server: RunningServer, characters: Model) -> None:
    """Twelve at a time, three of ten disconnect midway; the others get what they would alone."""
    source = random.Random(7)
    plans = [
        ("".join(source.choices("abcdefg ", k=source.choice([1, 5, 100]))), source.randint(1, 150))
        for _ in range(60)
    ]

    async def one(client: Any, seed: int, prompt: str, size: int, busy: asyncio.Semaphore) -> None:
        async with busy:
            stream = await client.completions.create(
                model="tiny", prompt=prompt, max_tokens=size, seed=seed, stream=seed % 3 > 0
            )
            if seed % 3 == 0:
                text = stream.choices[0].text
            else:
                text, until = "", size // 2 if seed % 10 < 3 else size
                async for chunk in stream:
                    text += chunk.choices[0].text
                    if len(text) > until:
                        await stream.close()
                        break
                if seed % 10 < 3:
                    assert alone(characters, prompt, size, seed).startswith(text)
                    return
            assert text == alone(characters, prompt, size, seed)

    async def all_of_them() -> None:
        busy = asyncio.Semaphore(12)
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0
        ) as client:
            await asyncio.gather(*(one(client, i, *plan, busy) for i, plan in enumerate(plans)))

    asyncio.run(all_of_them())
    wait_until(lambda: not server.scheduler.running and not server.scheduler.queued)


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_frees_the_slots_at_once(server: RunningServer, stream: bool) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 2000, "n": 7, "stream": stream})
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n{JSON}content-length: {len(body)}"
    with slowed(server.scheduler, 0.02):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(f"{head}\r\n\r\n{body}".encode())
            wait_until(lambda: server.scheduler.running == 5)
            assert server.scheduler.queued == 2
        wait_until(lambda: not server.scheduler.running, 15)  # all tokens would take 40 s
        assert not server.scheduler.queued


def test_requests_beyond_the_queue_are_refused_and_can_be_retried(characters: Model) -> None:
    with running_server(*characters, slots=1, max_queue=1) as server:
        client = client_of(server)
        with slowed(server.scheduler, 0.05):
            first = client.completions.create(
                model="tiny", prompt="a", n=2, max_tokens=200, stream=True
            )
            wait_until(lambda: server.scheduler.running and server.scheduler.queued)
            with pytest.raises(
                openai.RateLimitError, match="all 1 slots are in use and 1 sequences are queued"
            ) as caught:
                client.completions.create(model="tiny", prompt="a")
            assert caught.value.response.headers["retry-after"] == "1"
            assert is_error(caught.value.response.json())
            first.close()
        retrying = client.with_options(max_retries=3)
        assert retrying.completions.create(model="tiny", prompt="a").usage.completion_tokens == 16


# Limits


def test_the_key(characters: Model) -> None:
    with running_server(*characters, api_key="secret") as server:
        assert client_of(server, "secret").models.list().data[0].id == "tiny"
        for wrong in ("Secret", "secret2", "s", "ä"):
            status, body = posted(server, "{}", f"{JSON}authorization: Bearer {wrong}\r\n")
            assert status == 401 and is_error(body)
        status, body = posted(server, "{}", f"{JSON}authorization: Basic secret\r\n")
        assert status == 401 and "API key" in body["error"]["message"]
        page = {"/": 200, "/style.css": 200, "/script.js": 200}
        for path, expected in {**page, "/health": 200, "/metrics": 401, "/api/card": 401}.items():
            request = f"GET {path} HTTP/1.1\r\nhost: elsewhere\r\nconnection: close\r\n\r\n"
            assert int(raw_exchange(server.port, request.encode()).split()[1]) == expected


def test_other_websites_cannot_use_the_server_through_a_browser(server: RunningServer) -> None:
    for host in ("evil.example", "127.0.0.1.evil.example", "8.8.8.8:80"):
        request = f"GET /health HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n"
        assert raw_exchange(server.port, request.encode()).startswith(b"HTTP/1.1 403")
    for host in ("localhost:1", "127.0.0.1", "[::1]:8000"):
        request = f"GET /health HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n"
        assert raw_exchange(server.port, request.encode()).startswith(b"HTTP/1.1 200")
    for headers in ("content-type: text/plain\r\n", ""):
        status, body = posted(server, '{"prompt": "a"}', headers)
        assert status == 415 and is_error(body)


def test_bodies_that_are_too_large(server: RunningServer) -> None:
    body = b'{"prompt": "' + b"a" * 2**20 + b'"}'
    status, answer = posted(server, body)
    assert status == 413 and answer["error"]["message"] == "the body is larger than 1,048,576 bytes"
    chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    head = f"{JSON}transfer-encoding: chunked\r\n"
    request = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{head}\r\n"
    assert raw_exchange(server.port, request.encode() + chunk).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\nnonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\n" + b"a: b\r\n" * 100_000 + b"\r\n",
        b"GET /" + b"a" * 100_000,
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n"
        b"content-type: application/json\r\n\r\nzz\r\n",
        bytes(range(256)) * 10,
    ],
    ids=["text", "headers", "target", "length", "chunks", "bytes"],
)
def test_invalid_http_is_refused(server: RunningServer, data: bytes) -> None:
    answer = raw_exchange(server.port, data)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    assert client_of(server).models.list().data


def test_slow_and_silent_clients_are_disconnected(characters: Model) -> None:
    limits = Limits(head_s=0.3, body_s=0.4, write_s=0.5, connections=20)
    with running_server(*characters, limits=limits) as server:
        before = time.monotonic()
        assert raw_exchange(server.port, b"") == b""
        assert raw_exchange(server.port, b"GET / HTTP/1.1\r\nhost:") == b""
        assert 0.5 < time.monotonic() - before < 5
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
            # Byte by byte, after a valid request.
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
            with pytest.raises(OSError):
                for _ in range(100):
                    connection.sendall(b"G" if _ == 0 else b"E")
                    time.sleep(0.02)
        answer = posted(server, '{"prompt":', f"{JSON}content-length: 100\r\n")
        assert answer[0] == 408 and "within 0.4 s" in answer[1]["error"]["message"]

        # A client that reads nothing of a long response loses its slots and its connection.
        body = json.dumps({"prompt": ["a"] * 50, "max_tokens": 299, "logprobs": 15, "stream": True})
        head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n{JSON}"
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        with connection:
            connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
            wait_until(lambda: server.scheduler.running)
            wait_until(lambda: not server.scheduler.running and not server.scheduler.queued, 10)
            time.sleep(2 * limits.write_s)  # the computation may have taken less
            assert b"[DONE]" not in received(connection)

        connections = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(60)]
        time.sleep(0.6)  # all of them silent
        for each in connections:
            each.close()
        assert client_of(server).models.list().data


def random_value(source: random.Random) -> Any:
    return source.choice(
        [
            lambda: source.choice(
                [None, True, False, [], {}, "", "a", "é", "\U0001f600", "a" * 500]
            ),
            lambda: source.choice([0, 1, -1, 7, 2**31, 2**63, 2**64, -(2**63), 10**400]),
            lambda: source.choice([0.0, -0.0, 0.5, 1.0, 1e-50, 1e308, -1.5]),
            lambda: [random_value(source) for _ in range(source.randrange(4))],
            lambda: {source.choice("ab"): random_value(source) for _ in range(source.randrange(3))},
            lambda: [source.randrange(-2, 30) for _ in range(source.randrange(5))],
        ]
    )()


FIELDS = (
    "model prompt max_tokens temperature top_k top_p min_p repetition_penalty n stream logprobs "
    "stream_options echo stop seed user best_of suffix presence_penalty logit_bias new"
).split()


def random_body(source: random.Random) -> bytes:
    values: Any = {"prompt": "abc", "max_tokens": 2}
    for name in source.sample(FIELDS, source.randrange(5)):
        values[name] = random_value(source)
    body = json.dumps(source.choice([values] * 9 + [random_value(source)])).encode()
    if source.random() < 0.3:  # corrupted bytes
        at = source.randrange(len(body) + 1)
        noise = bytes(source.randrange(256) for _ in range(source.randrange(4)))
        body = body[:at] + noise + body[at + source.randrange(4) :]
    if source.random() < 0.02:
        body = source.choice([b"[" * 100_000, b'{"a":' * 50_000, b"", b"\xff", b"NaN", b"1e999"])
    return body


def test_a_thousand_random_requests(characters: Model) -> None:
    """Each gets a completion or an error with a reason, and the server continues."""
    model, tokenizer = characters
    served = ServedModel(
        "tiny", tokenizer, {}, "fp32", 1, model.max_seq_len, Path("nowhere"), {}, 1
    )
    app = create_app(served, model, 4, 200)
    source = random.Random(11)
    counts: dict[int, int] = {}

    async def ask(body: bytes) -> None:
        inbox = [{"type": "http.request", "body": body, "more_body": False}]
        sent: list[Any] = []

        async def receive() -> Any:
            if inbox:
                return inbox.pop()
            await asyncio.Event().wait()  # the client stays connected

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"",
            "headers": [(b"content-type", b"application/json")], "root_path": "",
            "scheme": "http", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
        }  # fmt: skip
        await asyncio.wait_for(app(scope, receive, send), 20)
        status, answer = sent[0]["status"], b"".join(m.get("body", b"") for m in sent[1:])
        counts[status] = counts.get(status, 0) + 1
        assert status in (200, 400, 404, 422), (status, body, answer)
        if status != 200:
            assert is_error(json.loads(answer)), answer
            assert len(answer) < 3000
            message = json.loads(answer)["error"]["message"]
            assert not re.search("should| a valid ", message), message
        elif answer.startswith(b"data: "):
            assert answer.endswith(b"data: [DONE]\n\n")
        else:
            assert json.loads(answer)["choices"]

    async def all_of_them() -> None:
        for _ in range(1000):
            await ask(random_body(source))

    try:
        asyncio.run(all_of_them())
        assert app.state.service.scheduler.alive and not app.state.service.scheduler.running
        assert all(counts[status] > 50 for status in (200, 400, 422)), counts
    finally:
        app.state.service.scheduler.close()


def test_draining_refuses_new_requests_and_finishes_running_ones(characters: Model) -> None:
    with running_server(*characters) as server, contextlib.ExitStack() as stack:
        client = client_of(server)
        stack.enter_context(slowed(server.scheduler, 0.02))
        stream = client.completions.create(model="tiny", prompt="a", max_tokens=60, stream=True)
        first = next(stream)
        server.scheduler.drain()
        for ask in (
            lambda: client.completions.create(model="tiny", prompt="a"),
            lambda: client.get(f"{server.url}/health", cast_to=object),
        ):
            with pytest.raises(openai.InternalServerError, match="shutting down") as caught:
                ask()
            assert caught.value.status_code == 503
            assert caught.value.response.headers["retry-after"] == "1"
        text = first.choices[0].text + "".join(chunk.choices[0].text for chunk in stream)
        assert len(text) == 60
    assert threading.active_count() < 20


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "byte_fallback"])
def test_prompt_and_text_join_to_what_all_tokens_decode_to(kind: str) -> None:
    """With echo and without, whole and streamed; the offsets say where each token's text is."""
    tokenizer = TOKENIZERS[kind]()
    model = make_model(tokenizer)
    with running_server(model, tokenizer) as server:
        client = client_of(server)
        for seed, prompt in enumerate(["Rome", "the se", "would ", "[What's] ☃", "a name?\n"]):
            tokens = tokenizer.encode(prompt)
            new = list(generate_tokens(model, tokens, 30, seed=seed))
            whole, read = tokenizer.decode(tokens + new), tokenizer.decode(tokens)
            for echo in (True, False):
                settings = {"prompt": prompt, "max_tokens": 30, "seed": seed, "logprobs": 3}
                settings |= {"model": "tiny", "echo": echo}
                choice = client.completions.create(**settings).choices[0]
                parts = [c.choices[0] for c in client.completions.create(**settings, stream=True)]
                assert "".join(part.text for part in parts) == choice.text
                text = choice.text if echo else prompt + choice.text
                if echo or whole.startswith(prompt):
                    assert text == whole
                else:
                    assert choice.text == whole[len(read) :]
                offsets = choice.logprobs.text_offset
                assert offsets == sorted(offsets) and len(offsets) == len(new) + echo * len(tokens)
                streamed = [part.logprobs for part in parts if part.logprobs]
                assert [offset for each in streamed for offset in each.text_offset] == offsets
                ends = [*offsets[1:], len(text)]
                for token, at, end in zip(choice.logprobs.tokens, offsets, ends, strict=True):
                    if UNFINISHED not in token:  # else only a part of a character
                        assert text[at:end] == token
