import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastllm
from fastllm import DecoderModel
from fastllm.bench import main
from fastllm.benchmarking import report, steps
from fastllm.benchmarking.config import BenchConfig
from fastllm.benchmarking.stock import StockDecoder
from fastllm.ops import dispatch, extension
from fastllm.ops.precision import why_not_autocast
from tests.commands import run_command
from tests.conftest import REPOSITORY, needs_extension
from tests.hf_models import MODELS, save_hf_model


@pytest.mark.subprocess
@needs_extension
def test_json() -> None:
    flags = "--config A --compare eager --seconds 1 --json".split()
    result = subprocess.run(
        [sys.executable, "-m", "fastllm.bench", *flags],
        capture_output=True, text=True, timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert set(values) == {"configs", "machine"}
    (config,) = values["configs"]
    assert set(config) == {
        "config", "precision", "step_ms", "tokens_per_second", "gflops", "fraction_of_peak", "ratio"
    }  # fmt: skip
    assert (config["config"], config["precision"]) == ("A", "fp32")
    assert config["tokens_per_second"] == pytest.approx(16 * 32 / (config["step_ms"] / 1000))
    assert config["gflops"] == pytest.approx(0.340131840 / (config["step_ms"] / 1000))
    machine = values["machine"]
    assert config["fraction_of_peak"] == pytest.approx(config["gflops"] / machine["peak_gflops"])
    assert set(config["ratio"]) == {"eager", "tuned", "compile"}
    assert config["ratio"]["eager"] > 0
    assert config["ratio"]["tuned"] is config["ratio"]["compile"] is None
    assert set(machine) == {
        "cpu", "isa", "threads", "peak_gflops", "bandwidth_gbs", "torch", "fastllm"
    }  # fmt: skip
    assert machine["cpu"] and machine["isa"] in extension.kernels.isas()
    assert machine["threads"] == 1
    assert machine["peak_gflops"] > 0 and machine["bandwidth_gbs"] > 0
    assert (machine["torch"], machine["fastllm"]) == (torch.__version__, fastllm.__version__)


def test_chunked_needs_a_torch_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    with pytest.raises(SystemExit, match="error: compare: chunked needs torch 2.13 or later"):
        main(["--compare", "chunked"])


@needs_extension
def test_bf16() -> None:
    flags = "--config A --precision bf16 --compare autocast --seconds 0.1 --json".split()
    result = run_command("bench", *flags, "--threads", "1")
    if reason := why_not_autocast(torch.bfloat16):
        assert result.stderr == f"error: precision: bf16 cannot be measured: {reason}\n"
        return
    (config,) = json.loads(result.stdout)["configs"]
    assert config["precision"] == "bf16" and config["ratio"]["autocast"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--config A,F", "error: --shape must be 'A', 'B', 'C', 'D' or 'E' (got 'F')"),
        ("--compare jax", "error: --compare must be 'eager', 'tuned', 'chunked',"),
        ("--seconds 0", "error: --seconds must be greater than 0"),
    ],
)
def test_wrong_flags(flags: str, message: str) -> None:
    with pytest.raises(SystemExit) as error:
        main(flags.split())
    assert str(error.value).startswith(message)


def test_red_gate_ends_the_command_before_timing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], threads: None
) -> None:
    build = steps.build_stock

    def build_wrong(*arguments: object) -> StockDecoder:
        stock = build(*arguments)  # type: ignore[arg-type]
        torch.nn.init.zeros_(stock.head.weight)
        return stock

    monkeypatch.setattr(steps, "build_stock", build_wrong)
    monkeypatch.setattr(steps, "time_call", lambda *arguments: pytest.fail("it was timed"))
    monkeypatch.setattr(steps, "time_in_turns", lambda *arguments: pytest.fail("it was timed"))
    monkeypatch.setattr(report, "describe_machine", lambda *arguments: {"peak_gflops": None})
    with pytest.raises(SystemExit, match="error: config A, tuned: .*; nothing was timed"):
        main(["--config", "A", "--compare", "tuned", "--json"])
    assert capsys.readouterr().out == ""


@pytest.mark.filterwarnings("ignore:fastllm runs on the slow PyTorch reference")
def test_without_the_extension(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], threads: None
) -> None:
    monkeypatch.setattr(extension, "kernels", None)
    monkeypatch.setattr(extension, "problem", "it was never built")
    main(["--config", "A", "--compare", "eager", "--seconds", "0.1"])
    out, err = capsys.readouterr()
    assert "peak cannot be measured: it was never built" in err
    lines = out.splitlines()
    assert lines[-2].split()[0] == "config"
    letter, step_ms, *_, percent_of_peak, eager, tuned, compiled = lines[-1].split()
    assert letter == "A" and float(step_ms.replace(",", "")) > 0 and float(eager) > 0
    assert percent_of_peak == tuned == compiled == "-"


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which only Linux has")
@pytest.mark.subprocess
def test_memory() -> None:
    result = run_command("bench", *"--memory --config A --compare eager --threads 1 --json".split())
    assert result.returncode == 0, result.stderr
    (peaks,) = json.loads(result.stdout)["memory_mb"].values()
    assert 0 < peaks["fastllm"] < peaks["eager"] < 1000


