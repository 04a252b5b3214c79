import pytest
import torch

from fastllm.benchmarking.operations import check_operation, measure_operations, operations
from fastllm.benchmarking.steps import ParityError


def test_operations_as_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same calls on the CPU, with a torch.compile that fails; the failure is logged."""

    def compile_nothing(function: object, **settings: object) -> object:
        def compiled(*arguments: object) -> None:
            raise RuntimeError("no compiler")

        return compiled

    monkeypatch.setattr(torch, "compile", compile_nothing)
    results = list(measure_operations("cpu", "fp32", 0.01, ("A",)))
    assert [result["operation"] for result in results] == [
        *("attention", "mlp", "norm", "wide norm", "embedding"),
        *("linear_cross_entropy", "dropout", "adam"),
    ]
    for result in results:
        assert result["ms"] > 0 and result["gbs"] > 0
        assert result["ratio"]["compile"] is None
        assert max(result["ratio"]["eager"] or 0, result["ratio"]["tuned"] or 0) > 0
    assert "attention: torch.compile cannot run: no compiler" in capsys.readouterr().err


def test_an_inaccurate_operation_is_not_timed() -> None:
    for operation in operations("cpu", "fp32", "A", p=0.0):
        check_operation(operation, "A")
        wrong = operation._replace(ours=lambda *t, eager=operation.eager: 1.001 * eager(*t))
        with pytest.raises(ParityError, match=f"{operation.name} at A is off by .*; it was not"):
            check_operation(wrong, "A")
