"""The memory estimate of training."""

import pytest
import torch

from fastllm.ops import decoder_loss
from fastllm.training.config import parse_train_config
from fastllm.training.memory import estimate_memory_mb
from tests.conftest import needs_extension


@needs_extension
def test_threads_without_a_group_of_sequences_take_no_memory() -> None:
    """16 sequences of 32 tokens make 8 groups of 64 rows."""
    config = parse_train_config(["--batch_size", "16", "--max_seq_len", "32"])
    assert decoder_loss.why_not_shape(16, 32, 100) is None
    with torch.device("meta"):
        model = config.build_model(100, None)
    estimates = [estimate_memory_mb(model, config, threads) for threads in (1, 4, 8, 9, 64)]
    assert estimates[0] < estimates[1] < estimates[2]
    assert estimates[2] == estimates[3] == estimates[4]
    assert estimates[1] - estimates[0] == pytest.approx((estimates[2] - estimates[0]) * 3 / 7)
