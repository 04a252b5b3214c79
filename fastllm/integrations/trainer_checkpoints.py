"""The checkpoints that transformers' Trainer writes in a run of `finetune`."""

import re
from pathlib import Path

STATE = "trainer_state.json"  # written after everything else of its checkpoint
NAME = re.compile(r"checkpoint-\d+")


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def whole_checkpoints(checkpoints: Path) -> list[Path]:
    """The complete checkpoints in the folder of a run's checkpoints, the highest step last.

    Copies that the user has given other names are not among them.
    """
    folders = [state.parent for state in checkpoints.glob(f"checkpoint-*/{STATE}")]
    return sorted((each for each in folders if NAME.fullmatch(each.name)), key=step_of)
