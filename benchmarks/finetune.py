"""Fine-tuning a model of DistilGPT-2's size, by fastllm and by transformers' Trainer.

    pip install transformers accelerate
    python benchmarks/finetune.py --file_path wiki.txt --tokenizer gpt2

`--tokenizer` is a folder with GPT-2's vocab.json and merges.txt. Both train the same architecture
from GPT-2's random start on the same text: sequences of 512 tokens, batches of 2, 8 of them a step.
Each contestant has a process of its own; the first step warms up and is not counted.
"""

import sys
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fastllm import DecoderModel, TextDataset
from fastllm.bench import Precision, status_mb
from fastllm.command import CommandSettings, autocast, parse_settings
from fastllm.optim import AdamW
from fastllm.threads import set_threads
from fastllm.tokenization import load_tokenizer

S, BATCH, ACCUMULATION, LR = 512, 2, 8, 5e-5
DISTILGPT2 = {"n_layer": 6, "n_positions": 1024}  # the rest is as in GPT-2


class FinetuneConfig(CommandSettings):
    """Tokens a second and peak memory of fine-tuning, against transformers' Trainer."""

    file_path: Path
    """UTF-8 text to train on."""
    tokenizer: Path
    """Folder with GPT-2's vocab.json and merges.txt."""
    steps: int = 2
    """Optimizer steps to time."""


def sequences(config: FinetuneConfig) -> list[torch.Tensor]:
    """Enough whole sequences for all steps and one before them."""
    dataset = TextDataset(config.file_path, load_tokenizer(config.tokenizer), S)
    wanted = (config.steps + 1) * BATCH * ACCUMULATION
    return [dataset[i % (len(dataset) - 1)]["input_ids"] for i in range(wanted)]


def train_fastllm(config: FinetuneConfig, precision: Precision) -> list[float]:
    model = DecoderModel.from_gpt2(DISTILGPT2)
    optimizer = AdamW(model.parameters(), lr=LR, max_grad_norm=1.0)
    batches = torch.stack(sequences(config)).view(-1, ACCUMULATION, BATCH, S)
    ends = []
    for step in batches:
        for ids in step:
            with autocast("cpu", precision):
                loss = model.loss(ids, ids) / ACCUMULATION
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ends.append(time.perf_counter())
    return ends


def train_transformers(config: FinetuneConfig, precision: Precision) -> list[float]:
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **others: Any) -> None:
            ends.append(time.perf_counter())

    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=ACCUMULATION,
            max_steps=config.steps + 1,
            learning_rate=LR,
            lr_scheduler_type="constant",
            use_cpu=True,
            bf16=precision == "bf16",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        data = [{"input_ids": ids, "labels": ids} for ids in sequences(config)]
        model = GPT2LMHeadModel(GPT2Config(**DISTILGPT2))
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[Clock()])
        trainer.train()
    return ends


def run(who: str, config: FinetuneConfig, precision: Precision) -> tuple[float, float]:
    """Tokens a second, and peak memory in MiB over that of the imported libraries."""
    set_threads()
    torch.manual_seed(0)
    before = status_mb("VmRSS")
    ends = (train_fastllm if who == "fastllm" else train_transformers)(config, precision)
    steps = [end - begin for begin, end in pairwise(ends)]
    return BATCH * ACCUMULATION * S / median(steps), status_mb("VmHWM") - before


def main(arguments: list[str]) -> None:
    config = parse_settings(FinetuneConfig, arguments)
    print(f"{'who':16}{'precision':>10}{'tokens/s':>10}{'peak MiB':>10}")
    precisions: list[Precision] = ["fp32", "bf16"]
    for precision in precisions:
        for who in ("fastllm", "transformers"):
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                speed, memory = process.submit(run, who, config, precision).result()
            print(f"{who:16}{precision:>10}{speed:10,.0f}{memory:10,.0f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
