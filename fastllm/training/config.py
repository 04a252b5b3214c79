"""The settings of a training run: one definition for flags, config files, config.json and help."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from fastllm.command import describe_error, make_settings
from fastllm.flags import CommandSettings, Device, Precision, Threads, did_you_mean, read_flags
from fastllm.models.architectures import ARCHITECTURES, ArchitectureName
from fastllm.models.config import DecoderConfig, MlpName, NormName, PosEncoding
from fastllm.training.presets import DEFAULT_PRESET, PRESETS, PresetName, is_by_hand
from fastllm.version import __version__

if TYPE_CHECKING:
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


def _file_names(value: Any) -> Any:
    if value == "" or (isinstance(value, list) and "" in value):
        raise ValueError("must not be empty")
    return [value] if isinstance(value, (str, Path)) else value


FileNames = Annotated[list[Path], BeforeValidator(_file_names)]


class RunSettings(CommandSettings):
    """Base of the settings that a run keeps in its config.json, to be resumed with."""

    of_one_command: ClassVar[Collection[str]]
    """Settings of one command, not of the run: config.json leaves them out."""
    fixed: ClassVar[Collection[str]]
    """Settings that a resumed run must keep."""

    out_dir: Path | None = None
    """Folder of the run; by default a new one, runs/NAME."""
    resume: bool = False
    """Continue the run in --out_dir, bit for bit."""
    config: Path | None = None
    """TOML file with any of these settings; flags override it."""

    @model_validator(mode="after")
    def _check_resume(self) -> RunSettings:
        if self.resume and self.out_dir is None:
            raise ValueError("--resume needs --out_dir, the folder of the run to continue")
        return self

    @classmethod
    def of_new_run(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The settings that a new run is made from, when these were given."""
        return given

    @classmethod
    def of_saved_run(cls, saved: dict[str, Any]) -> dict[str, Any]:
        """The settings of a run whose config.json, of any version, holds these."""
        return saved

    def to_json(self) -> str:
        """The settings of the run, with the package's version: the text of config.json."""
        settings = self.model_dump(mode="json", exclude=set(self.of_one_command))
        return json.dumps({"fastllm_version": __version__, **settings}, indent=2) + "\n"


AnyRun = TypeVar("AnyRun", bound=RunSettings)


class OptimizationSettings(RunSettings):
    """How a run optimizes, logs and saves: the settings that training and fine-tuning share."""

    # Optimization
    batch_size: Annotated[int, Field(ge=1, le=2**24)] = 16
    """Sequences in a batch."""
    grad_accum: Annotated[int, Field(ge=1, le=2**24)] = 1
    """Batches whose gradients add up to one step; every token has the same weight."""
    epochs: PositiveCount = 1
    """Passes over the training data."""
    max_steps: Count = 0
    """Train up to this step, counted from the start of the run, instead of a number of epochs; 0 to
    go by the epochs."""
    lr: Positive = 1e-3
    """Learning rate, after the warm-up."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    """How the learning rate decays over the run; cosine helps long runs, with a higher --lr."""
    warmup_steps: Count = 0
    """Steps over which the learning rate rises from 0."""
    weight_decay: NonNegative = 0
    """Weight decay of the matrices; decoupled, except for adam."""
    max_grad_norm: NonNegative = 1.0
    """Clip gradients to this norm; 0 for no clipping."""
    seed: Count = 0
    """Seed of every random number of the run."""

    # Logging and saving
    log_interval: PositiveCount = 10
    """Steps between the lines of metrics.jsonl."""
    eval_interval: Count = 0
    """Steps between validations; 0 to validate after each epoch."""
    patience: Count = 0
    """Stop after this many validations without a new best loss; 0 to never stop early."""
    save_interval: PositiveCount = 500
    """Steps between checkpoints."""
    quiet: bool = False
    """Print only warnings and errors."""

    # Machine
    threads: Threads = 0
    """CPU threads; 0 for OMP_NUM_THREADS, or the physical cores that this process may use."""
    precision: Precision = "fp32"
    """Type that matrix products round their operands to; weights and sums are always fp32. bf16 is
    up to 1.8 times as fast on CPUs that support it; auto uses it there. fp16 is for GPUs."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward: less memory, more time."""


