"""A training run from its settings to its report: folder, data, model, training."""

import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from fastllm import command
from fastllm.command import errors_in_one_line
from fastllm.data.loader import TextDataset
from fastllm.data.text import clean_lines, read_text
from fastllm.device import choose_device, choose_precision
from fastllm.files import replace_file
from fastllm.models.decoder import DecoderModel
from fastllm.ops import implementation_line
from fastllm.ops.dispatch import ImplementationError, use
from fastllm.threads import set_threads
from fastllm.tokenization import (
    SimpleCharacterTokenizer,
    SubwordTokenizer,
    Tokenizer,
    load_tokenizer,
)
from fastllm.training.checkpoint import CheckpointError, find_checkpoint, load_model
from fastllm.training.config import RunSettings, TrainConfig
from fastllm.training.distributed import (
    SINGLE,
    ProcessError,
    ProcessGroup,
    process_group,
)
from fastllm.training.evaluation import bits_per_character
from fastllm.training.loop import Trainer, TrainingError, derive_seed
from fastllm.training.memory import estimate_memory_mb
from fastllm.training.metrics import plot_losses, resident_mb

Log = Callable[..., None]


def train(config: TrainConfig, begun: Callable[[Trainer], None] = lambda trainer: None) -> None:
    """Trains in this process, with the others of its run if there are any.

    Args:
        begun: is told of the trainer, before it trains.
    """
    threads = set_threads(config.threads)
    bad_input = (ImplementationError, CheckpointError, OSError, ValueError, KeyError, ImportError)
    with contextlib.ExitStack() as stack:
        with errors_in_one_line(ProcessError, *bad_input):
            # FASTLLM_IMPL speaks where the flag is silent.
            if config.impl != "auto":
                stack.enter_context(use(config.impl))
            config.device = choose_device(config.device)
            group = stack.enter_context(
                process_group(config.device, even_alone=config.launcher == "deepspeed")
            )
            stack.enter_context(errors_in_one_line(ProcessError))
            stack.enter_context(group.reporting_peer_loss())
            group.check_agreement(config.model_dump(mode="json"))
            if config.launcher:  # it has started its processes; none is for data
                config.num_workers = 0
            info: Log = command.log if group.is_main and not config.quiet else lambda *parts: None
            operations = implementation_line(config.device)
            if config.parallel != "ddp" and group.size == 1:
                info(
                    f"warning: parallel {config.parallel} divides a step among several processes, "
                    "and this is one; torchrun or --launcher ray start several"
                )
            run_dir, config.resume = group.broadcast(lambda: begin_or_go_on(config))
            trainer = prepare(config, run_dir, info, group)
            info(f"run         {run_dir}")
            info(f"threads     {threads}{' in each process' if group.size > 1 else ''}")
            info(f"operations  {operations}{trainer.engine.caveat}")
            begun(trainer)
        with errors_in_one_line(CheckpointError, TrainingError, ImplementationError, OSError):
            trainer.train()
            if group.is_main:
                plot_losses(run_dir / "metrics.jsonl", run_dir / "loss.png")
        report(trainer, run_dir, info)
    if trainer.stopped_by:
        raise SystemExit(128 + trainer.stopped_by)


def begin_or_go_on(config: TrainConfig) -> tuple[Path, bool]:
    """The run's folder, and whether to resume the run in it.

    Where torchrun starts processes again, they go on from the last checkpoint; a note in the
    folder tells whether what is there is of this start of torchrun.

    Raises:
        ValueError: the folder holds another run, or there is none for a restart to find.
    """
    launch = torchrun_launch()
    if launch is None:
        return choose_run_dir(config, run_name(config)), config.resume
    if config.out_dir is None:
        raise ValueError("torchrun's --max_restarts needs --out_dir, where a restart finds the run")
    note = config.out_dir / "torchrun.txt"
    if note.exists() and note.read_text(encoding="utf-8") == launch:
        found = any(config.out_dir.glob("checkpoints/step-*"))
        if not config.quiet:
            where = "from the last checkpoint" if found else "from the beginning"
            command.log(f"torchrun has restarted this run {where}")
        return config.out_dir, found
    run_dir = choose_run_dir(config, "")
    run_dir.mkdir(parents=True, exist_ok=True)
    note.write_text(launch, encoding="utf-8")
    return run_dir, config.resume


def torchrun_launch() -> str | None:
    """What tells one start of torchrun from another; None where it starts nothing again."""
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return None
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    # Without an id, the first process always has the same agent.
    return f"{name} {socket.gethostname()} {os.getppid()}" if name == "none" else name


def run_name(config: TrainConfig) -> str:
    return config.file_path.stem if config.file_path else "demo"


