"""A training run from its settings to its report: folder, data, tokenizer, model, training."""

import contextlib
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fastllm import command
from fastllm.command import Log, errors_in_one_line, no_log
from fastllm.data.loader import TextDataset, split_point
from fastllm.data.sources import Texts, compression_of, find_texts
from fastllm.data.text import clean_lines
from fastllm.data.tokens import Tokens, encode_texts
from fastllm.device import Device, autocast, choose_device, choose_precision
from fastllm.files import locked, replace_file
from fastllm.models.decoder import DecoderModel
from fastllm.ops import implementation_line
from fastllm.ops.dispatch import use_implementation
from fastllm.threads import set_threads
from fastllm.tokenization import (
    SimpleCharacterTokenizer,
    SubwordTokenizer,
    Tokenizer,
    load_tokenizer,
)
from fastllm.training.checkpoint import (
    find_checkpoint,
    has_checkpoint,
    load_model,
)
from fastllm.training.config import ResolvedRun, RunSettings, TrainConfig
from fastllm.training.distributed import (
    SINGLE,
    ProcessError,
    ProcessGroup,
    is_distributed,
    process_group,
)
from fastllm.training.engine import Engine, choose_engine
from fastllm.training.evaluation import bits_of_text
from fastllm.training.loop import Trainer, derive_seed
from fastllm.training.memory import check_memory
from fastllm.training.metrics import plot_losses, resident_mb, tokens_per_second
from fastllm.training.presets import PRESETS

# The tokens of a text of fewer characters are counted before a run begins: that takes no time.
SHORT_TEXT = 2**16


def train(
    config: TrainConfig,
    on_start: Callable[[Trainer], None] = lambda trainer: None,
    engine_class: type[Engine] | None = None,
) -> None:
    """Trains in this process, together with the other processes of its run if there are any.

    Args:
        on_start: called with the trainer just before it trains.
        engine_class: computes the steps; by default the one that `config.parallel` names.
    """
    set_threads(config.threads)
    with errors_in_one_line(Exception), contextlib.ExitStack() as stack:
        stack.enter_context(use_implementation(config.impl))
        device = choose_device(config.device)
        # DeepSpeed needs a process group even for a single process.
        group = stack.enter_context(
            process_group(device, even_single=config.launcher == "deepspeed")
        )
        stack.enter_context(group.reporting_peer_loss())
        group.check_agreement({**config.model_dump(mode="json"), "device": device})
        log: Log = command.log if group.is_main and not config.quiet else no_log
        if config.parallel != "ddp" and group.size == 1:
            log(
                f"warning: parallel {config.parallel} divides a step among several processes, "
                "and this is one; torchrun or --launcher ray start several"
            )
        implementation_line(device)  # refuses an implementation before any file is written
        # Before a folder is made.
        texts = group.broadcast(lambda: read_texts(config))
        folder = dry_run_folder if config.dry_run else start_or_restart
        run_dir, resume = group.broadcast(lambda: stack.enter_context(folder(config, texts)))
        if config.dry_run:
            check_shared(run_dir, group)
        run = resolve(config, run_dir, device, resume)
        group.check_agreement({"precision": run.precision})
        trainer = prepare(run, log, group, engine_class, texts)
        if config.preset:
            log(f"preset      {config.preset}: {PRESETS[config.preset].expect}")
        if not config.dry_run:
            log(f"run         {run_dir}")
        log(f"threads     {run.threads}{' in each process' if group.size > 1 else ''}")
        log(f"operations  {operations(trainer)}{trainer.engine.caveat}")
        on_start(trainer)
        if config.dry_run:
            report_timing(trainer)
        else:
            trainer.train()
            if group.is_main:
                plot_losses(run_dir / "metrics.jsonl", run_dir / "loss.png")
            report(trainer, log)
    if trainer.stopped_by:
        raise SystemExit(128 + trainer.stopped_by)