class TrainConfig(OptimizationSettings):
    """Train a small language model on a text file."""

    joins_processes: ClassVar = True
    of_one_command: ClassVar = (
        "config", "out_dir", "resume", "preset", "max_minutes", "dry_run", "profile", "quiet",
        "launcher", "max_failures", "zero_stage", "offload", "deepspeed_config",
    )  # fmt: skip
    fixed: ClassVar = (
        "max_seq_len", "overlap", "tokenizer", "vocab_size", "min_line_length", "dedup_lines",
        "val_fraction", "arch", "hidden_size", "num_layers", "num_heads", "num_kv_heads",
        "head_dim", "mlp_intermediate_size", "dropout", "norm", "norm_first", "pos_encoding",
        "rope_base", "activation", "mlp", "qk_norm", "window", "tie_word_embeddings",
        "lm_head_bias", "batch_size", "grad_accum", "optimizer", "seed",
    )  # fmt: skip
    positional: ClassVar = "file_path"
    aliases: ClassVar = {"dataset": "file_path"}
    examples: ClassVar = """
fastllm train book.txt
fastllm train book.txt --preset medium
fastllm train book.txt --preset medium --arch llama
fastllm train book.txt --out_dir runs/wide --hidden_size 128 --epochs 3
fastllm train --resume --out_dir runs/wide
torchrun --nproc_per_node 2 -m fastllm.train --file_path book.txt
"""
    groups: ClassVar = {
        "Size": "preset",
        "Data": "file_path text_column tokenizer vocab_size max_seq_len overlap min_line_length "
        "dedup_lines val_fraction",
        "Model": "arch hidden_size num_layers num_heads num_kv_heads head_dim "
        "mlp_intermediate_size dropout norm norm_first pos_encoding rope_base activation mlp "
        "qk_norm window tie_word_embeddings lm_head_bias",
        "Length of the run": "epochs max_steps max_minutes patience dry_run",
        "Optimization": "batch_size grad_accum lr lr_schedule warmup_steps min_lr optimizer "
        "muon_lr weight_decay beta1 beta2 max_grad_norm seed",
        "The run's folder": "out_dir resume config log_interval eval_interval save_interval "
        "sample_interval keep_checkpoints quiet profile",
        "Machine": "threads device precision gradient_checkpointing num_workers impl",
        "Several processes": "parallel launcher max_failures zero_stage offload deepspeed_config",
    }

    preset: PresetName | None = None
    """Settings that suit each other, which flags override. tiny: 0.1 million parameters, 10 seconds
    on two cores. small: 1 million parameters, a minute on two cores. medium: 12 million parameters,
    40 minutes on two cores, less on more. demo: 0.1 million parameters, a few seconds. By default
    small, unless flags of the model or of its training are given, which start from the defaults
    below."""

    # Data
    file_path: FileNames | None = None
    """UTF-8 texts to train on, or .jsonl, .json, .csv or .parquet, each also compressed (.gz, .xz,
    .zst): files, folders or patterns; by default a demo corpus, Python's own documentation."""
    text_column: str = "text"
    """Column of tables that holds the text."""
    max_seq_len: Annotated[int, Field(ge=2, le=2**24)] = 32
    """Tokens in a training sequence, and the longest context of the model."""
    overlap: Count = 0
    """Tokens shared by neighbouring sequences."""
    tokenizer: Literal["char", "bpe", "wordpiece"] | Path = "char"
    """char, bpe or wordpiece, trained on the text; or a tokenizer.json, or a folder with
    tokenizer.json or GPT-2's vocab.json and merges.txt."""
    vocab_size: Annotated[int, Field(ge=1, le=2**24)] = 4096
    """Vocabulary size of a bpe or wordpiece tokenizer trained on the text."""
    min_line_length: Count = 0
    """Drop lines with fewer characters; 0 keeps all."""
    dedup_lines: bool = False
    """Drop repeated lines; blank ones stay."""
    val_fraction: Probability = 0.1
    """Fraction of the text, at its end, held out for validation; 0 for no validation."""

    # Model
    arch: ArchitectureName | None = None
    """Build the model like a known one; the flags below override its norms, positions and MLPs.
    gpt2: learned positions, layer norms, GELU. llama: RMS norms, rotary positions, SwiGLU, no
    biases. qwen3: that with norms of queries and keys. gemma3: that with GeGLU, norms after each
    part too, and a window in five of six layers. nanochat: llama with ReLU², norms of queries and
    keys, norms without weights, and capped logits."""
    hidden_size: Annotated[int, Field(ge=1, le=2**17)] = 64
    """Width of the model."""
    num_layers: Annotated[int, Field(ge=1, le=2**10)] = 2
    """Transformer blocks."""
    num_heads: Annotated[int, Field(ge=1, le=2**12)] = 2
    """Attention heads; must divide the width unless --head_dim is given."""
    num_kv_heads: Annotated[int, Field(ge=0, le=2**12)] = 0
    """Heads of keys and values, which the attention heads share; must divide their number. 0 for as
    many."""
    head_dim: Annotated[int, Field(ge=0, le=2**12)] = 0
    """Width of an attention head; 0 for an equal part of the model's."""
    mlp_intermediate_size: Annotated[int, Field(ge=0, le=2**20)] = 0
    """Width of the MLPs; 0 for 4 times that of the model, or 8/3 if they are gated."""
    dropout: Probability = 0.1
    """Dropout probability throughout the model."""
    norm: NormName = "layer"
    """Layer norms, or RMS norms."""
    norm_first: bool = True
    """Pre-LN blocks; --post_norm for Post-LN."""
    pos_encoding: PosEncoding = "sinusoidal"
    """Positional encoding: added to the embeddings (sinusoidal, learned), rotating queries and keys
    (rope), or none."""
    rope_base: Positive = 10000.0
    """Base of the rotary angles; larger for longer contexts."""
    activation: Literal[
        "gelu", "gelu_tanh", "relu", "silu", "swish", "leaky_relu", "relu_squared"
    ] = "gelu"
    """Activation of the MLPs, unless --mlp names one."""
    mlp: MlpName | None = None
    """An activation, or a gated MLP: swiglu, geglu, geglu_tanh or reglu."""
    qk_norm: bool = False
    """RMS norms of each head's queries and keys."""
    window: Count = 0
    """Tokens that each one attends to, itself and those before it; 0 for all."""
    tie_word_embeddings: bool = False
    """Share one matrix between the embeddings and the head: fewer parameters when the vocabulary is
    large."""
    lm_head_bias: bool = False
    """A bias in the head. Formats of other programs have no place for it: export widens the model
    instead."""

    # Optimization
    max_minutes: NonNegative = 0
    """Save and stop after this many minutes of this command; 0 for no limit."""
    dry_run: bool = False
    """Measure some steps on the data and say how long the run will take; nothing is saved."""
    min_lr: NonNegative = 0
    """Learning rate at the end of the schedule."""
    optimizer: Literal["adam", "adamw", "muon"] = "adam"
    """muon updates the matrices of the blocks, and adamw everything else."""
    muon_lr: Positive = 0.02
    """Learning rate of muon's matrices; it follows the same schedule."""
    beta1: Probability = 0.9
    """Decay rate of Adam's first moment."""
    beta2: Probability = 0.999
    """Decay rate of Adam's second moment."""

    # Logging and saving
    sample_interval: Count = 0
    """Steps between text samples; 0 for one at the end."""
    keep_checkpoints: PositiveCount = 1
    """Number of newest checkpoints to keep; the one with the best validation loss is kept too."""
    profile: bool = False
    """Profile a few steps into profile.json, for chrome://tracing or Perfetto."""

    # Machine
    device: Device = "cpu"
    """Device to train on; falls back to the CPU if CUDA is not available."""
    num_workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """Processes that load data; 0 to load it in the training process. With a launcher, the number
    of training processes instead; each loads its own data."""
    impl: Literal["auto", "ref", "cpu", "triton"] = "auto"
    """Implementation of the operations; auto uses the fastest that supports them."""
    parallel: Literal["ddp", "fsdp", "pipeline"] = "ddp"
    """How the processes started by torchrun share a step: each has the whole model and a shard of
    the sequences (ddp), and of every weight as well (fsdp), or some of the layers (pipeline)."""
    launcher: Literal["ray", "deepspeed"] | None = None
    """Start num_workers training processes. ray: on the cluster of RAY_ADDRESS if set, with
    restarts when a worker dies. deepspeed: with ZeRO sharding; also joins processes started by
    torchrun."""
    max_failures: Count = 3
    """ray: maximum number of restarts from the last checkpoint after a worker dies."""
    zero_stage: Annotated[int, Field(ge=1, le=3)] | None = None
    """deepspeed: shard the optimizer's moments (1, the default), the gradients as well (2), or the
    weights as well (3)."""
    offload: Literal["cpu"] | None = None
    """deepspeed: where the optimizer runs, and where stage 3 keeps the weights."""
    deepspeed_config: Path | None = None
    """deepspeed: a configuration file to use instead of deepspeed.json in the run's folder."""

    @classmethod
    def of_new_run(cls, given: dict[str, Any]) -> dict[str, Any]:
        return given if is_by_hand(given) else {"preset": DEFAULT_PRESET, **given}

    @classmethod
    def of_saved_run(cls, saved: dict[str, Any]) -> dict[str, Any]:
        # Heads had a bias, except those of an architecture, before there was a setting for it.
        return {"lm_head_bias": saved.get("arch") is None, **saved}

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, values: dict[str, Any]) -> dict[str, Any]:
        preset, arch = PRESETS.get(str(values.get("preset"))), values.get("arch")
        chosen = dict(preset.settings) if preset else {}
        if preset and "epochs" in values:
            chosen["max_steps"] = 0  # which would go first
        if arch in ARCHITECTURES:
            chosen.update(flags_of(arch))
            if "activation" in values:
                del chosen["mlp"]
        return {**chosen, **values}

    @model_validator(mode="after")
    def _check_together(self) -> TrainConfig:
        if self.preset and self.resume:
            raise ValueError("--preset is for new runs: leave it out to resume one")
        if self.overlap >= self.max_seq_len:
            raise ValueError(
                f"--overlap ({self.overlap}) must be less than --max_seq_len ({self.max_seq_len})"
            )
        try:
            self.decoder_config(1, None)
        except ValueError as error:  # settings that cannot be combined, which are flags here
            names = "|".join(type(self).model_fields)
            raise ValueError(re.sub(rf"\b({names})\b", r"--\1", str(error))) from None
        if self.min_lr > self.lr:
            raise ValueError(f"--min_lr ({self.min_lr}) must not exceed --lr ({self.lr})")
        if self.patience and not self.val_fraction:
            raise ValueError("--patience needs a validation split: give a --val_fraction above 0")
        self._check_launcher()
        return self

    def _check_launcher(self) -> None:
        if self.launcher and self.dry_run:
            raise ValueError(
                "--dry_run measures in this process or in those of torchrun; leave --launcher out"
            )
        if self.launcher != "deepspeed":
            for name in ("zero_stage", "offload", "deepspeed_config"):
                if getattr(self, name) is not None:
                    raise ValueError(f"--{name} needs --launcher deepspeed")
            return
        refused = {
            f"parallel {self.parallel}": self.parallel != "ddp",
            "precision fp16": self.precision == "fp16",
            "optimizer muon": self.optimizer == "muon",
        }
        for setting, is_set in refused.items():
            if is_set:
                raise ValueError(  # a resumed run may have it in its config.json, without a flag
                    f"--{setting} and --launcher deepspeed exclude each other; give another "
                    f"--{setting.split()[0]}"
                )

    def build_model(self, vocab_size: int, padding_idx: int | None) -> DecoderModel:
        """An untrained model with these settings."""
        from fastllm.models.decoder import DecoderModel

        model = DecoderModel.from_config(self.decoder_config(vocab_size, padding_idx))
        model.gradient_checkpointing = self.gradient_checkpointing
        return model

    def decoder_config(self, vocab_size: int, padding_idx: int | None) -> DecoderConfig:
        """The configuration of the model.

        Raises:
            ValueError: the settings cannot be combined.
        """
        given: dict[str, Any] = {
            "vocab_size": vocab_size,
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "mlp_intermediate_size": self.mlp_intermediate_size,
            "max_seq_len": self.max_seq_len,
            "norm": self.norm,
            "pos_encoding": self.pos_encoding,
            "rope_base": self.rope_base,
            "mlp": self.mlp or self.activation,
            "window": self.window or None,
            "embedding_dropout_p": self.dropout,
            "attn_dropout_p": self.dropout,
            "mlp_dropout_p": self.dropout,
            "padding_idx": padding_idx,
            "tie_word_embeddings": self.tie_word_embeddings,
            "lm_head_bias": self.lm_head_bias,
        }
        if not self.norm_first:
            given["norm_order"] = "post"
        if not self.qk_norm:
            given["qk_norm"] = None
        elif self.arch in (None, "gpt2", "llama"):  # the others have their own kind
            given["qk_norm"] = "weight"
        if not self.window or self.pos_encoding != "rope":
            given["local_rope_base"] = None
        if self.arch is None:
            return DecoderConfig(**given, embedding_scale=math.sqrt(self.hidden_size))
        return ARCHITECTURES[self.arch](**given)


