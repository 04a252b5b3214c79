"""Tokens per second of generation, against stock PyTorch and the limit set by memory bandwidth.

    python benchmarks/generation.py C E

All contestants take turns at continuing the same prompts with sampled tokens: *fastllm* at each
precision, *recompute*, which like nanoGPT recomputes the whole text for every token in stock
PyTorch, and *transformers* with its cache, in fp32 and in bf16 (`pip install transformers`). Tokens
per second exclude the first token. The limit is how often per second the weights can be read from
memory, times the batch size.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor

from fastllm.benchmarking.machine import measure_bandwidth
from fastllm.benchmarking.shapes import CONFIGS, Letter
from fastllm.benchmarking.steps import build_fastllm, build_stock
from fastllm.generation.decoding import generate_batch
from fastllm.models.decoder import DecoderModel
from fastllm.ops.sampling import Sampling
from fastllm.threads import set_threads

ROUNDS = 3
NEW_TOKENS = 40  # after the first, whose time includes the prompt and all preparation
BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
SAMPLING = Sampling(0.8)


def fastllm(model: DecoderModel, prompts: Tensor, precision: str, new_tokens: int) -> None:
    for _ in generate_batch(model, prompts.tolist(), new_tokens, SAMPLING, precision=precision):
        pass


@torch.no_grad()
def recompute(stock: torch.nn.Module, prompts: Tensor, new_tokens: int) -> None:
    ids = prompts
    for _ in range(new_tokens):
        x = stock.embedding(ids) * stock.scale + stock.positions[: ids.size(1)]
        logits = stock.head(stock.norm(stock.blocks(x))[:, -1])
        chosen = torch.multinomial((logits / SAMPLING.temperature).softmax(-1), 1)
        ids = torch.cat((ids, chosen), 1)


def transformers(letter: Letter, dtype: torch.dtype) -> Callable[[Tensor, int], None]:
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    c = CONFIGS[letter]
    config = GPT2Config(
        vocab_size=c.V,
        n_positions=c.S,
        n_embd=c.H,
        n_layer=c.L,
        n_head=c.N,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config).eval().to(dtype)

    def run(prompts: Tensor, new_tokens: int) -> None:
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new_tokens,
            do_sample=True,
            temperature=SAMPLING.temperature,
            top_k=0,
            pad_token_id=0,
        )

    return run


Run = Callable[[int], None]  # continues the prompts by a number of tokens


def contestants(letter: Letter, batch: int) -> dict[str, Run]:
    """By name, the ways to continue prompts of a quarter of the window."""
    c = CONFIGS[letter]
    model = build_fastllm(c).eval()
    stock = build_stock(c, "tuned", model).eval()
    prompts = torch.randint(c.V, (batch, c.S // 4))
    runs: dict[str, Run] = {
        f"fastllm {precision}": partial(fastllm, model, prompts, precision) for precision in BYTES
    }
    runs["recompute"] = partial(recompute, stock, prompts)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        runs[f"transformers {name}"] = partial(transformers(letter, dtype), prompts)
    return runs


def seconds(run: Run, new_tokens: int) -> float:
    start = time.perf_counter()
    run(new_tokens)
    return time.perf_counter() - start


def main(letters: list[Letter]) -> None:
    threads = set_threads()
    print(f"{'config':6}{'batch':>6}  {'':20}{'ms to the first':>16}{'tokens/s':>12}{'limit':>8}")
    for letter in letters:
        c = CONFIGS[letter]
        weights = c.L * 12 * c.H * c.H + c.V * c.H  # read for every token
        for batch in (1, 16):
            runs = contestants(letter, batch)
            firsts: dict[str, list[float]] = {name: [] for name in runs}
            rests: dict[str, list[float]] = {name: [] for name in runs}
            bandwidths = []  # in GB/s
            for round_ in range(ROUNDS + 1):
                bandwidths.append(measure_bandwidth(threads, size=weights))
                for name, run in runs.items():
                    run(1)  # the others have changed the caches
                    first, whole = seconds(run, 1), seconds(run, 1 + NEW_TOKENS)
                    if round_:  # the first round warms up
                        firsts[name].append(first)
                        rests[name].append(whole - first)
            for name, rest in rests.items():
                speed, limit = batch * NEW_TOKENS / median(rest), ""
                if name.startswith("fastllm"):
                    size = weights * BYTES[name.split()[1]]
                    most = batch * median(bandwidths) * 1e9 / size
                    limit = f"{100 * speed / most:.0f} %"
                first = 1000 * median(firsts[name])
                row = f"{letter:6}{batch:6}  {name:20}{first:16,.1f}{speed:12,.0f}{limit:>8}"
                print(row, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["C", "E"])  # type: ignore[arg-type]
