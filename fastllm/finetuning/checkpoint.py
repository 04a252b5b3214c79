"""The checkpoints of a fine-tuning run: complete or absent, and ordered by their step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastllm.command import cause_of, first_line, is_out_of_memory, log
from fastllm.files import remove_folder, tidy, writing_aside
from fastllm.integrations.trainer_checkpoints import step_of, whole_checkpoints
from fastllm.training.checkpoint import CheckpointError


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"checkpoint-{step}"


def last_checkpoint(run_dir: Path) -> Path:
    """The complete checkpoint with the highest step, after a killed process too.

    Raises:
        FileNotFoundError: the run has no checkpoint.
    """
    tidy(run_dir / "checkpoints", "checkpoint-*")
    found = whole_checkpoints(run_dir / "checkpoints")
    if not found:
        raise FileNotFoundError(
            f"{run_dir} holds no checkpoint to resume from; leave out --resume to start again"
        )
    return found[-1]


def remove_checkpoints(checkpoints: Path, keep: set[int]) -> None:
    """Removes the complete checkpoints of other steps than these."""
    for old in whole_checkpoints(checkpoints):
        if step_of(old) in keep:
            continue
        try:
            remove_folder(old)
        except OSError as error:
            log(f"warning: the old checkpoint {old} cannot be removed: {error}")


@contextmanager
def reading(checkpoint: str | None) -> Iterator[None]:
    """Turns what libraries raise for a damaged checkpoint into a `CheckpointError` in one line."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{checkpoint} cannot be read: {first_line(error)}. Delete it to "
            "continue from the one before, or start the run again"
        ) from error


@contextmanager
def complete_or_absent(final: Path) -> Iterator[Path]:
    """A folder to make, which becomes `final`, or replaces it, if the block raises no error.

    Raises:
        CheckpointError: it cannot be written: the disk is full, the folder read-only, or the like.
            What `final` was before is untouched.
    """
    try:
        tidy(final.parent, final.name)
        with writing_aside(final.parent) as aside:
            yield aside / final.name
    except Exception as error:
        earlier = whole_checkpoints(final.parent) or whole_checkpoints(final.parent / "checkpoints")
        again = f"continue with --resume, from {earlier[-1]}" if earlier else "start the run again"
        remedy = "Free some space or make the folder writable"
        if is_out_of_memory(error):
            remedy = "Free some memory"
        raise CheckpointError(
            f"cannot save {final}: {_reason(error)}. {remedy}, then {again}"
        ) from error


def _reason(error: Exception) -> str:
    if "inline_container" in str(error):  # PyTorch's writer names lines of its source
        return "not all of it could be written"
    return cause_of(error).splitlines()[0]
