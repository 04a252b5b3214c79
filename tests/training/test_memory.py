"""The memory estimate of training."""

from pathlib import Path

import psutil
import pytest
import torch

from fastllm.ops import decoder_loss
from fastllm.training.config import parse_train_config
from fastllm.training.memory import LIBRARIES_MB, available_mb, estimate_memory_mb
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


@pytest.mark.parametrize(
    ("membership", "file"),
    [
        ("0::/user/service", "user/service/memory.max"),
        ("0::/user/service", "user/memory.max"),
        ("0::/", "memory.max"),
        ("5:memory:/job/part\n4:cpu:/", "memory/job/part/memory.limit_in_bytes"),
        ("5:memory:/job/part\n4:cpu:/", "memory/job/memory.limit_in_bytes"),
        ("5:hugetlb,memory:/elsewhere", "memory/memory.limit_in_bytes"),
    ],
)
def test_the_limit_of_a_container_counts(tmp_path: Path, membership: str, file: str) -> None:
    of_process, limit = tmp_path / "membership", tmp_path / file
    of_process.write_text(membership + "\n")
    limit.parent.mkdir(parents=True, exist_ok=True)
    machine = psutil.virtual_memory().total / 2**20, "this machine"
    for text in ("max", "9223372036854771712", "0", ""):
        limit.write_text(text)
        assert available_mb(tmp_path, of_process) == machine
    limit.write_text(f"{64 * 2**20}\n")
    assert available_mb(tmp_path, of_process) == (64, f"the container or cgroup ({limit})")


@needs_extension
def test_gated_mlps_and_more_norms_take_more_memory() -> None:
    """Measured on top of the weights: 696, 801 and 1,000 MiB."""
    flags = "--preset small --hidden_size 256 --max_seq_len 512 --batch_size 16 --num_layers 4"
    estimates = []
    for arch in ("gpt2", "llama", "gemma3"):
        config = parse_train_config([*flags.split(), "--arch", arch])
        with torch.device("meta"):
            model = config.build_model(8192, None)
        estimates.append(estimate_memory_mb(model, config, 2) - LIBRARIES_MB)
    gpt2, llama, gemma3 = estimates
    assert llama / gpt2 == pytest.approx(801 / 696, abs=0.1)
    assert gemma3 / gpt2 == pytest.approx(1000 / 696, abs=0.1)
