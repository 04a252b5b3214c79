"""Fine-tune a model of transformers: `python -m fastllm.finetune --model DIR --dataset FILE`."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import shutil
import sys
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict
from safetensors import SafetensorError

from fastllm import command
from fastllm.command import errors_in_one_line, log, stop_on_signals
from fastllm.data.corpus import file_format, load_documents, tokenise
from fastllm.device import choose_precision
from fastllm.files import replace_file
from fastllm.optim import AdamW
from fastllm.threads import set_threads
from fastllm.training.config import (
    Count,
    NonNegative,
    Positive,
    PositiveCount,
    Probability,
    RunSettings,
    parse_run_settings,
)
from fastllm.training.evaluation import Evaluation
from fastllm.training.loop import TrainingError
from fastllm.training.metrics import plot_losses, read_metrics
from fastllm.training.run import choose_run_dir

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from fastllm.integrations.trainer import FinetuneTrainer


Words = Annotated[list[str], Field(default_factory=list)]


class FinetuneConfig(RunSettings):
    """Fine-tune a language model of transformers on a dataset."""

    model_config = SettingsConfigDict(frozen=False)

    of_one_command: ClassVar = {"config", "out_dir", "resume", "eval_only", "quiet"}
    fixed: ClassVar = [
        *("model", "tokenizer", "task", "mlm_probability", "dataset", "eval_dataset"),
        *("text_column", "max_samples", "max_eval_samples", "val_fraction", "min_length"),
        *("max_seq_len", "packing", "end_token", "lora", "lora_rank", "lora_alpha"),
        *("lora_targets", "batch_size", "grad_accum", "seed"),
    ]

    # Model
    model: str = ""
    """A folder, a name on the hub, a .gguf file; or a config.json, or a folder with nothing else,
    for random weights."""
    tokenizer: str | None = None
    """A folder, a name on the hub or a tokenizer.json; the model's own unless given."""
    task: Literal["causal", "mlm"] | None = None
    """Predict the next token, or masked ones; what the architecture is made for unless given."""
    mlm_probability: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Part of the tokens that are to be predicted with mlm."""

    # Data
    dataset: Words
    """Files (.txt, .jsonl, .json, .csv, .parquet), or a folder or a name on the hub, the last two
    with or without a configuration: `wikitext wikitext-2-raw-v1`."""
    eval_dataset: Words
    """The same, to evaluate on; else what the dataset itself holds out, else val_fraction."""
    val_fraction: Probability = 0.1
    """Part of the sequences, at their end, to evaluate on where nothing else is; 0 for none."""
    text_column: str = "text"
    """Column of the dataset that has the text."""
    max_samples: Count = 0
    """At most so many documents, the first; then only these are downloaded. 0 for all."""
    max_eval_samples: Count = 0
    """At most so many sequences to evaluate on, the first; 0 for all."""
    min_length: Count = 0
    """Leave out documents of fewer characters."""
    max_seq_len: Annotated[int, Field(ge=4, le=2**24)] = 256
    """Tokens in a sequence."""
    packing: bool = True
    """Join documents and cut them into sequences; else each is a sequence, cut off and padded."""
    end_token: bool | None = None
    """End every document with the end token. Unless given, all but the lines of a .txt file; leave
    it out for other datasets of lines, such as wikitext."""
    num_proc: Annotated[int, Field(ge=1, le=1024)] = 1
    """Processes that tokenise."""

    # LoRA
    lora: bool = False
    """Train small matrices beside the frozen ones; they are merged when the model is saved."""
    lora_rank: Annotated[int, Field(ge=1, le=2**16)] = 8
    """Rank of these matrices."""
    lora_alpha: PositiveCount = 16
    """What is learnt counts alpha / rank times."""
    lora_dropout: Probability = 0
    """Dropout before these matrices."""
    lora_targets: Words
    """Names of the modules that get them, such as c_attn; peft's choice unless given."""

    # Optimization
    batch_size: Annotated[int, Field(ge=1, le=2**24)] = 8
    """Sequences in a batch."""
    grad_accum: Annotated[int, Field(ge=1, le=2**24)] = 1
    """Batches whose gradients make one step, each token weighted alike."""
    epochs: PositiveCount = 1
    """Passes over the dataset."""
    max_steps: Count = 0
    """Stop after this many steps from the run's beginning; 0 goes by the epochs."""
    lr: Positive = 5e-5
    """Learning rate, after the warm-up."""
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls over the run."""
    warmup_steps: Count = 0
    """Steps over which the learning rate rises from 0."""
    weight_decay: NonNegative = 0
    """Decoupled weight decay, not of biases and norms."""
    max_grad_norm: NonNegative = 1.0
    """Scale gradients down to this norm; 0 for no clipping."""
    seed: Count = 0
    """Fixes every random number of the run."""

    # Watching and saving
    log_interval: PositiveCount = 10
    """Steps between the lines of metrics.jsonl."""
    eval_interval: Count = 0
    """Steps between evaluations; 0 for one after each epoch. There is one before training too."""
    patience: Count = 0
    """Stop after this many evaluations without a new best loss, and keep the best model; a
    checkpoint is then saved at each evaluation instead of each save_interval. 0 never does."""
    save_interval: PositiveCount = 500
    """Steps between checkpoints."""
    eval_only: bool = False
    """Evaluate the model and stop; nothing is written."""
    tensorboard: bool = False
    """Write the curves for TensorBoard as well, into the run's folder."""
    quiet: bool = False
    """Print only warnings and errors."""

    # Machine
    threads: Annotated[int, Field(ge=0, le=4096)] = 0
    """CPU threads; 0 for OMP_NUM_THREADS, or the physical cores that this process may use."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """What matrix products round their operands to; weights and sums are fp32 always. auto takes
    bf16 on CPUs that have it."""
    accelerate: bool = True
    """Compute with fastllm's kernels and optimizer; --no-accelerate is transformers alone."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward: less memory, more time."""

    @field_validator("dataset", "eval_dataset", "lora_targets", mode="before")
    @classmethod
    def _one_word_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_together(self) -> FinetuneConfig:
        if not self.model:
            raise ValueError("give a --model: a folder, a name on the hub, or a config.json")
        if not self.dataset and not (self.eval_only and self.eval_dataset):
            raise ValueError("dataset: give files, a folder or a name on the hub to learn from")
        return self


