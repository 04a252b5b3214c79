"""Checkpoints: directories that are complete or absent, in safetensors and JSON, never pickled.

A run's folder holds its newest checkpoints, and links to the newest one's parts (where the file
system has no links, latest.txt names the newest one instead)::

    config.json          every setting
    tokenizer.json       the vocabulary
    model.safetensors    -> checkpoints/step-00000500/model.safetensors
    training_state/      -> checkpoints/step-00000500/training_state
    checkpoints/step-00000500/
        config.json, tokenizer.json, model.safetensors
        training_state/optimizer.safetensors, training_state/progress.json
        checksums.json   SHA-256 of every other file

A checkpoint gets its name after all of it is on the disk: if the process or the machine dies, the
previous checkpoint stays whole.

Processes that train together write one checkpoint, through `torch.distributed.checkpoint`. It does
not depend on their number, nor on whether each had all of the model or a part, so a run may
continue with a different number of processes.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastllm.command import warn_once
from fastllm.files import flush, remove_folder, sha256, tidy, writing_aside
from fastllm.models.decoder import DecoderModel
from fastllm.tokenization import Tokenizer, load_tokenizer
from fastllm.training.config import TrainConfig, read_config
from fastllm.training.distributed import SINGLE, ProcessGroup

_STEP_NAME = re.compile(r"(replaced-)?step-\d{8,}")
_CHECKSUMS = "checksums.json"
_PROGRESS = "training_state/progress.json"
_OPTIMIZER = "training_state/optimizer.safetensors"


class CheckpointError(Exception):
    """A checkpoint cannot be written or read; the message names the file and what is wrong."""


@dataclass
class Progress:
    """How far a run is: the content of a checkpoint besides model and optimizers."""

    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    training_s: float = 0.0
    val_loss: float | None = None
    best_val_loss: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    text_sha256: str | None = None
    loss_scale: dict[str, int | float] = field(default_factory=dict)  # of fp16


def save_checkpoint(
    run_dir: Path,
    config: TrainConfig,
    tokenizer: Tokenizer,
    model: DecoderModel,
    optimizers: Sequence[torch.optim.Optimizer],
    progress: Progress,
    group: ProcessGroup = SINGLE,
    keep: Sequence[int] = (),
    keep_newest: int = 1,
) -> Path:
    """Writes a checkpoint under `run_dir` and removes old ones.

    Args:
        config: for config.json.
        model: or this rank's part of it.
        progress: its step names the checkpoint.
        group: the processes that train together. All of them call this and write their parts, into
            a folder that all of them see.
        keep: steps whose checkpoints stay, besides the `keep_newest` newest.

    Raises:
        CheckpointError: the disk is full, the folder read-only, or the like; earlier checkpoints
            are untouched.
        ProcessError: rank 0 could not write its part, and raises a `CheckpointError`.
    """
    checkpoints = run_dir / "checkpoints"
    final = checkpoints / f"step-{progress.step:08d}"
    aside = ExitStack()  # of rank 0

    def start() -> Path:
        tidy(checkpoints, "step-*")
        partial = aside.enter_context(writing_aside(checkpoints)) / final.name
        (partial / "training_state").mkdir(parents=True)
        return partial

    def finish() -> None:
        (partial / "config.json").write_text(config.to_json(), encoding="utf-8")
        tokenizer.save(partial / "tokenizer.json")
        text = json.dumps(asdict(progress), indent=2)
        (partial / _PROGRESS).write_text(text + "\n", encoding="utf-8")
        _write_checksums(partial)
        aside.close()

    def keep_house() -> None:
        _link_newest(final)
        for old in _checkpoints(run_dir)[:-keep_newest]:
            if _step_of(old) not in keep:
                remove_checkpoint(old)

    try:
        with aside:
            partial = group.broadcast(start)
            _write_tensors(_weights(model), partial / "model.safetensors", group)
            _write_tensors(_state(model, optimizers), partial / _OPTIMIZER, group)
            group.broadcast(finish)
    except (OSError, SafetensorError) as error:
        whole = _checkpoints(run_dir)
        again = f"continue with --resume, from {whole[-1]}" if whole else "start the run again"
        raise CheckpointError(
            f"cannot save a checkpoint in {checkpoints}: {error}. Free some space or make the "
            f"folder writable, then {again}"
        ) from error
    group.broadcast(keep_house)
    return final


def _write_checksums(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {str(file.relative_to(folder)): sha256(file) for file in files}
    (folder / _CHECKSUMS).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


def _write_tensors(tensors: Mapping[str, Tensor], file: Path, group: ProcessGroup) -> None:
    """Writes the tensors of all ranks, whether parts or wholes, into one safetensors file."""
    if group.size == 1 or not tensors:  # optimizers have no state before the first step
        group.broadcast(lambda: save_file(_cpu(tensors), file))
        return
    # Imported here: it takes half a second.
    import torch.distributed.checkpoint as dcp

    # Each rank writes a file of its own, and rank 0 consolidates them.
    parts = file.with_suffix("")
    writer = dcp.HuggingFaceStorageWriter(
        str(parts), save_distributed=True, enable_consolidation=True
    )
    try:
        dcp.save(dict(tensors), storage_writer=writer)
    except dcp.CheckpointException as error:
        raise _first_failure(error) from error

    def move() -> None:
        found = list(parts.glob("*.safetensors"))
        if len(found) != 1:
            raise OSError(f"{parts} has {len(found)} consolidated files instead of one")
        found[0].rename(file)
        shutil.rmtree(parts)

    group.broadcast(move)


def find_checkpoint(folder: str | os.PathLike[str]) -> Path:
    """The folder itself if it is a checkpoint, otherwise the newest checkpoint of the run in it.

    Raises:
        CheckpointError: the folder has no checkpoint.
    """
    folder = Path(folder)
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {problem}; give a run or a checkpoint in it")
    found = _checkpoints(folder)
    if found:
        return found[-1]
    if (folder / "checkpoints").is_dir() or not (folder / "model.safetensors").exists():
        raise CheckpointError(
            f"{folder} holds no checkpoint: neither checkpoints/step-* nor model.safetensors"
        )
    return folder


def run_of(checkpoint: Path) -> Path:
    """The absolute folder of a checkpoint's run; the checkpoint itself if it is in no run."""
    folder = checkpoint.resolve()
    return folder.parent.parent if folder.parent.name == "checkpoints" else folder


