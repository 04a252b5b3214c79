"""A training step of a model of DistilGPT-2's size, with and without Intel's extension.

    python -m venv ipex
    ipex/bin/pip install torch==2.8.0 intel-extension-for-pytorch==2.8.0 transformers==4.57.6 \\
        matplotlib pydantic-settings
    ipex/bin/pip install --no-deps .
    ipex/bin/python benchmarks/ipex.py

The extension works only with torch 2.8 and transformers 4; fastllm requires a newer torch, hence
`--no-deps`. Each contestant has a process of its own, because importing the extension replaces
parts of PyTorch. They take turns; the first step is a warm-up and not counted.
"""

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from statistics import median

import torch

from fastllm import DecoderModel
from fastllm.benchmarking.machine import cpu_name
from fastllm.benchmarking.shapes import MeasuredPrecision
from fastllm.device import autocast
from fastllm.integrations import ipex
from fastllm.ops import extension
from fastllm.optim import AdamW
from fastllm.threads import set_threads

S, BATCH, LR, ROUNDS = 256, 2, 5e-5, 7
CONTESTANTS = ("fastllm", "transformers", "with ipex")

step: Callable[[], float]  # the contestant of this process


def prepare(contestant: str, precision: MeasuredPrecision) -> int:
    """Sets `step` to a whole training step of the contestant; returns the number of threads."""
    global step
    threads = set_threads()
    torch.manual_seed(0)
    ids = torch.randint(50257, (BATCH, S))
    if contestant == "fastllm":
        model = DecoderModel.from_gpt2({"n_layer": 6})
        optimizer: torch.optim.Optimizer = AdamW(model.parameters(), lr=LR)
    else:
        from transformers import GPT2Config, GPT2LMHeadModel

        model = GPT2LMHeadModel(GPT2Config(n_layer=6)).train()
        # The extension has no fused AdamW of its own and leaves PyTorch's unchanged.
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    if contestant == "with ipex":
        dtype = torch.bfloat16 if precision == "bf16" else None
        model, optimizer = ipex.optimize(model, optimizer, dtype)

    def run() -> float:
        start = time.perf_counter()
        with autocast("cpu", precision):
            loss = model.loss(ids, ids) if contestant == "fastllm" else model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    step = run
    return threads


def take_step() -> float:
    return step()


def main() -> None:
    names = ("torch", ipex.PACKAGE, "transformers", "fastllm")
    print(", ".join(f"{name} {version(name)}" for name in names))
    print(f"{cpu_name()}, {extension.kernels.isa() if extension.kernels else 'no kernels'}")
    print(f"{'precision':10}{'by':14}{'ms a step':>10}{'least':>8}{'most':>8}{'times as long':>15}")
    precisions: list[MeasuredPrecision] = ["fp32", "bf16"]
    for precision in precisions:
        processes = {
            contestant: ProcessPoolExecutor(1, get_context("spawn")) for contestant in CONTESTANTS
        }
        for contestant, process in processes.items():
            process.submit(prepare, contestant, precision).result()
        rounds = [
            {
                contestant: process.submit(take_step).result()
                for contestant, process in processes.items()
            }
            for _ in range(ROUNDS + 1)
        ][1:]
        for contestant, process in processes.items():
            times = [1000 * round_[contestant] for round_ in rounds]
            ratio = median(round_[contestant] / round_["fastllm"] for round_ in rounds)
            print(
                f"{precision:10}{contestant:14}{median(times):10,.0f}{min(times):8,.0f}{max(times):8,.0f}"
                f"{ratio:15.2f}",
                flush=True,
            )
            process.shutdown()


if __name__ == "__main__":
    main()