def flags_of(arch: ArchitectureName) -> dict[str, Any]:
    """The settings of `TrainConfig` that an architecture chooses."""
    config = ARCHITECTURES[arch](vocab_size=1, hidden_size=2, num_layers=1, num_heads=1)
    flags = {
        "norm": config.norm,
        "pos_encoding": config.pos_encoding,
        "rope_base": config.rope_base,
        "mlp": config.mlp,
        "qk_norm": config.qk_norm is not None,
        "window": config.window or 0,
    }
    # A preset may tie them for the sake of a small model.
    return {**flags, "tie_word_embeddings": True} if config.tie_word_embeddings else flags


@dataclass(frozen=True)
class ResolvedRun:
    """A training run: its settings as given, and what they resolved to on this machine.

    Attributes:
        run_dir: the folder of the run.
        device: the CPU if CUDA was asked for and is not available.
        precision: never auto.
        resume: whether the run continues from its last checkpoint, as it also does when torchrun
            restarts it.
        threads: CPU threads of this process.
        data_workers: processes that load data for this one.
    """

    config: TrainConfig
    run_dir: Path
    device: Device
    precision: Precision
    resume: bool
    threads: int
    data_workers: int

    @property
    def recorded(self) -> TrainConfig:
        """The settings that config.json records, whenever it is written.

        They are as given, except that device, precision and num_workers are what they resolved to:
        a run that began with precision auto resumes with the precision it computed in. Paths are
        absolute, for commands in another current folder.
        """
        from fastllm.data.sources import absolute  # here: it needs PyTorch, and help does not

        paths: dict[str, Path | list[Path]] = {
            name: value.absolute()
            for name in ("tokenizer", "deepspeed_config")
            if isinstance(value := getattr(self.config, name), Path)
        }
        if self.config.file_path:
            paths["file_path"] = [absolute(path) for path in self.config.file_path]
        resolved = {
            **paths,
            "device": self.device,
            "precision": self.precision,
            "num_workers": self.data_workers,
        }
        return self.config.model_copy(update=resolved)