def choose_run_dir(config: RunSettings, name: str) -> Path:
    """The folder of the run: the one given, or a new one, runs/NAME or runs/NAME-2 and so on.

    Raises:
        ValueError: it holds a run already, and that is not to be resumed.
    """
    if config.out_dir is not None:
        # A checkpoint whose writing was cut off is none.
        if any(config.out_dir.glob("checkpoints/[!w]*")) and not config.resume:
            raise ValueError(
                f"{config.out_dir} holds a run already; --resume continues it, another --out_dir "
                "keeps it"
            )
        return config.out_dir
    number = 1
    while (run_dir := Path("runs") / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return run_dir


def prepare(config: TrainConfig, run_dir: Path, log: Log, group: ProcessGroup = SINGLE) -> Trainer:
    """Everything that can go wrong before any work is lost: data, tokenizer, model, folder."""
    checkpoint = group.broadcast(lambda: find_checkpoint(run_dir)) if config.resume else None
    with group.main_first():  # it makes the files that all of them use
        parts = read(config, run_dir, checkpoint, log, group)
    group.check_agreement({"precision": config.precision})
    if config.launcher == "deepspeed" and config.deepspeed_config is None:
        config.deepspeed_config = run_dir / "deepspeed.json"
    return Trainer(config, *parts, run_dir, checkpoint, group)


def read(
    config: TrainConfig, run_dir: Path, checkpoint: Path | None, log: Log, group: ProcessGroup
) -> tuple[DecoderModel, Tokenizer, TextDataset, TextDataset | None]:
    """Model, tokenizer, and what to train and to validate on."""
    at_start = resident_mb()
    if checkpoint:
        model, tokenizer, _ = load_model(checkpoint)
        model.gradient_checkpointing = config.gradient_checkpointing
    device = config.device = choose_device(config.device)
    config.precision = choose_precision(config.precision, config.hidden_size, device)
    text = config.file_path or demo_text(run_dir, log)
    if not checkpoint:
        tokenizer = (
            make_tokenizer(config, text)
            if group.is_main
            else load_tokenizer(run_dir / "tokenizer.json")
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    dataset = TextDataset(
        text,
        tokenizer,
        config.max_seq_len,
        config.overlap,
        min_line_length=config.min_line_length,
        dedup_lines=config.dedup_lines,
        token_file=run_dir / "tokens.bin",
    )
    if len(dataset.tokens) < 2:
        raise ValueError(f"{text} has no text to learn from, after cleaning")
    train_set, val_set = dataset, None
    if config.val_fraction:
        train_set, val_set = dataset.split(config.val_fraction)
    with torch.device("meta"):
        sketch = config.build_model(tokenizer.vocab_size, tokenizer.pad_token_id)
    log(
        f"data        {text}: {len(dataset.tokens):,} tokens of {tokenizer.vocab_size:,} "
        f"kinds, {len(train_set):,} training sequences"
    )
    log(f"parameters  {sum(p.numel() for p in sketch.parameters()):,}")
    log(f"precision   {config.precision}")
    if device == "cpu" and (group.size == 1 or config.parallel == "ddp"):
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes on this machine
        part = config.model_copy(update={"batch_size": -(-config.batch_size // group.size)})
        memory = here * (at_start + estimate_memory_mb(sketch, part, torch.get_num_threads()))
        log(f"memory      about {memory:,.0f} MiB at its peak")
        there = psutil.virtual_memory().total / 2**20
        if memory > there:
            raise ValueError(
                f"training needs about {memory:,.0f} MiB of memory and this machine has "
                f"{there:,.0f}; choose a smaller model, batch_size or max_seq_len, or "
                "gradient_checkpointing"
            )
    if not checkpoint:
        torch.manual_seed(derive_seed(config.seed, "start"))
        model = config.build_model(tokenizer.vocab_size, tokenizer.pad_token_id)
    model.to(device)
    if group.is_main:
        if not checkpoint:
            tokenizer.save(run_dir / "tokenizer.json")
        with replace_file(run_dir / "config.json") as file:
            file.write(config.to_json().encode())
        if config.launcher == "deepspeed":
            from fastllm.integrations.deepspeed import write_settings

            write_settings(config, run_dir)
    return model, tokenizer, train_set, val_set


def demo_text(run_dir: Path, log: Log) -> Path:
    """Python's own documentation, as a file in the run's folder."""
    from pydoc_data.topics import topics

    path = run_dir / "demo.txt"
    if not path.exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(topics.values()), encoding="utf-8")
    log("No --file_path given: training on the demo corpus, Python's own documentation.")
    return path


def make_tokenizer(config: TrainConfig, text: Path) -> Tokenizer:
    """The tokenizer that the settings ask for, made from the text or loaded."""
    if isinstance(config.tokenizer, Path):
        return load_tokenizer(config.tokenizer)
    pieces = clean_lines(read_text(text), config.min_line_length, config.dedup_lines)
    if config.tokenizer == "char":
        return SimpleCharacterTokenizer.from_pieces(pieces)
    return SubwordTokenizer.train(pieces, config.tokenizer, config.vocab_size)


def report(trainer: Trainer, run_dir: Path, log: Log) -> None:
    """What a finished run has to say."""
    progress = trainer.progress
    wanted = not trainer.config.quiet and not trainer.stopped_by
    sample = trainer.sample() if wanted else ""  # by all processes together
    if not trainer.group.is_main:
        return
    if trainer.stopped_by:
        several = trainer.group.size > 1
        again = "the same command" if several else f"python -m fastllm.train --out_dir {run_dir}"
        command.log(
            f"stopped by {trainer.stopped_by.name} at step {progress.step:,}; go on with: "
            f"{again} --resume"
        )
        return
    if trainer.evaluation is not None and trainer.val_set is not None:
        loss, perplexity = trainer.evaluation.loss, trainer.evaluation.perplexity
        bits = bits_per_character(loss, trainer.val_set)
        log(
            f"validation  loss {loss:.4f}, perplexity {perplexity:.3f}, "
            f"{'unknown' if bits is None else f'{bits:.4f}'} bits per character"
        )
        log(
            f"best        loss {progress.best_val_loss:.4f}: "
            f"{run_dir}/checkpoints/step-{progress.best_step:08d}"
        )
    if progress.training_s:
        log(f"speed       {progress.tokens / progress.training_s:,.0f} tokens/s")
    for name, file in (("curves", "loss.png"), ("profile", "profile.json")):
        if (run_dir / file).exists():
            log(f"{name:12}{run_dir / file}")
    if sample:
        log(f"sample\n{sample}")