def main(arguments: list[str]) -> None:
    config = parse_run_settings(FinetuneConfig, words_as_lists(arguments))
    info: Callable[..., None] = (lambda *parts: None) if config.quiet else log
    threads = set_threads(config.threads)
    with errors_in_one_line(OSError, ValueError, ImportError, TrainingError):
        check_packages(config)
        go_offline_without_a_hub(config)
        run_dir = None if config.eval_only else choose_run_dir(config, run_name(config.model))
        trainer = prepare(config, run_dir, info)
        info(f"threads     {threads}")
        if run_dir is None:
            metrics = trainer.evaluate()
            loss, perplexity = metrics["eval_loss"], metrics["eval_perplexity"]
            print(f"evaluation  loss {loss:.4f}, perplexity {perplexity:,.3f}")
            return
        info(f"run         {run_dir}")
        if config.resume:
            info(f"goes on     from {last_checkpoint(run_dir)}")
        with stop_on_signals(trainer.watch):
            trainer.train(
                resume_from_checkpoint=last_checkpoint(run_dir) if config.resume else None
            )
        write_csv(run_dir / "metrics.jsonl", run_dir / "metrics.csv")
        plot_losses(run_dir / "metrics.jsonl", run_dir / "loss.png")
        if number := trainer.watch.stopped_by:
            log(
                f"stopped by {number.name} at step {trainer.state.global_step:,}; go on with: "
                f"python -m fastllm.finetune --out_dir {run_dir} --resume"
            )
            raise SystemExit(128 + number)
        save_model(trainer, run_dir / "model")
    report(trainer, run_dir, info)


def words_as_lists(arguments: list[str]) -> list[str]:
    """`--dataset a b` as the one flag `--dataset ["a", "b"]` that the settings read."""
    result: list[str] = []
    arguments = list(arguments)
    while arguments:
        argument = arguments.pop(0)
        result.append(argument)
        if argument.replace("-", "_") in ("__dataset", "__eval_dataset", "__lora_targets"):
            words = []
            while arguments and not arguments[0].startswith("--"):
                words.append(arguments.pop(0))
            result.append(json.dumps(words))
    return result


