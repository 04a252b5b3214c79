import json
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastllm
from fastllm import bench, bench_cuda
from fastllm.bench import CONFIGS, ParityError
from fastllm.ops import dispatch
from tests.conftest import REPOSITORY, needs_extension

CONFIG = CONFIGS["A"]


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastllm.bench", *flags],
        capture_output=True, text=True, timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@needs_extension
def test_json() -> None:
    result = run("--config", "A", "--compare", "eager", "--seconds", "1", "--json")
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
    assert machine["cpu"] and machine["isa"] in dispatch.kernels.isas()
    assert machine["threads"] == 1
    assert machine["peak_gflops"] > 0 and machine["bandwidth_gbs"] > 0
    assert (machine["torch"], machine["fastllm"]) == (torch.__version__, fastllm.__version__)


def test_chunked_needs_a_torch_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    with pytest.raises(SystemExit, match="error: compare: chunked needs torch 2.13 or later"):
        bench.main(["--compare", "chunked"])


@needs_extension
def test_bf16() -> None:
    flags = "--config A --precision bf16 --compare autocast --seconds 0.1 --json".split()
    result = run(*flags)
    if reason := dispatch.why_not_autocast(torch.bfloat16):
        assert result.stderr == f"error: precision: bf16 cannot be measured: {reason}\n"
        return
    (config,) = json.loads(result.stdout)["configs"]
    assert config["precision"] == "bf16" and config["ratio"]["autocast"] > 0


@needs_extension
def test_parity_gate_in_bf16() -> None:
    if reason := dispatch.why_not_autocast(torch.bfloat16):
        pytest.skip(reason)
    torch.manual_seed(0)
    model = bench.build_fastllm(CONFIG)
    stock, ids = bench.build_stock(CONFIG, "autocast", model), CONFIG.random_ids()
    bench.check_parity(model, stock, ids, "bf16")
    original = model.loss

    def wrong_in_bf16(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return original(ids, labels) * (1.1 if torch.is_autocast_enabled("cpu") else 1.0)

    model.loss = wrong_in_bf16  # type: ignore[method-assign]
    with pytest.raises(ParityError, match="gradients of .* differ"):
        bench.check_parity(model, stock, ids, "bf16")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--config A,F", "error: config.1: Input should be 'A', 'B', 'C', 'D' or 'E' (got 'F')"),
        ("--compare jax", "error: compare.0: Input should be 'eager', 'tuned', 'chunked',"),
        ("--seconds 0", "error: seconds: Input should be greater than 0"),
    ],
)
def test_wrong_flags(flags: str, message: str) -> None:
    with pytest.raises(SystemExit) as error:
        bench.main(flags.split())
    assert str(error.value).startswith(message)


def test_flops_by_hand() -> None:
    # A layer's products for one token: 12 matrices of 64 x 64, a multiplication and an addition
    # for each of their numbers. 512 tokens: 2 * 512 * 12 * 4096.
    linear = 50_331_648
    # 32 queries against 32 keys of 64 numbers, and the weights times the values, for 16 sequences:
    # 2 * 2 * 16 * 1024 * 64.
    attention = 4_194_304
    # 512 tokens times a matrix of 64 x 66: 2 * 512 * 4224.
    head = 4_325_376
    # Two layers; the backward is two forwards.
    assert CONFIG.flops == 3 * (2 * (linear + attention) + head) == 340_131_840


def test_both_do_the_products_that_are_counted() -> None:
    model = bench.build_fastllm(CONFIG)
    stock = bench.build_stock(CONFIG, "eager", model)
    ids = CONFIG.random_ids()
    for step in (bench.fastllm_step(model), bench.stock_step(stock, "eager")):
        # PyTorch's counter sees its own products only.
        with FlopCounterMode(display=False) as counter, fastllm.use("ref"):
            step(ids)
        assert counter.get_total_flops() == CONFIG.flops


@pytest.mark.parametrize("rival", ["eager", "tuned", "compile"])
def test_parity_gate(rival: bench.Rival) -> None:
    torch.manual_seed(0)
    model = bench.build_fastllm(CONFIG)
    ids = CONFIG.random_ids()
    bench.check_parity(model, bench.build_stock(CONFIG, rival, model), ids)
    for name in ("embedding.weight", "blocks.0.qkv.weight", "blocks.1.fc2.bias", "head.bias"):
        stock = bench.build_stock(CONFIG, rival, model)
        with torch.no_grad():
            stock.get_parameter(name).flatten()[70 % stock.get_parameter(name).numel()] += 0.1
        with pytest.raises(ParityError, match=r"loss is|gradients of"):
            bench.check_parity(model, stock, ids)