def parse_train_config(arguments: list[str]) -> TrainConfig:
    """The settings of `train`; see `parse_run_settings`."""
    return parse_run_settings(TrainConfig, arguments)


def parse_run_settings(settings_class: type[AnyRun], arguments: list[str]) -> AnyRun:
    """Settings from the defaults, the resumed run, the config file and the flags; later ones win.

    Exits with a message if they are invalid.
    """
    given = read_given(settings_class, arguments)
    run_dir = given.get("out_dir")
    if not run_dir or not given.get("resume"):
        return make_settings(settings_class, settings_class.of_new_run(given))
    try:
        saved = read_config(Path(run_dir) / "config.json", settings_class)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: cannot resume: {error}") from None
    kept = saved.model_dump(exclude=set(settings_class.of_one_command))
    if "epochs" in given:
        kept["max_steps"] = 0  # which would go first
    config = make_settings(settings_class, {**kept, **given})
    for name in settings_class.fixed:
        old, new = getattr(saved, name), getattr(config, name)
        if old != new and not (
            isinstance(old, Path) and isinstance(new, Path) and old.resolve() == new.resolve()
        ):
            raise SystemExit(
                f"error: the run in {run_dir} has {name} {old}; it cannot be resumed with {new}. "
                "Leave the flag out, or start a new run in another out_dir"
            )
    return config