def check_packages(config: FinetuneConfig) -> None:
    """Raises an `ImportError` that names what is to be installed."""
    wanted = {
        "transformers": True,
        "accelerate": True,
        "datasets": True,
        "peft": config.lora,
        "gguf": config.model.endswith(".gguf"),
        "tensorboard": config.tensorboard,
    }
    missing = [name for name in wanted if wanted[name] and not importlib.util.find_spec(name)]
    if missing:
        raise ImportError(f"{', '.join(missing)} missing: pip install '.[finetune]'")


def go_offline_without_a_hub(config: FinetuneConfig) -> None:
    """Where the hub does not answer, only what was downloaded before is used, and without retries.

    The libraries would retry for 20 seconds, for each file anew. They read the variable when they
    are imported.
    """
    names = [config.model, config.tokenizer or config.model]
    names += [words[0] for words in (config.dataset, config.eval_dataset) if words]
    if all(is_path(name) for name in names) or os.environ.get("HF_HUB_OFFLINE"):
        return
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(hub, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except OSError as error:
        log(f"warning: {hub} cannot be reached ({error}); using what was downloaded before")
        os.environ["HF_HUB_OFFLINE"] = "1"


def is_path(name: str) -> bool:
    """Whether this names a file or folder here, there or not, rather than something on the hub."""
    path = Path(name)
    suffixes = (".gguf", ".json", ".jsonl", ".txt", ".csv", ".parquet")
    return path.exists() or path.suffix in suffixes or name[:1] in "./" or len(path.parts) > 2


def run_name(model: str) -> str:
    """The last part of a model's name that says something."""
    path = Path(model)
    if path.name in ("config.json", "model"):
        path = path.absolute().parent
    return path.stem if path.suffix in (".gguf", ".json") else path.name


def prepare(
    config: FinetuneConfig, run_dir: Path | None, log: Callable[..., None]
) -> FinetuneTrainer:
    """Everything that can go wrong before any work is lost: model, data, folder."""
    import datasets
    import transformers

    # What they report of loading, resizing and tokenising is said below, in one line each.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not sys.stderr.isatty() or config.quiet:
        datasets.disable_progress_bars()
    model_config = load_model_config(config.model)
    tokenizer = load_tokenizer(config)
    config.task = choose_task(model_config, config.task)
    longest = getattr(model_config, "max_position_embeddings", None) or math.inf
    if config.max_seq_len > longest:
        raise ValueError(f"max_seq_len {config.max_seq_len}: the model takes at most {longest}")
    if config.task == "mlm" and tokenizer.mask_token_id is None:
        raise ValueError("the tokenizer has no mask token, which mlm needs; choose another one")
    if tokenizer.pad_token_id is None:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    train_set, val_set = load_sequences(config, tokenizer)
    if config.patience and val_set is None:
        raise ValueError("patience needs something to evaluate on: val_fraction or eval_dataset")
    if config.eval_only and val_set is None:
        raise ValueError("there is nothing to evaluate on: give an eval_dataset or a val_fraction")
    parts = ((train_set, "to train on"), (val_set, "to evaluate on"))
    counts = [f"{len(part):,} {purpose}" for part, purpose in parts if part is not None]
    log(
        f"data        {' '.join(config.dataset or config.eval_dataset)}: sequences of up to "
        f"{config.max_seq_len} tokens, {', '.join(counts)}"
    )
    model = load_model(config, model_config, tokenizer, log)
    config.precision = choose_precision(config.precision, model_config.hidden_size, "cpu")  # type: ignore[assignment]
    log(f"precision   {config.precision}")
    if config.accelerate:
        from fastllm.integrations.huggingface import accelerate, accelerated

        model = accelerate(model, enable=True, skip_logits=True)
        lines = accelerated(model).splitlines() or ["attention and dropout"]
        log("accelerated " + ("\n" + 12 * " ").join(lines))
    if run_dir is not None:
        run_dir.mkdir(parents=True, exist_ok=True)
        with replace_file(run_dir / "config.json") as file:
            file.write(config.to_json().encode())
    return make_trainer(config, model, tokenizer, train_set, val_set, run_dir)


def load_tokenizer(config: FinetuneConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the model, or the one asked for.

    Raises:
        ValueError: there is none; the message says what to give.
    """
    from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

    name = config.tokenizer or config.model
    place, keywords = model_place(name)
    path = Path(name)
    file = path if path.suffix == ".json" and path.name != "config.json" else None
    folder = path.parent if path.suffix == ".json" else path
    if file is None and not (folder / "tokenizer_config.json").exists():
        file = folder / "tokenizer.json"
    if file is not None and file.exists():
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file))
        # Such a file does not say which of its special tokens serves what.
        vocabulary = tokenizer.get_vocab()
        for role, names in {
            "eos_token": ("<|endoftext|>", "</s>"),
            "pad_token": ("<PAD>", "[PAD]", "<pad>"),
            "mask_token": ("[MASK]", "<mask>"),
            "cls_token": ("[CLS]",),
            "sep_token": ("[SEP]",),
            "unk_token": ("[UNK]", "<unk>"),
        }.items():
            known = [each for each in names if each in vocabulary]
            if known:
                tokenizer.add_special_tokens({role: known[0]})
        return tokenizer
    if folder.is_dir():
        place = str(folder)
        files = {each.name for each in folder.iterdir()}
        if not files & {"tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model"}:
            raise ValueError(f"{folder} holds no tokenizer; give one by --tokenizer")
        if "vocab.json" in files and not files & {"tokenizer_config.json", "config.json"}:
            return from_hub("tokenizer", name, GPT2Tokenizer.from_pretrained, place)
    return from_hub("tokenizer", name, AutoTokenizer.from_pretrained, place, **keywords)


def load_model_config(name: str) -> Any:
    from transformers import AutoConfig

    place, keywords = model_place(name)
    return from_hub("model", name, AutoConfig.from_pretrained, place, **keywords)


def model_place(name: str) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` takes for a model's name.

    Raises:
        FileNotFoundError: it is a path, and nothing is there.
    """
    path = Path(name)
    if is_path(name) and not path.exists():
        raise FileNotFoundError(f"{name} does not exist")
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    return (str(path) if path.exists() else name), {}


def from_hub(what: str, name: str, load: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    """`load(...)`; errors say what was looked for, why it failed and what to do."""
    try:
        return load(*args, **keywords)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        if is_path(name):
            raise ValueError(f"the {what} in {name} cannot be loaded: {reason}") from error
        raise ValueError(
            f"{what} {name} is no folder here, and the hub does not give it: {reason} Where there "
            f"is a network, `hf download {name} --local-dir DIR` brings it; then give --{what} DIR"
        ) from error


def choose_task(model_config: Any, asked: str | None) -> Literal["causal", "mlm"]:
    """What the architecture is made for.

    Raises:
        ValueError: that is not what was asked for, or no language model at all.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    kind, name = type(model_config), model_config.model_type
    if getattr(model_config, "is_encoder_decoder", False):
        raise ValueError(f"{name} has an encoder and a decoder; only one of them can be trained")
    # Every masked model can be had as a decoder as well; its weights were not trained for that.
    masked = kind in MODEL_FOR_MASKED_LM_MAPPING and not getattr(model_config, "is_decoder", False)
    if not masked and kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{name} is no language model")
    task: Literal["causal", "mlm"] = "mlm" if masked else "causal"
    if asked not in (None, task):
        made_for = "masked tokens (--task mlm)" if masked else "the next token (--task causal)"
        raise ValueError(f"task {asked}: {name} is made to predict {made_for}")
    return task


def load_sequences(
    config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset | None, Dataset | None]:
    """Tokenised: what to train on, and what to evaluate on; None for what is not wanted."""

    def tokenised(documents: Dataset, words: list[str]) -> Dataset:
        end_token = file_format(words) != "text" if config.end_token is None else config.end_token
        return tokenise(
            documents,
            tokenizer,
            config.max_seq_len,
            text_column=config.text_column,
            packing=config.packing,
            end_token=end_token,
            masked=config.task == "mlm",
            min_length=config.min_length,
            num_proc=config.num_proc,
        )

    train_set = val_set = None
    if config.eval_dataset:
        documents, held_out = load_documents(config.eval_dataset, config.max_samples)
        val_set = tokenised(documents if held_out is None else held_out, config.eval_dataset)
    if config.dataset:
        documents, held_out = load_documents(config.dataset, config.max_samples)
        train_set = tokenised(documents, config.dataset)
        if val_set is None and held_out is not None:
            val_set = tokenised(held_out, config.dataset)
        elif val_set is None and config.val_fraction:
            count = max(1, round(len(train_set) * config.val_fraction))
            cut = len(train_set) - count
            if cut < 1:
                raise ValueError(
                    f"the dataset makes {len(train_set)} sequence, so that val_fraction "
                    f"{config.val_fraction} leaves none for training; 0 holds nothing out"
                )
            val_set = train_set.select(range(cut, len(train_set)))
            train_set = train_set.select(range(cut))
    if val_set is not None and config.max_eval_samples:
        val_set = val_set.select(range(min(config.max_eval_samples, len(val_set))))
    return train_set, val_set


def load_model(
    config: FinetuneConfig,
    model_config: Any,
    tokenizer: PreTrainedTokenizerBase,
    log: Callable[..., None],
) -> Any:
    """The model with room for every token, and with LoRA's matrices where they are wanted."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, GgufConfig, set_seed
    from transformers.pytorch_utils import Conv1D

    set_seed(config.seed)
    auto = AutoModelForMaskedLM if config.task == "mlm" else AutoModelForCausalLM
    path = Path(config.model)
    random = path.name.endswith(".json") or (
        path.is_dir() and not any(path.glob("*.safetensors")) and not any(path.glob("*.bin"))
    )
    new: set[str] = set()
    if random:
        model = auto.from_config(model_config, dtype=torch.float32)
    else:
        place, keywords = model_place(config.model)
        if "gguf_file" in keywords:
            keywords["quantization_config"] = GgufConfig(dequantize=True)
        model, loading = from_hub(
            "model",
            config.model,
            auto.from_pretrained,
            place,
            dtype=torch.float32,
            output_loading_info=True,
            **keywords,
        )
        new = set(loading["missing_keys"])
    start = "random weights" if random else config.model
    log(f"model       {type(model).__name__}, {model.num_parameters():,} parameters, {start}")
    if new and not config.resume:
        names = ", ".join(sorted(new))
        command.log(f"warning: not in the model's files, so that it starts at random: {names}")
    rows = model.get_input_embeddings().weight.size(0)
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer))
        log(f"vocabulary  {rows:,} embeddings made {len(tokenizer):,}, as the tokenizer has")
    model.config.pad_token_id = tokenizer.pad_token_id
    if not config.lora:
        return model
    from peft import LoraConfig, get_peft_model

    kinds = (torch.nn.Linear, Conv1D)
    known = {name.split(".")[-1] for name, part in model.named_modules() if isinstance(part, kinds)}
    if unknown := set(config.lora_targets) - known:
        raise ValueError(
            f"lora_targets: this model has no {', '.join(sorted(unknown))}, but "
            f"{', '.join(sorted(known))}"
        )
    learnt = wholly_new(model, new)
    left = sorted(name for name in new if not any(name.startswith(f"{part}.") for part in learnt))
    if left:
        command.log(f"warning: under --lora this stays as it starts: {', '.join(left)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's use of transformers
        wrapped = get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM" if config.task == "causal" else None,
                r=config.lora_rank,
                lora_alpha=config.lora_alpha,
                lora_dropout=config.lora_dropout,
                target_modules=config.lora_targets or None,
                # What starts at random is learnt as a whole.
                modules_to_save=sorted(learnt) or None,
                fan_in_fan_out=any(isinstance(part, Conv1D) for part in model.modules()),
            ),
        )
    # Else every checkpoint asks the hub for the configuration of that name.
    wrapped.peft_config["default"].base_model_name_or_path = None
    trainable, whole = wrapped.get_nb_trainable_parameters()
    log(f"trainable   {trainable:,} parameters, {trainable / whole:.2%}")
    return wrapped


