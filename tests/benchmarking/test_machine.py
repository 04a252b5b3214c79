from fastllm.benchmarking.machine import measure_peak
from fastllm.ops import dispatch
from tests.conftest import needs_extension


@needs_extension
def test_peak_ignores_the_cap_on_the_instruction_set() -> None:
    before = dispatch.kernels.isa()
    dispatch.kernels.set_isa("base")
    try:
        assert measure_peak(1) > 0
        assert dispatch.kernels.isa() == "base"
    finally:
        dispatch.kernels.set_isa(before)


@needs_extension
def test_fma_loop_counts_every_thread() -> None:
    assert dispatch.kernels.fma_loop(100, 0, 2) == 2 * dispatch.kernels.fma_loop(100, 0, 1) > 0
