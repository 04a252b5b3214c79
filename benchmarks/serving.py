"""A server under load: tokens per second, time to the first token, memory.

    python benchmarks/serving.py C E

Each line of the table starts a server process. Its clients stream one completion after another for
some seconds, with prompts of a quarter of the window and sampled tokens for half of it. For
comparison, `generate_batch` and transformers' `generate` (a fixed batch in this process, with its
cache, in fp32) continue as many prompts at once. In the last line for a configuration, three of ten
clients disconnect midway, and the server's memory before and after is printed.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from fastllm import SimpleCharacterTokenizer
from fastllm.benchmarking.shapes import CONFIGS, Letter, StepShape
from fastllm.generation.decoding import generate_batch
from fastllm.models.decoder import DecoderModel
from fastllm.ops.sampling import Sampling
from fastllm.threads import set_threads
from fastllm.tokenization import Tokenizer
from fastllm.training.checkpoint import Progress, save_checkpoint
from fastllm.training.config import TrainConfig

FLAGS = {
    "fp32": [],
    "bf16": ["--precision", "bf16"],
    "int8": ["--quantize", "int8"],
}
SAMPLING = Sampling(0.8)


def make_run(letter: Letter, folder: Path) -> tuple[DecoderModel, Tokenizer]:
    """An untrained model of a configuration, as a run that can be served."""
    c = CONFIGS[letter]
    config = TrainConfig(
        hidden_size=c.H, num_layers=c.L, num_heads=c.N, max_seq_len=c.S, dropout=0, seed=0
    )
    # One character per token, above the surrogates, so that the tokenizer costs little.
    tokenizer = SimpleCharacterTokenizer(["".join(chr(0x10000 + i) for i in range(c.V - 1))])
    torch.manual_seed(0)
    model = config.build_model(tokenizer.vocab_size, tokenizer.pad_token_id).eval()
    save_checkpoint(folder, config, tokenizer, model, [], Progress())
    return model, tokenizer


@contextmanager
def serving(folder: Path, *flags: str) -> Iterator[tuple[str, psutil.Process]]:
    """The address of a server process, and the process."""
    command = [sys.executable, "-m", "fastllm.serve", "--checkpoint", str(folder), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--max_active", "64", "--drain_seconds", "1", *flags],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("serving "), line
        yield line.split()[-1], psutil.Process(process.pid)
    finally:
        process.terminate()
        assert process.wait(30) == 0


class Client:
    """Streams completions without a client library, which would take cores from the server."""

    def __init__(self, url: str, c: StepShape, seed: int) -> None:
        self.host, _, port = url.removeprefix("http://").partition(":")
        self.port, self.c, self.random = int(port), c, random.Random(seed)
        self.tokens = 0
        self.firsts: list[float] = []

    async def complete(self, disconnect: bool = False) -> None:
        c = self.c
        body = json.dumps(
            {
                "prompt": [self.random.randrange(c.V - 1) for _ in range(c.S // 4)],
                "max_tokens": c.S // 2,
                "temperature": SAMPLING.temperature,
                "seed": self.random.randrange(2**31),
                "stream": True,
            }
        )
        start = time.perf_counter()
        reader, writer = await asyncio.open_connection(self.host, self.port)
        writer.write(
            f"POST /v1/completions HTTP/1.1\r\nhost: {self.host}\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()
        )
        status = await reader.readline()
        assert b" 200 " in status, status
        limit = self.random.randrange(1, c.S // 2) if disconnect else c.S
        got = 0
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                if not got:
                    self.firsts.append(time.perf_counter() - start)
                new = len(json.loads(line[6:])["choices"][0]["text"])
                got += new
                self.tokens += new
                if got >= limit:
                    break
        writer.close()
        assert disconnect or got == c.S // 2, got


async def load(
    url: str, c: StepShape, streams: int, seconds: float, disconnecting: bool = False
) -> tuple[float, list[float]]:
    """Total tokens per second, and seconds to the first token of each completion."""
    clients = [Client(url, c, seed) for seed in range(streams)]
    await asyncio.gather(*(client.complete() for client in clients))  # warms up
    for client in clients:
        client.tokens, client.firsts = 0, []
    start = time.perf_counter()
    end = start + seconds

    async def repeat(client: Client) -> None:
        while time.perf_counter() < end:
            await client.complete(disconnecting and client.random.random() < 0.3)

    await asyncio.gather(*map(repeat, clients))
    elapsed = time.perf_counter() - start
    return sum(client.tokens for client in clients) / elapsed, [
        first for client in clients for first in client.firsts
    ]


def generate_speed(model: DecoderModel, c: StepShape, batch: int, precision: str) -> float:
    """Tokens per second of a fixed batch in this process, including the prompts."""
    prompts = torch.randint(c.V - 1, (batch, c.S // 4)).tolist()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in generate_batch(model, prompts, c.S // 2, SAMPLING, precision=precision):
            pass
        times.append(time.perf_counter() - start)
    return batch * (c.S // 2) / median(times)


def transformers_speed(c: StepShape, batch: int) -> float:
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    config = GPT2Config(
        vocab_size=c.V, n_positions=c.S, n_embd=c.H, n_layer=c.L, n_head=c.N,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    times = []
    for _ in range(3):
        prompts = torch.randint(c.V, (batch, c.S // 4))
        start = time.perf_counter()
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=c.S // 2,
            do_sample=True,
            temperature=SAMPLING.temperature,
            top_k=0,
            pad_token_id=0,
        )
        times.append(time.perf_counter() - start)
    return batch * (c.S // 2) / median(times)


def report(
    letter: str, name: str, streams: int, speed: float, firsts: Sequence[float] = ()
) -> None:
    ordered = [1000 * first for first in sorted(firsts)]
    last = f"{median(ordered):10,.1f}{ordered[int(0.95 * len(ordered))]:10,.1f}" if firsts else ""
    print(f"{letter:6}{streams:8}  {name:20}{speed:12,.0f}{last}", flush=True)


def measure(letter: Letter, args: Any) -> None:
    c = CONFIGS[letter]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        model, _ = make_run(letter, folder)
        for streams in args.streams:
            for precision in args.precisions:
                with serving(folder, *FLAGS[precision]) as (url, _):
                    speed, firsts = asyncio.run(load(url, c, streams, args.seconds))
                report(letter, f"served {precision}", streams, speed, firsts)
                speed = generate_speed(model, c, streams, precision)
                report(letter, f"generate {precision}", streams, speed)
            report(letter, "transformers fp32", streams, transformers_speed(c, streams))
        with serving(folder) as (url, process):
            streams = args.streams[-1]
            asyncio.run(load(url, c, streams, 1, True))
            before = process.memory_info().rss / 2**20
            speed, firsts = asyncio.run(load(url, c, streams, args.load_seconds, True))
            after = process.memory_info().rss / 2**20
        report(letter, "disconnecting", streams, speed, firsts)
        print(f"memory before and after: {before:,.0f}, {after:,.0f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("letters", nargs="*", default=["C", "E"], metavar="CONFIG")
    parser.add_argument("--seconds", type=float, default=10, help="of each line")
    parser.add_argument("--load_seconds", type=float, default=60, help="of the last line")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16, 64], help="clients")
    parser.add_argument("--precisions", nargs="+", default=list(FLAGS), choices=FLAGS)
    args = parser.parse_args()
    threads = set_threads()
    print(f"{threads} threads (the server chooses its own); ms to the first token: median, 95 %")
    print(f"config streams  {'':20}{'tokens/s':>12}{'first':>10}{'95 %':>10}")
    for letter in args.letters:
        measure(letter, args)


if __name__ == "__main__":
    main()
