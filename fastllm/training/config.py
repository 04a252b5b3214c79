"""The settings of a training run: one definition for flags, config files, config.json and help."""

import argparse
import json
import sys
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from fastllm.command import CommandSettings, describe_error, parse_settings, underscored
from fastllm.device import Device, Precision
from fastllm.models.decoder import DecoderModel

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Count = Annotated[int, Field(ge=0, le=2**62)]
PositiveCount = Annotated[int, Field(ge=1, le=2**62)]
Probability = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class RunSettings(CommandSettings):
    """Base of the settings that a run keeps in its config.json, to be resumed with."""

    of_one_command: ClassVar[set[str]]
    """What is said of one command, not of the run."""
    fixed: ClassVar[list[str]]
    """What makes a run the run it is: a resumed run keeps these."""

    out_dir: Path | None = None
    """Folder of the run; runs/NAME of what it starts from unless given."""
    resume: bool = False
    """Continue the run in --out_dir, bit for bit."""
    config: Path | None = None
    """TOML file with any of these settings; flags override it."""

    @model_validator(mode="after")
    def _check_resume(self) -> "RunSettings":
        if self.resume and self.out_dir is None:
            raise ValueError("resume needs out_dir, the folder of the run to continue")
        return self

    def to_json(self) -> str:
        from fastllm import __version__

        settings = self.model_dump(mode="json", exclude=self.of_one_command)
        return json.dumps({"fastllm_version": __version__, **settings}, indent=2) + "\n"


Run = TypeVar("Run", bound=RunSettings)


