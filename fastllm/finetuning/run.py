"""A fine-tuning run, from its settings to what it leaves in its folder."""

from __future__ import annotations

import csv
import importlib.util
import math
import sys
import warnings
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastllm.command import Log
from fastllm.data.corpus import Corpus, Documents, load_documents, tokenize
from fastllm.device import choose_precision
from fastllm.files import replace_file, sha256
from fastllm.finetuning.checkpoint import complete_or_absent
from fastllm.finetuning.config import FinetuneConfig
from fastllm.finetuning.inputs import (
    Inputs,
    model_digest,
    sequences_digest,
    with_absolute_paths,
)
from fastllm.finetuning.model import choose_task, load_model
from fastllm.integrations import hub
from fastllm.training.evaluation import Evaluation
from fastllm.training.metrics import read_metrics, tokens_per_second

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from fastllm.finetuning.trainer import FinetuneTrainer


def check_packages(config: FinetuneConfig) -> None:
    """Raises an `ImportError` that names the packages to install."""
    needed = ["transformers", "accelerate", "datasets"]
    needed += ["peft"] if config.lora else []
    needed += ["gguf"] if config.model.endswith(".gguf") else []
    needed += ["tensorboard"] if config.tensorboard else []
    missing = [name for name in needed if not importlib.util.find_spec(name)]
    if missing:
        raise ImportError(f"{', '.join(missing)} missing: pip install '.[finetune]'")


def go_offline_if_unreachable(config: FinetuneConfig) -> None:
    """Uses earlier downloads if the run needs the hub and the hub does not answer."""
    datasets = [words[0] for words in (config.dataset, config.eval_dataset) if words]
    hub.go_offline_if_unreachable([config.model, config.tokenizer or config.model, *datasets])


def run_name(model: str) -> str:
    """The last telling part of a model's name: runs/gpt2/model gives gpt2."""
    path = Path(model)
    if path.name in ("config.json", "model"):
        path = path.absolute().parent
    return path.stem if path.suffix in (".gguf", ".json") else path.name


