"""Settings of fine-tuning, from flags."""

import pytest

from fastllm.finetuning.config import words_as_lists


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--model m --lr 1", "--model m --lr 1"),
        ("--dataset a b --lr 1", '--dataset ["a", "b"] --lr 1'),
        ("--eval-dataset a --lora_targets x y", '--eval-dataset ["a"] --lora_targets ["x", "y"]'),
        ("--dataset", "--dataset []"),
    ],
)
def test_words_after_a_list_flag_are_one_argument(flags: str, expected: str) -> None:
    assert " ".join(words_as_lists(flags.split())) == expected
