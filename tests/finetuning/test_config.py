"""Settings of fine-tuning, from flags."""

import pytest

from fastllm.finetuning.config import FinetuneConfig
from fastllm.training.config import parse_run_settings


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--dataset a b --lr 1", ["a", "b"]),
        ("--dataset a --dataset=b", ["a", "b"]),
        ("--file_path a b", ["a", "b"]),
        ("--file-path=a", ["a"]),
        ("a b --lr 1", ["a", "b"]),
        ("--lora_targets x y --lr 1 a", ["a"]),
    ],
)
def test_the_texts_to_train_on(flags: str, expected: list[str]) -> None:
    config = parse_run_settings(FinetuneConfig, ["--model", "m", *flags.split()])
    assert config.dataset == expected
