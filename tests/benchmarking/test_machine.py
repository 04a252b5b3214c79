from fastllm.benchmarking.machine import measure_peak
from fastllm.ops import extension
from tests.conftest import needs_extension


@needs_extension
def test_peak_ignores_the_cap_on_the_instruction_set() -> None:
    before = extension.kernels.isa()
    extension.kernels.set_isa("base")
    try:
        assert measure_peak(1) > 0
        assert extension.kernels.isa() == "base"
    finally:
        extension.kernels.set_isa(before)


@needs_extension
def test_fma_loop_counts_every_thread() -> None:
    assert extension.kernels.fma_loop(100, 0, 2) == 2 * extension.kernels.fma_loop(100, 0, 1) > 0
