import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastllm
from fastllm.benchmarking.shapes import CONFIGS
from fastllm.benchmarking.steps import (
    ParityError,
    Rival,
    build_fastllm,
    build_stock,
    check_parity,
    fastllm_step,
    measure_memory,
    stock_step,
    time_steps,
)
from fastllm.ops import dispatch
from fastllm.ops.precision import why_not_autocast
from tests.conftest import needs_extension

SHAPE = CONFIGS["A"]


def test_both_compute_the_products_that_are_counted() -> None:
    model = build_fastllm(SHAPE)
    stock = build_stock(SHAPE, "eager", model)
    ids = SHAPE.random_ids()
    for step in (fastllm_step(model), stock_step(stock, "eager")):
        # PyTorch's counter sees only PyTorch's products.
        with FlopCounterMode(display=False) as counter, fastllm.use("ref"):
            step(ids)
        assert counter.get_total_flops() == SHAPE.flops


@pytest.mark.parametrize("rival", ["eager", "tuned", "compile"])
def test_parity_gate(rival: Rival) -> None:
    torch.manual_seed(0)
    model = build_fastllm(SHAPE)
    ids = SHAPE.random_ids()
    check_parity(model, build_stock(SHAPE, rival, model), ids)
    for name in ("embedding.weight", "blocks.0.qkv.weight", "blocks.1.fc2.bias", "head.bias"):
        stock = build_stock(SHAPE, rival, model)
        with torch.no_grad():
            stock.get_parameter(name).flatten()[70 % stock.get_parameter(name).numel()] += 0.1
        with pytest.raises(ParityError, match=r"loss is|gradients of"):
            check_parity(model, stock, ids)


@needs_extension
def test_parity_gate_in_bf16() -> None:
    if reason := why_not_autocast(torch.bfloat16):
        pytest.skip(reason)
    torch.manual_seed(0)
    model = build_fastllm(SHAPE)
    stock, ids = build_stock(SHAPE, "autocast", model), SHAPE.random_ids()
    check_parity(model, stock, ids, "bf16")
    original = model.loss

    def wrong_in_bf16(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return original(ids, labels) * (1.1 if torch.is_autocast_enabled("cpu") else 1.0)

    model.loss = wrong_in_bf16  # type: ignore[method-assign]
    with pytest.raises(ParityError, match="gradients of .* differ"):
        check_parity(model, stock, ids, "bf16")


def test_failing_compiler_is_reported_and_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_compiler(*arguments: object) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", lambda module, dynamic: no_compiler)
    milliseconds = time_steps("A", ["tuned", "compile"], 0.1)
    assert set(milliseconds) == {"fastllm", "tuned"}
    assert "torch.compile cannot run: RuntimeError: no C++ compiler" in capsys.readouterr().err


@pytest.mark.subprocess
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which only Linux has")
def test_memory_is_measured_with_the_implementation_that_is_asked_for() -> None:
    """An implementation that does not exist reaches the process that measures."""
    with pytest.raises(ValueError, match="no implementation 'abacus'"):
        measure_memory("A", [], "fp32", "abacus")


def test_auto_lets_the_environment_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLLM_IMPL", "ref")
    with dispatch.use_implementation("auto"):
        assert dispatch.requested() == "ref"
    with dispatch.use_implementation("cpu"):
        assert dispatch.requested() == "cpu"
