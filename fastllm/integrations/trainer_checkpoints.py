"""The checkpoints that transformers' Trainer writes in a run of `finetune`."""

from pathlib import Path

STATE = "trainer_state.json"  # written after everything else of its checkpoint


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def whole_checkpoints(checkpoints: Path) -> list[Path]:
    """The complete checkpoints in the folder of a run's checkpoints, the highest step last."""
    states = checkpoints.glob(f"checkpoint-*/{STATE}")
    return sorted((state.parent for state in states), key=step_of)
