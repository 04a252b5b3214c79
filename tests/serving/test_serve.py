import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

openai = pytest.importorskip("openai", reason="pip install '.[test]' brings the client")

from fastllm.command import no_log  # noqa: E402
from fastllm.generation.text_stream import generate_text  # noqa: E402
from fastllm.serve import main  # noqa: E402
from fastllm.serving.server import listen  # noqa: E402
from fastllm.training.checkpoint import (  # noqa: E402
    Progress,
    find_checkpoint,
    load_model,
    save_checkpoint,
)
from fastllm.training.run import prepare, resolve  # noqa: E402
from tests.conftest import WORDS, make_config  # noqa: E402
from tests.serving.conftest import wait_until  # noqa: E402


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    text = folder / "text.txt"
    text.write_text(WORDS * 60)
    flags = "--max_steps 2 --max_seq_len 400 --val_fraction 0".split()
    run = resolve(make_config(folder / "book", text, *flags), folder / "book")
    trainer = prepare(run, no_log)
    trainer.train()
    return trainer.run_dir


@contextmanager
def serving(run_dir: Path, *flags: str) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """The address of a server with the key "secret", and its process."""
    command = [sys.executable, "-m", "fastllm.serve", "--checkpoint", str(run_dir), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--threads", "1", *flags],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "FASTLLM_API_KEY": "secret"},
    )  # fmt: skip
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("serving book ("), line
        yield line.split()[-1], process
    finally:
        process.kill()
        process.wait()


@pytest.mark.subprocess
def test_a_process_serves_and_finishes_its_requests_after_sigterm(run_dir: Path) -> None:
    with serving(run_dir, "--drain-seconds", "60") as (url, process):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
        card = client.get(f"{url}/api/card", cast_to=object)
        assert card["progress"]["step"] == 2 and card["settings"]["max_seq_len"] == 400
        assert len(client.get(f"{url}/api/curve", cast_to=object)["points"]) == 2
        long = {"model": "book", "prompt": "the", "max_tokens": 397, "seed": 1}
        expected = client.completions.create(**long).choices[0].text
        texts: dict[int, str] = {}
        started = threading.Barrier(5)

        def read(i: int) -> None:
            stream = client.completions.create(**long, stream=True, logprobs=5)
            first = next(stream).choices[0].text
            started.wait(60)
            texts[i] = first + "".join(chunk.choices[0].text for chunk in stream)

        readers = [threading.Thread(target=read, args=(i,)) for i in range(4)]
        for reader in readers:
            reader.start()
        started.wait(60)
        process.send_signal(signal.SIGTERM)
        for reader in readers:
            reader.join(60)
        assert texts == dict.fromkeys(range(4), expected)
        assert process.wait(60) == 0
        assert process.stderr is not None
        assert "stopping after the remaining sequences" in process.stderr.read()


@pytest.mark.subprocess
def test_a_process_serves_a_checkpoint_that_is_saved_later(run_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "book"
    shutil.copytree(run_dir, run, symlinks=True)
    model, tokenizer, config = load_model(find_checkpoint(run))
    with serving(run) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
        save_checkpoint(run, config, tokenizer, model, [], Progress(step=9))

        def step() -> int:
            return client.get(f"{url}/api/card", cast_to=object)["progress"]["step"]

        wait_until(lambda: step() == 9)
        answer = client.completions.create(model="book", prompt="the", max_tokens=1)
        assert answer.system_fingerprint == "step-9"


@pytest.mark.slow
def test_a_minute_of_64_streams(run_dir: Path) -> None:
    """Three of ten disconnect midway, the others get what they would alone, and memory stays."""
    model, tokenizer, _ = load_model(find_checkpoint(run_dir))
    source = random.Random(3)
    plans: list[dict[str, Any]] = [
        {
            "prompt": "".join(source.choices("the ", k=source.choice([1, 5, 100]))),
            "seed": source.randrange(2**31),
            "temperature": source.choice([0, 0.8, 1.2]),
        }
        for _ in range(60)
    ]
    sizes = [source.randint(1, 150) for _ in plans]
    expected = [
        "".join(generate_text(model.eval(), tokenizer, **plan, max_new_tokens=size))
        for plan, size in zip(plans, sizes, strict=True)
    ]
    done = disconnected = 0
    before = 0

    async def keep_on(client: Any, end: float) -> None:
        nonlocal done, disconnected
        while time.monotonic() < end:
            i = source.randrange(len(plans))
            until = source.randrange(sizes[i]) if source.random() < 0.3 else sizes[i]
            stream = await client.completions.create(
                model="book", stream=True, max_tokens=sizes[i], **plans[i]
            )
            text = ""
            async for chunk in stream:
                text += chunk.choices[0].text
                if len(text) > until:
                    await stream.close()
                    break
            disconnected += len(text) > until
            assert text == expected[i] or (until < sizes[i] and expected[i].startswith(text))
            done += 1

    async def all_of_them(url: str, process: psutil.Process) -> None:
        nonlocal before
        end = time.monotonic() + 60
        async with openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="secret", max_retries=0
        ) as client:
            streams = asyncio.gather(*(keep_on(client, end) for _ in range(64)))
            await asyncio.wait([streams], timeout=10)
            before = process.memory_info().rss
            await streams

    with serving(run_dir, "--max_active", "64") as (url, started):
        process = psutil.Process(started.pid)
        asyncio.run(all_of_them(url, process))
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret")
        metrics = client.get(f"{url}/metrics", cast_to=str)
        grown = process.memory_info().rss - before
        started.send_signal(signal.SIGTERM)
        assert started.wait(60) == 0
    assert done > 300 and disconnected > 30
    assert "fastllm_active 0.0" in metrics and "fastllm_queued 0.0" in metrics
    assert grown < 8 * 2**20, f"{done} requests, {grown} bytes"


def error_of(*flags: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(flags))
    return str(caught.value)


def test_errors_are_one_clear_line(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FASTLLM_API_KEY", raising=False)
    flags = ("--checkpoint", str(run_dir), "--port", "0")
    assert error_of("--checkpoint", str(tmp_path), "--port", "0") == (
        f"error: {tmp_path} holds no checkpoint: neither checkpoints/step-* nor model.safetensors"
    )
    with listen("127.0.0.1", 0, None) as taken:
        port = str(taken.getsockname()[1])
        assert error_of(*flags[:2], "--port", port) == (
            f"error: cannot listen on 127.0.0.1, port {port}: Address already in use; "
            "choose another --port"
        )
    for host in ("0.0.0.0", "::"):
        message = error_of(*flags, "--host", host)
        assert "set an --api_key" in message, message
    assert "unknown host 'no.such.host.invalid'" in error_of(
        *flags, "--host", "no.such.host.invalid"
    )
    for blank in ("", " "):
        assert "api_key is empty" in error_of(*flags, "--api_key", blank)
    for unsendable in ("sécret", "two words"):
        assert "characters without spaces" in error_of(*flags, "--api_key", unsendable)
    nowhere = ("--host", "203.0.113.9", "--api_key", "secret")
    assert "choose another --host" in error_of(*flags, *nowhere)
    assert "exclude each other" in error_of(*flags, "--quantize", "int8", "--precision", "bf16")
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    assert error_of(*flags) == (
        "error: serving needs the package prometheus_client: pip install '.[serve]'"
    )


def test_with_a_key_other_addresses_are_allowed() -> None:
    with listen("0.0.0.0", 0, "secret") as listener:
        assert listener.getsockname()[0] == "0.0.0.0"