def has_checkpoint(run_dir: Path) -> bool:
    """Whether a run can be resumed: its folder has a whole checkpoint."""
    return bool(_checkpoints(run_dir))


def load_model(checkpoint: Path) -> tuple[DecoderModel, Tokenizer, TrainConfig | None]:
    """The model on the CPU, in training mode, with its tokenizer and the settings of its run.

    There are no such settings for a model that `save_model` saved.

    Raises:
        CheckpointError: a file is missing, truncated, changed or foreign.
    """
    _verify(checkpoint)
    if "model_type" in _read_settings(checkpoint / "config.json"):
        raise CheckpointError(
            f"{checkpoint} holds a model in Hugging Face's format, not a run of train; finetune "
            "trains it further"
        )
    saved, config = read_saved_settings(checkpoint), None
    try:
        tokenizer = load_tokenizer(checkpoint / "tokenizer.json")
        # Shapes first, without memory: settings that do not match the weights must not allocate.
        with torch.device("meta"):
            if saved is None:
                config = read_config(checkpoint / "config.json", TrainConfig)
                model = config.build_model(tokenizer.vocab_size, tokenizer.pad_token_id)
            else:
                model = DecoderModel.from_settings(saved)
                special = _read_settings(checkpoint / "config.json").get("special_tokens", {})
                tokenizer.start_tokens = special.get("start", ())
                tokenizer.end_tokens = frozenset(special.get("end", ()))
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error)) from error
    except (TypeError, ArithmeticError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint / 'config.json'} is damaged: {error}") from error
    file = checkpoint / "model.safetensors"
    expected = {name: list(tensor.shape) for name, tensor in _weights(model).items()}
    found = _shapes(file)
    if found != expected:
        wrong = sorted(
            name for name in {*found, *expected} if found.get(name) != expected.get(name)
        )
        raise CheckpointError(
            f"{file} does not fit config.json and tokenizer.json beside it: '{wrong[0]}' is "
            f"{found.get(wrong[0], 'missing')}, expected {expected.get(wrong[0], 'nothing')}"
        )
    model.to_empty(device="cpu").load_state_dict(_read_tensors(file))
    return model, tokenizer, config