def read_texts(config: TrainConfig) -> Texts | None:
    """The texts of the settings, read once as a whole; None for the demo corpus.

    Raises:
        FileNotFoundError: a text does not exist.
        ValueError: a file holds no text, or all of them hold too little.
        KeyError: the tokenizer lacks a character of a short text.
    """
    if not config.file_path:
        return None
    texts = find_texts(config.file_path, config.text_column)
    size = texts.content.size
    if not config.resume:
        check_length(config, texts, at_most=size)
    return texts


def check_length(config: TrainConfig, texts: Texts, at_most: int) -> None:
    """Raises a `ValueError` if the texts have too few tokens.

    Args:
        at_most: bytes of the texts, which have at most as many tokens.
    """
    length, count = 0, at_most
    for piece in clean_lines(texts.pieces(), config.min_line_length, config.dedup_lines):
        length += len(piece)
        if length >= SHORT_TEXT:
            break
    else:
        tokenizer = make_tokenizer(config.model_copy(update={"quiet": True}), texts, no_log)
        tokens = encode_texts(texts, tokenizer, config.min_line_length, config.dedup_lines)
        check_known(texts, tokens, tokenizer)
        count = len(tokens)
    check_count(texts, count, config.val_fraction)


def check_known(texts: Texts, tokens: Tokens, tokenizer: Tokenizer) -> None:
    """Raises a `ValueError` if most tokens at the beginning stand for unknown words."""
    unknown_id = getattr(tokenizer, "unknown_token_id", None)
    beginning = tokens[: 1 << 20]
    if unknown_id is None or not len(beginning):
        return
    unknown = float((beginning == unknown_id).mean())
    if unknown > 0.5:
        raise ValueError(
            f"{unknown:.0%} of the tokens of {texts} stand for unknown words: they are too long, "
            "as in texts without spaces, or the tokenizer lacks their characters; try --tokenizer "
            "bpe"
        )


def check_count(texts: Texts, tokens: int, val_fraction: float) -> None:
    """Raises a `ValueError` if so many tokens are too few to train on."""
    if not tokens:
        raise ValueError(f"{texts} has no text to learn from, after cleaning")
    if tokens == 1:
        raise ValueError(f"{texts} has a single token, and nothing to predict; use a longer text")
    if val_fraction:
        split_point(tokens, val_fraction)