def prepare(
    config: FinetuneConfig, corpora: dict[str, Corpus], run_dir: Path | None, log: Log
) -> FinetuneTrainer:
    """Loads model and data and creates the folder: all that can fail before any work is lost."""
    from fastllm.finetuning.trainer import make_trainer

    silence_libraries(config.quiet)
    inputs = Inputs(run_dir, config.resume)
    file_digest = cache(sha256)  # model and tokenizer are often in one folder
    for flag, name in (("model", config.model), ("tokenizer", config.tokenizer)):
        if name is not None:
            inputs.add(flag, partial(model_digest, name, file_digest))
    model_config = hub.load_config(config.model)
    tokenizer = hub.load_tokenizer(config.tokenizer or config.model)
    config = resolve(config, model_config)
    check_limits(config, model_config, tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    train_set, val_set = load_sequences(config, corpora, tokenizer, log)
    if config.eval_dataset:
        inputs.add("eval_dataset", partial(sequences_digest, val_set))
        inputs.add("dataset", partial(sequences_digest, train_set))
    else:
        inputs.add("dataset", partial(sequences_digest, train_set, val_set))
    model = load_model(config, model_config, tokenizer, log)
    log(f"precision   {config.precision}")
    if config.accelerate:
        from fastllm.integrations.huggingface import accelerate, accelerated

        model = accelerate(model, enable=True, skip_logits=True)
        lines = accelerated(model).splitlines() or ["attention and dropout"]
        log("accelerated " + ("\n" + 12 * " ").join(lines))
    if run_dir is not None:
        run_dir.mkdir(parents=True, exist_ok=True)
        with replace_file(run_dir / "config.json") as file:
            file.write(with_absolute_paths(config).to_json().encode())
        inputs.write()
    return make_trainer(config, model, tokenizer, train_set, val_set, run_dir)


def silence_libraries(quiet: bool) -> None:
    """Loading, resizing and tokenizing are reported by us, in one line each."""
    import datasets
    import transformers

    # Of peft, whenever it saves LoRA of a head.
    warnings.filterwarnings("ignore", "Setting `save_embedding_layers`")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not sys.stderr.isatty() or quiet:
        datasets.disable_progress_bars()


def resolve(config: FinetuneConfig, model_config: Any) -> FinetuneConfig:
    """The settings with the task and the precision that the model and the machine determine."""
    precision = choose_precision(config.precision, model_config.hidden_size, "cpu")
    task = choose_task(model_config, config.task)
    return config.model_copy(update={"task": task, "precision": precision})


def check_limits(
    config: FinetuneConfig, model_config: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raises a `ValueError` if model or tokenizer cannot do what the settings ask for."""
    longest = getattr(model_config, "max_position_embeddings", None) or math.inf
    if longest < 1:  # -1 for no limit
        longest = math.inf
    if config.max_seq_len > longest:
        raise ValueError(f"max_seq_len {config.max_seq_len}: the model takes at most {longest}")
    if config.task == "mlm" and tokenizer.mask_token_id is None:
        raise ValueError("the tokenizer has no mask token, which mlm needs; choose another one")


def load_sequences(
    config: FinetuneConfig,
    corpora: dict[str, Corpus],
    tokenizer: PreTrainedTokenizerBase,
    log: Log,
) -> tuple[Dataset | None, Dataset | None]:
    """Tokenized sequences to train and to evaluate on; None if there are none.

    Raises:
        ValueError: the settings need an evaluation, and there is nothing to evaluate on.
    """
    train_set = val_set = None
    if config.eval_dataset:
        documents, held_out = load_documents(corpora["eval_dataset"], config.max_samples)
        val_set = tokenize_documents(config, held_out or documents, tokenizer)
    if config.dataset:
        documents, held_out = load_documents(corpora["dataset"], config.max_samples)
        train_set = tokenize_documents(config, documents, tokenizer)
        if val_set is None and held_out:
            val_set = tokenize_documents(config, held_out, tokenizer)
        elif val_set is None and config.val_fraction:
            train_set, val_set = split_sequences(train_set, config.val_fraction)
    if val_set is not None and config.max_eval_samples:
        val_set = val_set.select(range(min(config.max_eval_samples, len(val_set))))
    if config.patience and val_set is None:
        raise ValueError("patience needs data to evaluate on: val_fraction or eval_dataset")
    if config.eval_only and val_set is None:
        raise ValueError("there is no data to evaluate on: give an eval_dataset or a val_fraction")
    purposes = {"to train on": train_set, "to evaluate on": val_set}
    counts = [f"{len(data):,} {purpose}" for purpose, data in purposes.items() if data is not None]
    log(
        f"data        {' '.join(config.dataset or config.eval_dataset)}: sequences of up to "
        f"{config.max_seq_len} tokens, {', '.join(counts)}"
    )
    return train_set, val_set


def tokenize_documents(
    config: FinetuneConfig, documents: list[Documents], tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    """Sequences of the documents."""
    return tokenize(
        documents,
        tokenizer,
        config.max_seq_len,
        packing=config.packing,
        end_token=config.end_token,
        masked=config.task == "mlm",
        min_length=config.min_length,
        num_proc=config.num_proc,
    )


def split_sequences(sequences: Dataset, val_fraction: float) -> tuple[Dataset, Dataset]:
    """All but the last sequences, and a fraction of them at the end, at least one."""
    cut = len(sequences) - max(1, round(len(sequences) * val_fraction))
    if cut < 1:
        raise ValueError(
            f"the dataset has only {len(sequences)} sequence, and val_fraction {val_fraction} "
            "leaves none for training; 0 holds nothing out"
        )
    return sequences.select(range(cut)), sequences.select(range(cut, len(sequences)))


def save_model(trainer: FinetuneTrainer, folder: Path) -> None:
    """Writes model and tokenizer in transformers' format, LoRA merged; all or nothing."""
    model: Any = trainer.model
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = True  # the Trainer switches it off
    with complete_or_absent(folder) as partial:
        model.save_pretrained(partial)
        trainer.tokenizer.save_pretrained(partial)


def write_csv(metrics: Path, table: Path) -> None:
    """The lines of metrics.jsonl as a table."""
    lines = list(read_metrics(metrics))
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, lines[0] if lines else [])
        writer.writeheader()
        writer.writerows(lines)


def report(trainer: FinetuneTrainer, run_dir: Path, log: Log) -> None:
    """Logs the results of a finished run."""
    monitor = trainer.monitor
    best = trainer.state.best_metric if trainer.args.load_best_model_at_end else None
    losses = [line["val_loss"] for line in read_metrics(run_dir / "metrics.jsonl")]
    losses = [loss for loss in losses if loss is not None]
    if losses:
        for name, loss in (("before", losses[0]), ("after", best or losses[-1])):
            log(f"{name:12}loss {loss:.4f}, perplexity {Evaluation(loss, 1).perplexity:,.3f}")
    if monitor.training_s:
        speed = tokens_per_second(monitor.tokens, monitor.training_s)
        log(f"speed       {speed:,.0f} tokens/s")
    log(f"curves      {run_dir / 'loss.png'}, {run_dir / 'metrics.csv'}")
    log(f"model       {run_dir / 'model'}")