def test_red_gate_ends_the_command_before_timing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], threads: None
) -> None:
    build = bench.build_stock

    def build_wrong(*arguments: object) -> bench.StockDecoder:
        stock = build(*arguments)  # type: ignore[arg-type]
        torch.nn.init.zeros_(stock.head.weight)
        return stock

    monkeypatch.setattr(bench, "build_stock", build_wrong)
    monkeypatch.setattr(bench, "_seconds", lambda *arguments: pytest.fail("it was timed"))
    monkeypatch.setattr(bench, "describe_machine", lambda *arguments: {"peak_gflops": None})
    with pytest.raises(SystemExit, match="error: config A, tuned: .*; nothing was timed"):
        bench.main(["--config", "A", "--compare", "tuned", "--json"])
    assert capsys.readouterr().out == ""


def test_failing_compiler_is_told_and_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_compiler(*arguments: object) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", lambda module, dynamic: no_compiler)
    milliseconds = bench.time_config("A", ["tuned", "compile"], 0.1)
    assert set(milliseconds) == {"fastllm", "tuned"}
    assert "torch.compile cannot run: RuntimeError: no C++ compiler" in capsys.readouterr().err
    ratio = bench.report("A", milliseconds, peak_gflops=100.0)["ratio"]
    assert ratio["compile"] is None
    assert ratio["tuned"] == milliseconds["tuned"] / milliseconds["fastllm"]


@pytest.mark.filterwarnings("ignore:fastllm runs on the slow PyTorch reference")
def test_without_the_extension(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], threads: None
) -> None:
    monkeypatch.setattr(dispatch, "kernels", None)
    monkeypatch.setattr(dispatch, "extension_problem", "it was never built")
    bench.main(["--config", "A", "--compare", "eager", "--seconds", "0.1"])
    out, err = capsys.readouterr()
    assert "peak cannot be measured: it was never built" in err
    lines = out.splitlines()
    assert lines[-2].split()[0] == "config"
    letter, step_ms, *_, percent_of_peak, eager, tuned, compiled = lines[-1].split()
    assert letter == "A" and float(step_ms.replace(",", "")) > 0 and float(eager) > 0
    assert percent_of_peak == tuned == compiled == "-"


@needs_extension
def test_peak_is_the_processors_whatever_the_cap() -> None:
    before = dispatch.kernels.isa()
    dispatch.kernels.set_isa("base")
    try:
        assert bench.measure_peak(1) > 0
        assert dispatch.kernels.isa() == "base"
    finally:
        dispatch.kernels.set_isa(before)


@needs_extension
def test_fma_loop_is_counted_for_every_thread() -> None:
    assert dispatch.kernels.fma_loop(100, 0, 2) == 2 * dispatch.kernels.fma_loop(100, 0, 1) > 0


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which only Linux has")
def test_memory() -> None:
    result = run("--memory", "--config", "A", "--compare", "eager", "--json")
    assert result.returncode == 0, result.stderr
    (peaks,) = json.loads(result.stdout)["memory_mb"].values()
    assert 0 < peaks["fastllm"] < peaks["eager"] < 1000


def test_a_gpu_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA GPU")
    result = run("--device", "cuda")
    assert result.returncode == 1
    assert result.stderr.startswith("error: device: there is no CUDA GPU to measure")


def test_operations_as_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same calls on the CPU; without torch.compile, whose failing is told."""

    def compile_nothing(function: object, **settings: object) -> object:
        def compiled(*arguments: object) -> None:
            raise RuntimeError("no compiler")

        return compiled

    monkeypatch.setattr(torch, "compile", compile_nothing)
    results = list(bench_cuda.measure_operations("cpu", "fp32", 0.01, ("A",)))
    assert [result["operation"] for result in results] == [
        *("attention", "mlp", "layer_norm", "wide layer_norm", "embedding"),
        *("linear_cross_entropy", "dropout", "adam"),
    ]
    for result in results:
        assert result["ms"] > 0 and result["gbs"] > 0
        assert result["ratio"]["compile"] is None
        assert max(result["ratio"]["eager"] or 0, result["ratio"]["tuned"] or 0) > 0
        row = bench_cuda.operation_row(result, {"peak_gflops": 100.0, "bandwidth_gbs": 10.0})
        assert len(row) == len(bench_cuda.OPERATIONS_HEAD)
    assert "attention: torch.compile cannot run: no compiler" in capsys.readouterr().err
    for operation in bench_cuda.operations("cpu", "fp32", "A", p=0.0):
        with pytest.raises(ParityError, match=f"{operation.name} at A is off by .*; it was not"):
            bench_cuda.check_operation(
                operation._replace(ours=lambda *t, eager=operation.eager: 1.001 * eager(*t))
            )


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