def operations(trainer: Trainer) -> str:
    """The implementation of every operation for the batches of a run."""
    run, config = trainer.run, trainer.config
    shape = -(-config.batch_size // trainer.group.size), config.max_seq_len
    ids = torch.zeros(shape, dtype=torch.long, device=run.device)
    with autocast(run.device, run.precision):
        reason = trainer.model.why_not_fused_loss(ids)
    return implementation_line(run.device, {"decoder_loss": reason} if reason else None)


@contextlib.contextmanager
def start_or_restart(config: TrainConfig, texts: Texts | None) -> Iterator[tuple[Path, bool]]:
    """The run's folder, locked, and whether the run in it is resumed.

    Processes that torchrun restarts resume from the last checkpoint. A note in the run's folder
    names the launch of torchrun that started the run.

    Raises:
        ValueError: the folder holds another run, or a restart could not find the run.
    """
    launch = torchrun_launch()
    if launch is None:
        with run_folder(config, run_name(config, texts)) as run_dir:
            yield run_dir, config.resume
        return
    if config.out_dir is None:
        raise ValueError("torchrun's --max_restarts needs --out_dir, where a restart finds the run")
    note = config.out_dir / "torchrun.txt"
    if note.exists() and note.read_text(encoding="utf-8") == launch:
        found = has_checkpoint(config.out_dir)
        if not config.quiet:
            where = "from the last checkpoint" if found else "from the beginning"
            command.log(f"torchrun has restarted this run {where}")
        with in_use(config.out_dir):
            yield config.out_dir, found
        return
    with run_folder(config, "") as run_dir:
        note.write_text(launch, encoding="utf-8")
        yield run_dir, config.resume


@contextlib.contextmanager
def dry_run_folder(config: TrainConfig, texts: Texts | None) -> Iterator[tuple[Path, bool]]:
    """A temporary folder in place of the run's, and whether the run in out_dir is resumed.

    Raises:
        ValueError: out_dir holds another run.
    """
    if config.out_dir is not None:
        refuse_second_run(config, config.out_dir)
    with tempfile.TemporaryDirectory(prefix="fastllm-") as folder:
        if config.resume and config.out_dir is not None:
            # The tokens are those of the run; if its text has changed, the link is replaced.
            with contextlib.suppress(OSError):  # no links on this disk
                (Path(folder) / "tokens.bin").symlink_to(config.out_dir.absolute() / "tokens.bin")
        yield Path(folder), config.resume


def check_shared(folder: Path, group: ProcessGroup) -> None:
    """Raises a `ProcessError` unless all processes see the folder; a collective operation."""
    (missing,) = group.all_reduce(not folder.is_dir())
    if missing:
        raise ProcessError(
            f"dry_run works in a temporary folder, {folder}, which other machines do not see; run "
            "it on one machine, or set TMPDIR to a folder that all of them share"
        )


def torchrun_launch() -> str | None:
    """A name that identifies this launch of torchrun; None if it does not restart processes."""
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return None
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    # Without an id: the agent of rank 0, which stays the same through all restarts.
    return f"{name} {socket.gethostname()} {os.getppid()}" if name == "none" else name


def run_name(config: TrainConfig, texts: Texts | None) -> str:
    """The name of the first folder or text, without endings."""
    if not config.file_path or texts is None:
        return "demo"
    first = config.file_path[0].resolve()
    if first.is_dir():
        return first.name or "text"
    name = texts.files[0].name
    return Path(name.removesuffix(compression_of(name))).stem


@contextlib.contextmanager
def run_folder(config: RunSettings, name: str) -> Iterator[Path]:
    """The folder of the run, as `choose_run_dir` chooses it, locked until the block ends.

    Raises:
        ValueError: the folder already holds a run, which is not to be resumed, or is in use.
    """
    run_dir, is_new = choose_run_dir(config, name)
    with in_use(run_dir), removed_if_unused(run_dir, is_new):
        refuse_second_run(config, run_dir)
        yield run_dir


@contextlib.contextmanager
def removed_if_unused(run_dir: Path, is_new: bool) -> Iterator[None]:
    """Removes the new folder of a run if the block ends by an exception before it has logged.

    Not under torchrun, where other ranks may still be reading in it.
    """
    try:
        yield
    except BaseException:
        logs = (run_dir / name for name in ("metrics.jsonl", "ray.log"))
        if is_new and not is_distributed() and not any(log.exists() for log in logs):
            shutil.rmtree(run_dir, ignore_errors=True)
        raise


@contextlib.contextmanager
def in_use(run_dir: Path) -> Iterator[None]:
    """Locks the folder of a run; raises a `ValueError` if another process has locked it."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(run_dir))
        except BlockingIOError:
            raise ValueError(
                f"another run is using {run_dir}; wait for its end, or give another --out_dir"
            ) from None
        yield


def choose_run_dir(config: RunSettings, name: str) -> tuple[Path, bool]:
    """Makes the folder of the run: the one given, or else runs/NAME or runs/NAME-2 and so on.

    Returns:
        The folder, and whether it is new.

    Raises:
        ValueError: the folder already holds a run, which is not to be resumed.
    """
    if config.out_dir is not None:
        refuse_second_run(config, config.out_dir)
        if config.resume:
            return config.out_dir, False
        try:
            config.out_dir.mkdir(parents=True)
        except FileExistsError:
            if not config.out_dir.is_dir():
                raise
            return config.out_dir, False
        return config.out_dir, True
    number = 1
    while True:
        run_dir = Path("runs") / (name if number == 1 else f"{name}-{number}")
        try:
            run_dir.mkdir(parents=True)
            return run_dir, True
        except FileExistsError:  # perhaps of a run that has begun just now
            if Path("runs").is_dir():
                number += 1
            else:
                raise


def refuse_second_run(config: RunSettings, run_dir: Path) -> None:
    """Raises a `ValueError` if the folder holds a run, which is not to be resumed."""
    # Checkpoints of any command, but not one that was still being written.
    if any(run_dir.glob("checkpoints/[!w]*")) and not config.resume:
        raise ValueError(
            f"{run_dir} holds a run already; --resume continues it, another --out_dir keeps it"
        )


def resolve(
    config: TrainConfig, run_dir: Path, device: Device | None = None, resume: bool | None = None
) -> ResolvedRun:
    """What the settings come to on this machine, in this process.

    Args:
        device: if chosen already.
        resume: `config.resume` by default.
    """
    device = device or choose_device(config.device)
    return ResolvedRun(
        config,
        run_dir,
        device,
        precision=choose_precision(config.precision, config.hidden_size, device),
        resume=config.resume if resume is None else resume,
        threads=torch.get_num_threads(),
        # Under a launcher, num_workers counts training processes.
        data_workers=0 if config.launcher else config.num_workers,
    )


def prepare(
    run: ResolvedRun,
    log: Log,
    group: ProcessGroup = SINGLE,
    engine_class: type[Engine] | None = None,
    texts: Texts | None = None,
) -> Trainer:
    """Data, tokenizer, model and trainer of a run; errors in its input are found here.

    Args:
        texts: what `read_texts` gives for the settings of the run, if that was called before.
    """
    resident_at_start = resident_mb()
    checkpoint = None
    if run.resume:  # from out_dir also in a dry run, whose folder is a temporary one
        checkpoint = group.broadcast(lambda: find_checkpoint(run.config.out_dir or run.run_dir))
    with group.main_first():  # rank 0 makes files that the other ranks read
        model, tokenizer, saved = None, None, None
        if checkpoint:
            model, tokenizer, saved = load_model(checkpoint)
            model.gradient_checkpointing = run.config.gradient_checkpointing
        texts = texts or read_texts(run.config) or find_texts(demo_text(run.run_dir, log))
        if tokenizer is None and group.is_main:
            tokenizer = make_tokenizer(run.config, texts, log)
        elif tokenizer is None:
            tokenizer = load_tokenizer(run.run_dir / "tokenizer.json")
        train_set, val_set = read_data(run, texts, tokenizer, log)
        with torch.device("meta"):
            sketch = run.config.build_model(tokenizer.vocab_size, tokenizer.pad_token_id)
        log(f"parameters  {sum(p.numel() for p in sketch.parameters()):,}")
        log(f"precision   {run.precision}")
        check_memory(run, sketch, group, resident_at_start, log)
        if model is None:
            model = new_model(run.config, tokenizer)
        if group.is_main:
            if checkpoint is None:
                tokenizer.save(run.run_dir / "tokenizer.json")
            with replace_file(run.run_dir / "config.json") as file:
                file.write(run.recorded.to_json().encode())
    engine_class = engine_class or choose_engine(run.config, group)
    engine = engine_class(run, model.to(run.device), group)
    trainer = Trainer(run, tokenizer, train_set, val_set, engine, checkpoint)
    if saved and (change := trainer.why_rate_jumps(saved)):
        log(f"schedule    {change}")
    return trainer


def demo_text(run_dir: Path, log: Log) -> Path:
    """Python's own documentation, as a file in the run's folder."""
    from pydoc_data.topics import topics

    path = run_dir / "demo.txt"
    if not path.exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(topics.values()), encoding="utf-8")
    log("No --file_path given: training on the demo corpus, Python's own documentation.")
    return path


def make_tokenizer(config: TrainConfig, texts: Texts, log: Log) -> Tokenizer:
    """The tokenizer of a new run, loaded or made from the texts."""
    if isinstance(config.tokenizer, Path):
        return load_tokenizer(config.tokenizer)
    pieces = clean_lines(texts.pieces(), config.min_line_length, config.dedup_lines)
    if config.tokenizer == "char":
        return SimpleCharacterTokenizer.from_pieces(pieces)
    log(f"tokenizer   {config.tokenizer}: learning {config.vocab_size:,} tokens from the text")
    show_progress = not config.quiet and sys.stderr.isatty()
    return SubwordTokenizer.train(pieces, config.tokenizer, config.vocab_size, show_progress)


def read_data(
    run: ResolvedRun, texts: Texts, tokenizer: Tokenizer, log: Log
) -> tuple[TextDataset, TextDataset | None]:
    """The training set, and the validation set if the settings hold one out.

    Raises:
        ValueError: the text is too short.
    """
    config = run.config
    run.run_dir.mkdir(parents=True, exist_ok=True)
    dataset = TextDataset(
        texts,
        tokenizer,
        config.max_seq_len,
        config.overlap,
        min_line_length=config.min_line_length,
        dedup_lines=config.dedup_lines,
        token_file=run.run_dir / "tokens.bin",
    )
    check_known(texts, dataset.tokens, tokenizer)
    check_count(texts, len(dataset.tokens), config.val_fraction)
    train_set, val_set = (
        dataset.split(config.val_fraction) if config.val_fraction else (dataset, None)
    )
    log(
        f"data        {texts}: {len(dataset.tokens):,} tokens of {tokenizer.vocab_size:,} "
        f"kinds, {len(train_set):,} training sequences"
    )
    return train_set, val_set


def new_model(config: TrainConfig, tokenizer: Tokenizer) -> DecoderModel:
    """A model with random weights, the same for the same seed."""
    torch.manual_seed(derive_seed(config.seed, "start"))
    return config.build_model(tokenizer.vocab_size, tokenizer.pad_token_id)


def report_timing(trainer: Trainer) -> None:
    """Measures some steps and prints how long the run would take; a collective operation."""
    timing = trainer.measure()
    if not timing.is_measured:  # a signal came
        return
    time_line, warning = timing.describe()
    if trainer.group.is_main:  # the result of the command, even if it is quiet
        print(f"speed       {timing.speed:,.0f} tokens/s")
        print(f"time        {time_line}", flush=True)
        if warning:
            command.log(warning)


def report(trainer: Trainer, log: Log) -> None:
    """Logs the results of a run that has ended."""
    progress, run_dir = trainer.progress, trainer.run_dir
    wants_sample = not trainer.config.quiet and not trainer.stopped_by
    sample = trainer.sample() if wants_sample else ""  # a collective operation
    if not trainer.group.is_main:
        return
    if trainer.stopped_by:
        several = trainer.group.size > 1
        again = "the same command" if several else f"fastllm train --out_dir {run_dir}"
        command.log(
            f"stopped by {trainer.stopped_by.name} at step {progress.step:,}; continue with: "
            f"{again} --resume"
        )
        return
    if trainer.evaluation is not None and trainer.val_set is not None:
        loss, perplexity = trainer.evaluation.loss, trainer.evaluation.perplexity
        bits = bits_of_text(loss, trainer.val_set)
        log(
            f"validation  loss {loss:.4f}, perplexity {perplexity:.3f}, "
            f"{'unknown' if bits is None else f'{bits.per_character:.4f}'} bits per character"
        )
        log(
            f"best        loss {progress.best_val_loss:.4f}: "
            f"{run_dir}/checkpoints/step-{progress.best_step:08d}"
        )
    if progress.training_s:
        log(f"speed       {tokens_per_second(progress.tokens, progress.training_s):,.0f} tokens/s")
    for name, file in (("curves", "loss.png"), ("profile", "profile.json")):
        if (run_dir / file).exists():
            log(f"{name:12}{run_dir / file}")
    if sample:
        log(f"sample\n{sample}")