def wholly_new(model: torch.nn.Module, new: set[str]) -> set[str]:
    """The outermost modules all of whose parameters are among these."""
    found: set[str] = set()
    for name, part in model.named_modules():
        inside = {f"{name}.{parameter}" for parameter, _ in part.named_parameters()}
        if name and inside and inside <= new and not any(name.startswith(f"{f}.") for f in found):
            found.add(name)
    return found


def make_optimizer(config: FinetuneConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW without weight decay of vectors: biases and norms."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.accelerate:
        return AdamW(groups, lr=config.lr, max_grad_norm=config.max_grad_norm or None)
    return torch.optim.AdamW(groups, lr=config.lr)


def make_trainer(
    config: FinetuneConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    train_set: Dataset | None,
    val_set: Dataset | None,
    run_dir: Path | None,
) -> FinetuneTrainer:
    from transformers import EarlyStoppingCallback, PrinterCallback, TrainingArguments

    from fastllm.integrations.trainer import FinetuneTrainer, Watch

    evaluating = "no" if val_set is None else "steps" if config.eval_interval else "epoch"
    keep_best = config.patience > 0
    arguments = TrainingArguments(
        output_dir=str(run_dir / "checkpoints") if run_dir else "unused",
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.grad_accum,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.lr,
        lr_scheduler_type=(
            "constant_with_warmup" if config.lr_schedule == "constant" else config.lr_schedule
        ),
        warmup_steps=config.warmup_steps,
        max_grad_norm=0 if config.accelerate else config.max_grad_norm,  # our AdamW clips itself
        seed=config.seed,
        use_cpu=True,
        bf16=config.precision == "bf16",
        activation_checkpointing=config.gradient_checkpointing,
        logging_steps=config.log_interval,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="all" if config.packing else "non_padding",
        eval_strategy=evaluating,
        eval_steps=config.eval_interval or None,
        eval_on_start=val_set is not None and not config.resume,
        save_strategy=evaluating if keep_best else "steps",
        save_steps=(config.eval_interval or 500) if keep_best else config.save_interval,
        save_total_limit=2 if keep_best else 1,  # the newest to go on from, and the best
        load_best_model_at_end=keep_best,
        metric_for_best_model="eval_loss" if keep_best else None,
        greater_is_better=False if keep_best else None,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = FinetuneTrainer(
        model,
        arguments,
        tokenizer=tokenizer,
        watch=Watch(run_dir, config.quiet),
        mlm_probability=config.mlm_probability if config.task == "mlm" else None,
        train_dataset=train_set,
        eval_dataset=val_set,
        optimizers=(make_optimizer(config, model), None),
    )
    trainer.remove_callback(PrinterCallback)
    if keep_best:
        trainer.add_callback(EarlyStoppingCallback(config.patience))
    if config.tensorboard and run_dir is not None:
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        trainer.add_callback(TensorBoardCallback(SummaryWriter(str(run_dir / "tensorboard"))))
    return trainer


def last_checkpoint(run_dir: Path) -> str:
    """The newest checkpoint that is whole.

    Raises:
        FileNotFoundError: there is none.
    """
    # Written after everything else of its checkpoint.
    states = list(run_dir.glob("checkpoints/checkpoint-*/trainer_state.json"))
    if not states:
        raise FileNotFoundError(f"{run_dir} holds no checkpoint to resume from")
    return str(max(states, key=lambda state: int(state.parent.name.split("-")[-1])).parent)


def save_model(trainer: FinetuneTrainer, folder: Path) -> None:
    """Writes model and tokenizer as transformers keeps them, LoRA merged; whole or not at all."""
    model: Any = trainer.model
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = True  # the Trainer switches it off
    aside = folder.with_name("model.partial")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    trainer.tokenizer.save_pretrained(aside)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)


def write_csv(metrics: Path, table: Path) -> None:
    """The lines of metrics.jsonl as a table."""
    lines = list(read_metrics(metrics))
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, lines[0] if lines else [])
        writer.writeheader()
        writer.writerows(lines)


def report(trainer: FinetuneTrainer, run_dir: Path, log: Callable[..., None]) -> None:
    """What a finished run has to say."""
    watch, best = trainer.watch, trainer.state.best_metric
    losses = [line["val_loss"] for line in read_metrics(run_dir / "metrics.jsonl")]
    losses = [loss for loss in losses if loss is not None]
    if losses:
        for name, loss in (("before", losses[0]), ("after", best or losses[-1])):
            log(f"{name:12}loss {loss:.4f}, perplexity {Evaluation(loss, 1).perplexity:,.3f}")
    if watch.training_s:
        log(f"speed       {watch.tokens / watch.training_s:,.0f} tokens/s")
    log(f"curves      {run_dir / 'loss.png'}, {run_dir / 'metrics.csv'}")
    log(f"model       {run_dir / 'model'}")


if __name__ == "__main__":
    main(sys.argv[1:])
