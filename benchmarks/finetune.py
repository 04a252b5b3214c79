"""Fine-tuning by transformers' Trainer, stock and accelerated, and by fastllm's own model.

    pip install '.[finetune]'
    python benchmarks/finetune.py --file_path wiki.txt --gpt2 gpt2 --bert minilm

`--gpt2` and `--bert` are folders with the tokenizers of such models. Random models with the
configurations of DistilGPT-2 (512 tokens, batches of 2, 8 batches a step), SmolLM2-135M (256
tokens, batches of 2, GPT-2's vocabulary) and TinyBERT (masked, 128 tokens, batches of 32) train on
the same text. Dropout is on where a model has it, gradients are clipped to 1. Each contestant has a
process of its own; the first step is a warm-up and not counted.
"""

import gc
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from fastllm import DecoderModel, TextDataset
from fastllm.benchmarking.machine import process_memory_mb
from fastllm.benchmarking.shapes import MeasuredPrecision
from fastllm.command import CommandSettings, parse_settings
from fastllm.device import autocast
from fastllm.optim import AdamW
from fastllm.threads import set_threads
from fastllm.tokenization import load_tokenizer

LR = 5e-5
DISTILGPT2 = {"n_layer": 6, "n_positions": 1024}  # otherwise as GPT-2
SMOLLM2 = {
    "vocab_size": 50257,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
TINYBERT = {
    "num_hidden_layers": 4,
    "hidden_size": 312,
    "intermediate_size": 1200,
    "num_attention_heads": 12,
}
# Sequence length, batch size, batches a step, steps after the first.
SHAPES = {
    "DistilGPT-2": (512, 2, 8, 2),
    "SmolLM2-135M": (256, 2, 1, 5),
    "TinyBERT": (128, 32, 1, 10),
}
Contestant = Literal["transformers", "accelerated", "DecoderModel"]
Mode = Literal["full", "LoRA"]


class BenchmarkSettings(CommandSettings):
    """Measure tokens per second and peak memory of fine-tuning against transformers' Trainer."""

    file_path: Path
    """UTF-8 text to train on."""
    gpt2: Path
    """Folder with GPT-2's vocab.json and merges.txt."""
    bert: Path
    """Folder with the tokenizer.json of a BERT."""
    model: Literal["DistilGPT-2", "SmolLM2-135M", "TinyBERT"] | None = None
    """Measure only this model."""


def sequences(config: BenchmarkSettings, which: str) -> list[torch.Tensor]:
    """Enough whole sequences for all steps and the warm-up."""
    S, batch, accumulation, steps = SHAPES[which]
    tokenizer = load_tokenizer(config.bert if which == "TinyBERT" else config.gpt2)
    dataset = TextDataset(config.file_path, tokenizer, S)
    wanted = (steps + 1) * batch * accumulation
    return [dataset[i % (len(dataset) - 1)]["input_ids"] for i in range(wanted)]


def train_decoder_model(
    config: BenchmarkSettings, precision: MeasuredPrecision
) -> tuple[list[float], int]:
    S, batch, accumulation, _ = SHAPES["DistilGPT-2"]
    model = DecoderModel.from_gpt2(DISTILGPT2)
    optimizer = AdamW(model.parameters(), lr=LR, max_grad_norm=1.0)
    batches = torch.stack(sequences(config, "DistilGPT-2")).view(-1, accumulation, batch, S)
    ends = []
    for step in batches:
        for ids in step:
            with autocast("cpu", precision):
                loss = model.loss(ids, ids) / accumulation
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ends.append(time.perf_counter())
    return ends, 3 * sum(p.nbytes for p in model.parameters())


def train_transformers(
    config: BenchmarkSettings, which: str, mode: Mode, precision: MeasuredPrecision, fast: bool
) -> tuple[list[float], int]:
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        DataCollatorForLanguageModeling,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        PrinterCallback,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    _, batch, accumulation, steps = SHAPES[which]
    data = [{"input_ids": ids, "labels": ids} for ids in sequences(config, which)]
    model: Any
    collator = None
    if which == "DistilGPT-2":
        model = GPT2LMHeadModel(GPT2Config(**DISTILGPT2))
    elif which == "SmolLM2-135M":
        model = LlamaForCausalLM(LlamaConfig(**SMOLLM2))
    else:
        model = BertForMaskedLM(BertConfig(**TINYBERT))
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(config.bert / "tokenizer.json"),
            mask_token="[MASK]",
            pad_token="[PAD]",
        )
        collator = DataCollatorForLanguageModeling(tokenizer)
    if mode == "LoRA":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(fan_in_fan_out=which == "DistilGPT-2"))
    trained = [p for p in model.parameters() if p.requires_grad]
    kept = sum(p.nbytes for p in model.parameters()) + 2 * sum(p.nbytes for p in trained)
    optimizer = None
    if fast:
        from fastllm.integrations.huggingface import accelerate

        accelerate(model)
        optimizer = AdamW(trained, lr=LR, max_grad_norm=1.0)
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **others: Any) -> None:
            ends.append(time.perf_counter())

    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=steps + 1,
            learning_rate=LR,
            lr_scheduler_type="constant",
            max_grad_norm=0 if fast else 1.0,
            use_cpu=True,
            bf16=precision == "bf16",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model,
            arguments,
            data_collator=collator,
            train_dataset=data,
            callbacks=[Clock()],
            optimizers=(optimizer, None),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return ends, kept


def measure(
    contestant: Contestant,
    config: BenchmarkSettings,
    which: str,
    mode: Mode,
    precision: MeasuredPrecision,
) -> tuple[float, float, float]:
    """Tokens per second, peak memory in MiB, and its part above weights and optimizer state.

    The memory of imported libraries is not counted.
    """
    import transformers
    from transformers import Trainer  # noqa: F401

    transformers.logging.set_verbosity_error()
    set_threads()
    torch.manual_seed(0)
    gc.collect()
    before = process_memory_mb("VmRSS")
    if contestant == "DecoderModel":
        ends, kept = train_decoder_model(config, precision)
    else:
        ends, kept = train_transformers(config, which, mode, precision, contestant == "accelerated")
    S, batch, accumulation, _ = SHAPES[which]
    steps = [end - begin for begin, end in pairwise(ends)]
    peak = process_memory_mb("VmHWM") - before
    return batch * accumulation * S / median(steps), peak, peak - kept / 2**20


def main(arguments: list[str]) -> None:
    config = parse_settings(BenchmarkSettings, arguments)
    print(f"{'model':13}{'mode':6}{'precision':11}{'by':14}{'tokens/s':>9}{'MiB':>7}{'above':>7}")
    modes: tuple[Mode, ...] = ("full", "LoRA")
    precisions: tuple[MeasuredPrecision, ...] = ("fp32", "bf16")
    for which in [config.model] if config.model else SHAPES:
        for mode in modes:
            for precision in precisions:
                contestants: list[Contestant] = ["transformers", "accelerated"]
                if which == "DistilGPT-2" and mode == "full":
                    contestants.append("DecoderModel")
                for contestant in contestants:
                    with ProcessPoolExecutor(1, get_context("spawn")) as process:
                        job = process.submit(measure, contestant, config, which, mode, precision)
                        speed, peak, above = job.result()
                    print(
                        f"{which:13}{mode:6}{precision:11}{contestant:14}{speed:9,.0f}{peak:7,.0f}"
                        f"{above:7,.0f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main(sys.argv[1:])