def read_given(settings_class: type[RunSettings], arguments: list[str]) -> dict[str, Any]:
    """The settings in the flags and in the file of --config; flags override the file.

    Exits with a message if they cannot be read.
    """
    flags = read_flags(settings_class, arguments)
    file = read_toml(Path(flags["config"]), settings_class) if "config" in flags else {}
    return {**file, **flags}


def read_config(path: Path, settings_class: type[AnyRun]) -> AnyRun:
    """The settings in a run's config.json.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its content is not a run's settings; the message names the file and the problem.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(settings, dict):
            raise ValueError("expected a JSON object")
        settings.pop("fastllm_version", None)
        return settings_class(**settings_class.of_saved_run(settings))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: {path.parent} holds no run") from None
    except (ValidationError, TypeError) as error:
        raise ValueError(f"{path} is not a run's config.json: {describe_error(error)}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a run's config.json: {error}") from None


def read_toml(path: Path, settings_class: type[RunSettings]) -> dict[str, Any]:
    """The settings in a config file; exits with a message if it cannot be read."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SystemExit(f"error: cannot read the config file {path}: {error.strerror}") from None
    except ValueError as error:
        raise SystemExit(f"error: the config file {path} is not TOML: {error}") from None
    settings = {settings_class.aliases.get(name, name): value for name, value in found.items()}
    for name in settings:
        if name not in settings_class.model_fields:
            near = did_you_mean(settings_class, name)
            raise SystemExit(f"error: {path}: {name}: there is no such setting{near}")
    return settings