class TrainConfig(RunSettings):
    """Train a small language model on a text file."""

    of_one_command: ClassVar = {
        *("config", "out_dir", "resume", "max_minutes", "profile", "quiet"),
        *("launcher", "max_failures", "zero_stage", "offload", "deepspeed_config"),
    }
    fixed: ClassVar = [
        *("max_seq_len", "overlap", "tokenizer", "vocab_size", "min_line_length", "dedup_lines"),
        *("val_fraction", "hidden_size", "num_layers", "num_heads", "dropout", "norm_first"),
        *("pos_encoding", "activation", "tie_word_embeddings", "batch_size", "grad_accum"),
        *("optimizer", "seed"),
    ]

    # Data
    file_path: Path | None = None
    """UTF-8 text to learn from; without it, Python's own documentation serves as a demo."""
    max_seq_len: Annotated[int, Field(ge=2, le=2**24)] = 32
    """Tokens in a training sequence, and the longest that the model can take."""
    overlap: Count = 0
    """Tokens that neighbouring sequences share."""
    tokenizer: Literal["char", "bpe", "wordpiece"] | Path = "char"
    """char, bpe or wordpiece, made from the text; or a tokenizer.json, or a folder with
    tokenizer.json or GPT-2's vocab.json and merges.txt."""
    vocab_size: Annotated[int, Field(ge=1, le=2**24)] = 4096
    """Vocabulary of a bpe or wordpiece tokenizer made from the text."""
    min_line_length: Count = 0
    """Leave out lines of fewer characters; 0 keeps all."""
    dedup_lines: bool = False
    """Leave out lines that came before; blank ones stay."""
    val_fraction: Probability = 0.1
    """Part of the text, at its end, that is held out for validation; 0 for none."""

    # Model
    hidden_size: Annotated[int, Field(ge=1, le=2**17)] = 64
    """Width of the model."""
    num_layers: Annotated[int, Field(ge=1, le=2**10)] = 2
    """Transformer blocks."""
    num_heads: Annotated[int, Field(ge=1, le=2**12)] = 2
    """Attention heads; a divisor of the width."""
    dropout: Probability = 0.1
    """Dropout probability everywhere."""
    norm_first: bool = True
    """Pre-LN blocks; --post_norm for Post-LN."""
    pos_encoding: Literal["sinusoidal", "learned"] = "sinusoidal"
    """How positions are encoded."""
    activation: Literal["gelu", "gelu_tanh", "relu", "silu", "swish", "leaky_relu"] = "gelu"
    """Activation of the MLPs."""
    tie_word_embeddings: bool = False
    """One matrix for the embeddings and the head: fewer parameters with a large vocabulary."""

    # Optimization
    batch_size: Annotated[int, Field(ge=1, le=2**24)] = 16
    """Sequences in a batch."""
    grad_accum: Annotated[int, Field(ge=1, le=2**24)] = 1
    """Batches whose gradients make one step, each token weighted alike."""
    epochs: PositiveCount = 1
    """Passes over the text."""
    max_steps: Count = 0
    """Stop after this many steps from the run's beginning, however many epochs that takes; 0 goes
    by the epochs."""
    max_minutes: NonNegative = 0
    """Stop, and save, after this many minutes of this command; 0 for no limit."""
    lr: Positive = 1e-3
    """Learning rate, after the warm-up."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    """How the learning rate falls over the run: cosine helps long runs, at a higher --lr."""
    min_lr: NonNegative = 0
    """Learning rate at the end of the schedule."""
    warmup_steps: Count = 0
    """Steps over which the learning rate rises from 0."""
    optimizer: Literal["adam", "adamw", "muon"] = "adam"
    """muon is for the blocks' matrices, with adamw for the rest."""
    muon_lr: Positive = 0.02
    """Learning rate of the matrices under muon; it follows the same schedule."""
    weight_decay: NonNegative = 0
    """Weight decay; decoupled, except for adam."""
    beta1: Probability = 0.9
    """Decay of Adam's first moment."""
    beta2: Probability = 0.999
    """Decay of Adam's second moment."""
    max_grad_norm: NonNegative = 1.0
    """Scale gradients down to this norm; 0 for no clipping."""
    seed: Count = 0
    """Fixes every random number of the run."""

    # Watching and saving
    log_interval: PositiveCount = 10
    """Steps between the lines of metrics.jsonl."""
    eval_interval: Count = 0
    """Steps between validations; 0 for one after each epoch and at the end."""
    patience: Count = 0
    """Stop after this many validations without a new best loss; 0 never does."""
    sample_interval: Count = 0
    """Steps between samples of text; 0 for one at the end."""
    save_interval: PositiveCount = 500
    """Steps between checkpoints."""
    keep_checkpoints: PositiveCount = 1
    """Newest checkpoints to keep; the one with the best validation loss stays as well."""
    profile: bool = False
    """Profile some steps into profile.json, for chrome://tracing or Perfetto."""
    quiet: bool = False
    """Print only warnings and errors."""

    # Machine
    device: Device = "cpu"
    """Where to train; the CPU serves where there is no CUDA."""
    threads: Annotated[int, Field(ge=0, le=4096)] = 0
    """CPU threads; 0 for OMP_NUM_THREADS, or the physical cores that this process may use."""
    num_workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """ProcessGroup that load data; 0 loads it in the training process. Under a launcher, how many
    training processes it starts; each of them loads its data itself."""
    precision: Precision = "fp32"
    """What matrix products round their operands to; weights and sums are fp32 always. bf16 is up to
    1.8 times as fast on CPUs that have it; auto takes it there. fp16 is for GPUs."""
    impl: Literal["auto", "ref", "cpu", "triton"] = "auto"
    """Implementation of the operations: auto takes the fastest that can serve."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward: less memory, more time."""
    parallel: Literal["ddp", "fsdp", "pipeline"] = "ddp"
    """How the processes that torchrun starts divide a step: each has the whole model and some of
    the sequences (ddp), a part of every weight (fsdp), or some of the layers (pipeline)."""
    launcher: Literal["ray", "deepspeed"] | None = None
    """Starts num_workers training processes: ray, on the cluster of RAY_ADDRESS if that is set,
    starts them again when one dies; deepspeed divides what they keep, and joins those that torchrun
    has started."""
    max_failures: Count = 3
    """Under ray: so often a run goes on from its last checkpoint after a process has died."""
    zero_stage: Annotated[int, Field(ge=1, le=3)] | None = None
    """Under deepspeed, each process keeps a part of the optimizer's moments (1, unless given), of
    the gradients as well (2), of the weights as well (3)."""
    offload: Literal["cpu"] | None = None
    """Under deepspeed: where the optimizer works, and stage 3 keeps the weights."""
    deepspeed_config: Path | None = None
    """Under deepspeed: its settings, instead of deepspeed.json in the run's folder."""

    @model_validator(mode="after")
    def _check_together(self) -> "TrainConfig":
        if self.overlap >= self.max_seq_len:
            raise ValueError(
                f"overlap ({self.overlap}) must be less than max_seq_len ({self.max_seq_len})"
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be divisible by "
                f"num_heads ({self.num_heads})"
            )
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr}) must not exceed lr ({self.lr})")
        if self.patience and not self.val_fraction:
            raise ValueError("patience needs a validation split: give a val_fraction above 0")
        self._check_launcher()
        return self

    def _check_launcher(self) -> None:
        if self.launcher != "deepspeed":
            for name in ("zero_stage", "offload", "deepspeed_config"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is for --launcher deepspeed, which was not given")
            return
        refused = {
            f"parallel {self.parallel}": self.parallel != "ddp",
            "precision fp16": self.precision == "fp16",
            "optimizer muon": self.optimizer == "muon",
        }
        for what, is_set in refused.items():
            if is_set:
                raise ValueError(  # it may be the resumed run's, so that no flag says it
                    f"{what} and the launcher deepspeed exclude each other; give another "
                    f"--{what.split()[0]}"
                )

    def build_model(self, vocab_size: int, padding_idx: int | None) -> DecoderModel:
        """An untrained model of these settings."""
        model = DecoderModel(
            vocab_size,
            self.hidden_size,
            self.num_layers,
            self.num_heads,
            self.max_seq_len,
            pos_encoding_learned=self.pos_encoding == "learned",
            embedding_dropout_p=self.dropout,
            attn_dropout_p=self.dropout,
            mlp_dropout_p=self.dropout,
            mlp_activation=self.activation,
            norm_first=self.norm_first,
            padding_idx=padding_idx,
            tie_word_embeddings=self.tie_word_embeddings,
        )
        model.gradient_checkpointing = self.gradient_checkpointing
        return model


def parse_train_config(arguments: list[str]) -> TrainConfig:
    """As `parse_run_settings`, for `train`."""
    return parse_run_settings(TrainConfig, arguments)


def parse_run_settings(settings_class: type[Run], arguments: list[str]) -> Run:
    """Settings from defaults, the resumed run, the config file and the flags, later ones winning.

    Exits with a message where they are wrong.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    first.add_argument("--out_dir", type=Path)
    first.add_argument("--resume", action="store_true")
    flags, _ = first.parse_known_args(underscored(arguments))
    given = read_toml(flags.config) if flags.config else {}
    run_dir = flags.out_dir or given.get("out_dir")
    if not run_dir or not (flags.resume or given.get("resume")):
        return parse_settings(settings_class, arguments, **given)
    try:
        saved = read_config(Path(run_dir) / "config.json", settings_class)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: cannot resume: {error}") from None
    kept = saved.model_dump(exclude=settings_class.of_one_command)
    config = parse_settings(settings_class, arguments, **{**kept, **given})
    for name in settings_class.fixed:
        old, new = getattr(saved, name), getattr(config, name)
        if old != new:
            raise SystemExit(
                f"error: the run in {run_dir} has {name} {old}; it cannot be resumed with {new}. "
                "Leave the flag out, or start a new run in another out_dir"
            )
    return config


def read_config(path: Path, settings_class: type[Run]) -> Run:
    """The settings in a run's config.json.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not hold settings; the message names the file and what is wrong.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("it holds no settings")
        settings.pop("fastllm_version", None)
        return settings_class(**settings)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: {path.parent} holds no run") from None
    except (ValidationError, TypeError) as error:
        raise ValueError(f"{path} is not a run's config.json: {describe_error(error)}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a run's config.json: {error}") from None


def read_toml(path: Path) -> dict[str, Any]:
    """The settings in a config file; exits with a message where it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SystemExit(f"error: cannot read the config file {path}: {error.strerror}") from None
    except ValueError as error:
        raise SystemExit(f"error: the config file {path} is not TOML: {error}") from None