OPERATION = {
    "operation": "mlp", "config": "D", "ms": 0.5, "gflops": 40.0, "gbs": 2.0,
    "ratio": {"eager": 3.0, "tuned": None, "compile": 1.5},
}  # fmt: skip


def test_report_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Limits, operations, steps; nothing is measured, since no GPU is needed here."""
    machine = {"gpu": "Some GPU", "peak_gflops": 100.0, "bandwidth_gbs": 10.0}
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(report, "describe_gpu", lambda precision: machine)
    monkeypatch.setattr(
        report,
        "measure_operations",
        lambda *arguments: asked.append((*arguments, dispatch.requested())) or [OPERATION],
    )
    monkeypatch.setattr(report, "time_steps", lambda *arguments: {"fastllm": 2.0, "tuned": 5.0})
    settings = BenchConfig(device="cuda", shape=["A"], seconds=10)
    found = report.show_times(settings, ["tuned"], threads=1)
    assert set(found) == {"configs", "machine", "operations"}
    assert found["operations"] == [OPERATION] and found["machine"] == machine
    assert [result["config"] for result in found["configs"]] == ["A"]
    assert asked == [("cuda", "fp32", 2.0, "triton")]
    lines = capsys.readouterr().out.splitlines()
    starts = [line.split()[0] for line in lines if line]
    assert starts == [*machine, "Operations,", "operation", "mlp", "A", "config", "A"]


def test_rows() -> None:
    """Ratios of rivals that were not measured are dashes, or left out of the default columns."""
    result = report.step_report("A", {"fastllm": 2.0, "tuned": 5.0}, peak_gflops=1000.0)
    assert result["ratio"] == {"eager": None, "tuned": 2.5, "compile": None}
    assert report.step_row(result).split() == "A 2.00 256,000.00 170.07 17.01 - 2.50 -".split()
    row = report.operation_row(OPERATION, {"peak_gflops": 100.0, "bandwidth_gbs": 10.0})
    assert row.split() == "mlp D 0.500 40.000 20.000 3.000 - 1.500".split()
    assert len(row) == 24 + 12 * len(report.OPERATION_COLUMNS)


def test_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA GPU")
    result = run_command("bench", "--device", "cuda")
    assert result.returncode == 1
    assert result.stderr.startswith("error: device: there is no CUDA GPU to measure")


@pytest.mark.subprocess
def test_benchmarks_run() -> None:
    """Once each and untimed, at the smallest shape; they hold fastllm against PyTorch."""
    result = subprocess.run(
        [
            sys.executable, "-m", "pytest", "benchmarks", "--benchmark-disable", "-q",
            "-k", "[forward-A] or [backward-A] or test_adam and A-clip or test_step and [A]",
            "-p", "no:cacheprovider",
        ],
        capture_output=True, text=True, timeout=200, cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    assert "16 passed" in result.stdout


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_of_transformers(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="pip install '.[finetune]' brings transformers")
    folder = str(tmp_path / "small")
    save_hf_model(Path(folder), kind)
    flags = ("--model", folder, "--seconds", "0.1", "--threads", "1")
    result = run_command("bench", *flags, "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["model"], found["precision"]) == (folder, "fp32")
    assert found["tokens_per_second"] == pytest.approx(4 * 64 / (found["step_ms"] / 1000))
    assert found["ratio"]["transformers"] > 0 and found["machine"]["threads"] == 1
    assert "; transformers takes " in run_command("bench", *flags).stdout.splitlines()[-1]
    for more, message in (
        (("--model", str(tmp_path)), "config.json does not exist"),
        (("--model", folder, "--shape", "A"), "--model is measured without --shape"),
        (("--model", folder, "--memory"), "--model is measured without --shape"),
    ):
        result = run_command("bench", *more)
        assert result.returncode == 1 and message in result.stderr


def test_nothing_is_timed_if_the_losses_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="pip install '.[finetune]' brings transformers")
    save_hf_model(tmp_path / "small", "llama")
    loss = DecoderModel.loss
    monkeypatch.setattr(DecoderModel, "loss", lambda *args: loss(*args) + 0.01)
    result = run_command("bench", "--model", str(tmp_path / "small"))
    assert result.returncode == 1 and "error: fastllm's loss is " in result.stderr
