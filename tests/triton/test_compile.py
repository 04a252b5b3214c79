"""Every Triton kernel compiles, without a GPU, for several GPUs and within their limits."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

from tests.conftest import REPOSITORY

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
]

KERNELS = {
    *("attention_fwd", "attention_bwd_q", "attention_bwd_kv", "mlp_product", "mlp_elements"),
    *("norm_fwd", "norm_bwd", "embedding_fwd", "cross_entropy", "dropout_kernel"),
    *("rope_kernel", "adam_norms", "adam_update"),
}
# Maximum bytes of shared memory per block, by compute capability (CUDA programming guide).
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """Compiled in a process in which Triton does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = REPOSITORY / "benchmarks" / "triton_targets.py"
    result = subprocess.run(
        [sys.executable, str(script), "--json"],
        capture_output=True, text=True, timeout=1500, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_every_kernel_is_compiled_for_every_target(compiled: list[dict[str, Any]]) -> None:
    for capability in SHARED:
        found = {each["kernel"] for each in compiled if each["capability"] == capability}
        assert found == KERNELS
    for kernel in KERNELS - {"adam_norms", "adam_update", "mlp_product", "mlp_elements"}:
        types = {each["dtype"] for each in compiled if each["kernel"] == kernel}
        assert types >= {"fp32", "bf16", "fp16"}


def test_kernels_keep_to_registers_and_shared_memory(compiled: list[dict[str, Any]]) -> None:
    for each in compiled:
        assert each["spilled"] == 0 and each["registers"] <= 255, each
        assert each["shared"] <= SHARED[each["capability"]], each


def test_products_are_matrix_instructions(compiled: list[dict[str, Any]]) -> None:
    """Except in exact fp32, for which there are none."""
    for each in compiled:
        product = each["kernel"].startswith("attention") or each["kernel"] == "mlp_product"
        expected = product and each["dtype"] != "fp32"
        assert (each["matrix_instruction"] is not None) == expected, each