def read_saved_settings(folder: Path) -> dict[str, Any] | None:
    """The `settings` of a model that `save_model` wrote; None if it wrote none here."""
    settings = _read_settings(folder / "config.json").get("model")
    return settings if isinstance(settings, dict) else None


def _read_settings(config: Path) -> dict[str, Any]:
    """The content of a config.json; empty if it is unreadable, which `read_config` reports."""
    try:
        settings = json.loads(config.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _first_failure(error: Any) -> BaseException:
    """The error itself, without the tracebacks of all ranks that PyTorch joins into one text."""
    failure, _ = next(iter(error.failures.values()))
    return failure if isinstance(failure, (OSError, SafetensorError)) else error


def load_training_state(
    checkpoint: Path,
    model: DecoderModel,
    optimizers: Sequence[torch.optim.Optimizer],
    group: ProcessGroup = SINGLE,
) -> Progress:
    """Fills the optimizers and returns how far the run was.

    Args:
        model: the model, or this rank's part of it, whose parameters the optimizers update.
        group: the processes that train together; all of them call this.

    Raises:
        CheckpointError: a file is missing, truncated, changed or foreign.
    """
    file = checkpoint / _OPTIMIZER
    parameters = dict(model.named_parameters())
    try:
        tensors = _read_parts(file, parameters, group)
        for optimizer in optimizers:
            groups = optimizer.state_dict()["param_groups"]
            names = _names(optimizer, model) if tensors else []
            muon = isinstance(optimizer, torch.optim.Muon)
            entries = {"momentum_buffer"} if muon else {"step", "exp_avg", "exp_avg_sq"}
            for name in names:
                if tensors.get(name, {}).keys() != entries:
                    raise ValueError(
                        f"{name} has {sorted(tensors.get(name, []))}, expected {sorted(entries)}"
                    )
            state = {i: tensors[name] for i, name in enumerate(names)}
            optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (OSError, SafetensorError, ValueError, LookupError, RuntimeError) as error:
        raise CheckpointError(f"{file} does not fit this run: {error}") from error
    progress = read_progress(checkpoint)
    if progress is None:
        raise CheckpointError(f"{checkpoint / _PROGRESS} is missing")
    return progress


def read_progress(checkpoint: Path) -> Progress | None:
    """How far the run was; None for a folder with only a model.

    Raises:
        CheckpointError: the file is damaged.
    """
    file = checkpoint / _PROGRESS
    if not file.exists():
        return None
    try:
        return TypeAdapter(Progress).validate_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error


def _names(optimizer: torch.optim.Optimizer, model: DecoderModel) -> list[str]:
    """The names of the optimizer's parameters, in the order of its state dict."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[p] for group in optimizer.param_groups for p in group["params"]]


def _state(model: DecoderModel, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimizers' state, named by entry and parameter: `exp_avg.lm_head.weight`."""
    tensors = {}
    for optimizer in optimizers:
        names = _names(optimizer, model)
        for i, entries in optimizer.state_dict()["state"].items():
            for entry, value in entries.items():
                # Scalars as [1]: PyTorch loses scalars when it consolidates the files of ranks.
                tensors[f"{entry}.{names[i]}"] = value if value.ndim else value.view(1)
    return tensors


def _read_parts(
    file: Path, parameters: Mapping[str, Tensor], group: ProcessGroup
) -> dict[str, dict[str, Tensor]]:
    """The optimizer state of these parameters, sharded as they are on this rank."""
    own: dict[str, dict[str, Tensor]] = {}
    flat = {}
    shapes = _shapes(file)
    for key, shape in shapes.items():
        entry, _, name = key.partition(".")
        like = parameters.get(name)
        if like is None:
            continue
        if entry == "step":
            number = own.setdefault(name, {})[entry] = torch.zeros(())
            flat[key] = number.view(1)
        elif list(like.shape) == shape:
            flat[key] = own.setdefault(name, {})[entry] = torch.zeros_like(like).detach()
        else:
            raise ValueError(f"'{key}' is {shape}, expected {list(like.shape)}")
    if shapes and not own:
        raise ValueError("it has no state of this model")
    if group.size == 1:
        with safe_open(file, framework="pt") as tensors:
            for key, tensor in flat.items():
                tensor.copy_(tensors.get_tensor(key))
    elif flat:
        import torch.distributed.checkpoint as dcp

        try:
            dcp.load(flat, storage_reader=dcp.HuggingFaceStorageReader(str(file.parent)))
        except dcp.CheckpointException as error:
            raise _first_failure(error) from error
    return own


def _weights(model: DecoderModel) -> dict[str, Tensor]:
    """The state dict without the head if it is tied: safetensors refuses shared memory."""
    weights = model.state_dict()
    if model.tie_word_embeddings:
        del weights["lm_head.weight"]
    return weights


def _cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors: {error}") from error


def _shapes(file: Path) -> dict[str, list[int]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors: {error}") from error


def _verify(checkpoint: Path) -> None:
    """Compares files with their checksums; folders without checksums (exports) are not verified."""
    file = checkpoint / _CHECKSUMS
    if not file.exists():
        return
    try:
        sums = json.loads(file.read_text(encoding="utf-8"))
        changed = [name for name, sum in sums.items() if sha256(checkpoint / name) != sum]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged, or a file that it lists: {error}") from error
    if changed:
        raise CheckpointError(
            f"{checkpoint / changed[0]} is damaged: its content is not what was saved. Use another "
            f"checkpoint, or delete {checkpoint} to continue from the previous one"
        )


def _checkpoints(run_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first.

    One that was set aside while its successor was written counts, unless the successor has its
    name: the process died between the two renames.
    """
    by_step: dict[int, Path] = {}
    for folder in sorted((run_dir / "checkpoints").glob("*step-*")):  # replaced-* before step-*
        if _STEP_NAME.fullmatch(folder.name):
            by_step[_step_of(folder)] = folder
    return [by_step[step] for step in sorted(by_step)]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _link_newest(checkpoint: Path) -> None:
    run_dir = checkpoint.parent.parent
    try:
        for name in ("model.safetensors", "training_state"):
            _link(run_dir / name, Path("checkpoints") / checkpoint.name / name)
        flush(run_dir)
    except OSError as error:
        warn_once(
            f"{run_dir} cannot hold links to the newest checkpoint ({error.strerror}); "
            "latest.txt names it"
        )
        with suppress(OSError):
            (run_dir / "latest.txt").write_text(f"checkpoints/{checkpoint.name}\n")


def _link(link: Path, target: Path) -> None:
    partial = link.with_name(f"writing-{link.name}")
    partial.unlink(missing_ok=True)
    partial.symlink_to(target)
    partial.replace(link)


def remove_checkpoint(checkpoint: Path) -> None:
    """Removes an old checkpoint; one that cannot be removed is left, with a warning."""
    try:
        remove_folder(checkpoint)
    except OSError as error:
        warn_once(
            f"old checkpoints in {checkpoint.parent} cannot be removed ({error.strerror}); "
            "training goes on"
        )
