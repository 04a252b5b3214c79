"""The settings of a fine-tuning run."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from fastllm.training.config import (
    Count,
    NonNegative,
    OptimizationSettings,
    Positive,
    PositiveCount,
    Probability,
)

Words = Annotated[list[str], Field(default_factory=list)]
Task = Literal["causal", "mlm"]


class FinetuneConfig(OptimizationSettings):
    """Fine-tune a language model of transformers on a dataset."""

    of_one_command: ClassVar = ("config", "out_dir", "resume", "eval_only", "quiet")
    fixed: ClassVar = (
        "task", "mlm_probability", "text_column", "max_samples", "max_eval_samples",
        "val_fraction", "min_length", "max_seq_len", "packing", "end_token", "lora", "lora_rank",
        "lora_alpha", "lora_targets", "batch_size", "grad_accum", "seed",
    )  # fmt: skip
    positional: ClassVar = "dataset"
    aliases: ClassVar = {"file_path": "dataset"}
    examples: ClassVar = """
fastllm finetune book.txt --model gpt2
fastllm finetune chats.jsonl --text_column chat --model FOLDER --lora
fastllm finetune --model gpt2 --dataset wikitext wikitext-2-raw-v1
fastllm finetune --resume --out_dir runs/gpt2
"""
    groups: ClassVar = {
        "Model": "model tokenizer task mlm_probability",
        "Data": "dataset eval_dataset text_column val_fraction max_samples max_eval_samples "
        "min_length max_seq_len packing end_token num_proc",
        "LoRA": "lora lora_rank lora_alpha lora_dropout lora_targets",
        "Length of the run": "epochs max_steps patience eval_only",
        "Optimization": "batch_size grad_accum lr lr_schedule warmup_steps weight_decay "
        "max_grad_norm seed",
        "The run's folder": "out_dir resume config log_interval eval_interval save_interval "
        "tensorboard quiet",
        "Machine": "threads precision gradient_checkpointing accelerate",
    }

    # Model
    model: str = ""
    """A folder, a name on the hub or a .gguf file; a config.json, or a folder with nothing else,
    for random weights."""
    tokenizer: str | None = None
    """A folder, a name on the hub or a tokenizer.json; by default the model's own."""
    task: Task | None = None
    """Predict the next token (causal) or masked ones (mlm); by default the one that the
    architecture is made for."""
    mlm_probability: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Fraction of the tokens to mask and predict; for mlm."""

    # Data
    dataset: Words
    """UTF-8 texts, or .jsonl, .json, .csv or .parquet, each also compressed (.gz, .xz, .zst):
    files, folders or patterns. Or a dataset: a name on the hub or its folder, optionally followed
    by a configuration: `wikitext wikitext-2-raw-v1`."""
    eval_dataset: Words
    """Evaluate on this dataset, given like --dataset; by default on the validation split of
    --dataset, or else on a val_fraction of it."""
    val_fraction: Probability = 0.1
    """Fraction of the sequences, at their end, held out for evaluation if no other data is; 0 for
    none."""
    text_column: str = "text"
    """Column of the dataset that contains the text."""
    max_samples: Count = 0
    """Use only the first documents, at most this many, and download only these; 0 for all."""
    max_eval_samples: Count = 0
    """Evaluate on the first sequences only, at most this many; 0 for all."""
    min_length: Count = 0
    """Drop documents with fewer characters."""
    max_seq_len: Annotated[int, Field(ge=4, le=2**24)] = 256
    """Tokens in a sequence."""
    packing: bool = True
    """Join the documents and cut them into sequences; otherwise each document is a sequence,
    truncated and padded."""
    end_token: bool | None = None
    """End every document with the end token; by default all but the lines of texts. Switch it off
    for other datasets of lines, such as wikitext."""
    num_proc: Annotated[int, Field(ge=1, le=1024)] = 1
    """Processes that tokenize."""

    # LoRA
    lora: bool = False
    """Train small matrices beside the frozen weights; saving the model merges them."""
    lora_rank: Annotated[int, Field(ge=1, le=2**16)] = 8
    """Rank of these matrices."""
    lora_alpha: PositiveCount = 16
    """Scale their product by alpha / rank."""
    lora_dropout: Probability = 0
    """Dropout before these matrices."""
    lora_targets: Words
    """Names of the modules to adapt, such as c_attn; by default peft's choice."""

    # Optimization, logging and saving: other defaults than in training
    batch_size: Annotated[int, Field(ge=1, le=2**24)] = 8
    """Sequences in a batch."""
    lr: Positive = 5e-5
    """Learning rate, after the warm-up."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "linear"
    """How the learning rate decays over the run."""
    weight_decay: NonNegative = 0
    """Decoupled weight decay of the matrices."""
    eval_interval: Count = 0
    """Steps between evaluations; 0 to evaluate after each epoch. The model is also evaluated before
    training."""
    patience: Count = 0
    """Stop after this many evaluations without a new best loss, and keep the best model; then a
    checkpoint is saved at each evaluation instead of each save_interval. 0 to never stop early."""
    eval_only: bool = False
    """Evaluate the model and exit; writes nothing."""
    tensorboard: bool = False
    """Also write the curves for TensorBoard, into the run's folder."""

    # Machine
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """Type that matrix products round their operands to; weights and sums are always fp32. auto
    uses bf16 on CPUs that support it."""
    accelerate: bool = True
    """Compute with fastllm's kernels and optimizer; --no-accelerate uses transformers alone."""

    @field_validator("dataset", "eval_dataset", "lora_targets", mode="before")
    @classmethod
    def _one_word_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_together(self) -> FinetuneConfig:
        if not self.model:
            raise ValueError("give a --model: a folder, a name on the hub, or a config.json")
        if self.eval_only and self.resume:
            raise ValueError(
                "--eval_only evaluates --model; leave out --resume, and give --model the model "
                "folder of the run"
            )
        if not self.dataset and not (self.eval_only and self.eval_dataset):
            raise ValueError("give a --dataset: files, a folder or a name on the hub to train on")
        return self
