"""The checkpoints of a run of `finetune`, among whatever else lies in their folder."""

from pathlib import Path

from fastllm.integrations.trainer_checkpoints import STATE, whole_checkpoints


def test_copies_with_names_of_their_own_are_no_checkpoints(tmp_path: Path) -> None:
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-best", "checkpoint-best-11"):
        (tmp_path / name).mkdir()
        (tmp_path / name / STATE).touch()
    (tmp_path / "checkpoint-12").mkdir()  # incomplete
    assert [path.name for path in whole_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
