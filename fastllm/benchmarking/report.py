"""What the bench command measures and shows: a table, or one JSON object.

The contestants take turns in one process, because other work on the machine can double any time:
the ratios hold where the milliseconds do not. fastllm and stock PyTorch must give the same loss and
gradients from the same weights before a configuration is timed.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any, get_args

import torch
import torch.nn.functional as F

from fastllm.benchmarking.config import COMPARE, BenchConfig
from fastllm.benchmarking.machine import describe_gpu, describe_machine
from fastllm.benchmarking.operations import measure_operations
from fastllm.benchmarking.pretrained import time_model_steps
from fastllm.benchmarking.shapes import CONFIGS, Letter, MeasuredPrecision, Rival
from fastllm.benchmarking.steps import (
    ParityError,
    measure_memory,
    time_steps,
)
from fastllm.command import errors_in_one_line, log
from fastllm.ops import dispatch, extension, implementation_line
from fastllm.ops.precision import why_not_autocast
from fastllm.threads import set_threads

OPERATION_COLUMNS = ("ms", "% of peak", "% of bytes", "eager", "tuned", "compile")


def bench(settings: BenchConfig) -> None:
    """Measures and prints; exits if this machine cannot measure what was asked for."""
    threads = set_threads(settings.threads)
    rivals = choose_rivals(settings)
    # Without --impl, FASTLLM_IMPL applies.
    with dispatch.use_implementation(settings.impl):
        with errors_in_one_line(dispatch.ImplementationError, ValueError):
            log(f"operations  {implementation_line(settings.device)}")
        if settings.model is not None:
            found = show_model(settings, settings.model, threads)
        elif settings.memory:
            found = show_memory(settings, rivals)
        else:
            found = show_times(settings, rivals, threads)
    if settings.json_:
        print(json.dumps(found))


def choose_rivals(settings: BenchConfig) -> list[Rival]:
    """The rivals to measure; exits if this machine cannot measure what was asked for."""
    if settings.memory and not sys.platform.startswith("linux"):
        raise SystemExit("error: --memory reads /proc, which only Linux has")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "error: device: there is no CUDA GPU to measure, or this PyTorch has no CUDA"
        )
    rivals = settings.compare
    if settings.precision == "bf16" and settings.device == "cpu":
        if reason := why_not_autocast(torch.bfloat16):
            raise SystemExit(f"error: precision: bf16 cannot be measured: {reason}")
        if "compare" not in settings.model_fields_set:
            rivals = [*rivals, "autocast"]
    if "chunked" in rivals and not hasattr(F, "linear_cross_entropy"):
        raise SystemExit(
            f"error: compare: chunked needs torch 2.13 or later, not {torch.__version__}"
        )
    return rivals


def show_memory(settings: BenchConfig, rivals: list[Rival]) -> dict[str, Any]:
    settings.show("Peak MiB of a step beyond weights, gradients and optimizer moments:")
    settings.show(table_line("config", "fastllm", *rivals))
    peaks = {}
    for letter in dict.fromkeys(settings.shape):
        peaks[letter] = measure_memory(letter, rivals, settings.precision, settings.impl)
        settings.show(table_line(letter, *peaks[letter].values()))
    return {"memory_mb": peaks}


def show_model(settings: BenchConfig, source: str, threads: int) -> dict[str, Any]:
    precision, device = settings.precision, settings.device
    machine = describe_gpu(precision) if device == "cuda" else describe_machine(threads, precision)
    settings.show("\n".join(f"{name:15}{cell_text(value)}" for name, value in machine.items()))
    with errors_in_one_line(ParityError, OSError, ValueError, ImportError):
        times = time_model_steps(source, settings.seconds, precision, device)
    speed, ratio = 1000 * times.tokens / times.fastllm, times.transformers / times.fastllm
    settings.show(
        f"\nA step by fastllm takes {times.fastllm:,.2f} ms, {speed:,.0f} tokens/s; transformers "
        f"takes {ratio:.2f} times as long"
    )
    return {
        "model": source,
        "precision": precision,
        "step_ms": times.fastllm,
        "tokens_per_second": speed,
        "ratio": {"transformers": ratio},
        "machine": machine,
    }


def show_times(settings: BenchConfig, rivals: list[Rival], threads: int) -> dict[str, Any]:
    precision, on_gpu = settings.precision, settings.device == "cuda"
    machine = describe_gpu(precision) if on_gpu else describe_machine(threads, precision)
    if extension.kernels is None and not on_gpu:
        log(f"the machine's peak cannot be measured: {extension.problem}")
    settings.show("\n".join(f"{name:15}{cell_text(value)}" for name, value in machine.items()))
    operations = list(show_operations(settings, machine)) if on_gpu else []
    settings.show("\nA step by fastllm, and how many times as long stock PyTorch takes:")
    shown = [rival for rival in get_args(Rival) if rival in rivals or rival in COMPARE]
    settings.show(table_line("config", "ms", "tokens/s", "GFLOP/s", "% of peak", *shown))
    results = []
    for letter in dict.fromkeys(settings.shape):
        with errors_in_one_line(ParityError):
            milliseconds = time_steps(letter, rivals, settings.seconds, precision, settings.device)
        results.append(step_report(letter, milliseconds, machine["peak_gflops"], precision))
        settings.show(step_row(results[-1]))
    found = {"configs": results, "machine": machine}
    return {**found, "operations": operations} if on_gpu else found


def show_operations(settings: BenchConfig, machine: dict[str, Any]) -> Iterator[dict[str, Any]]:
    settings.show("\nOperations, forward and backward, and how many times as long PyTorch takes:")
    settings.show(f"{'operation':>24}" + "".join(f"{column:>12}" for column in OPERATION_COLUMNS))
    # The kernels, even where the automatic choice is PyTorch, so that the choice can be judged.
    kernels = "triton" if settings.impl == "auto" else settings.impl
    with dispatch.use(kernels), errors_in_one_line(ParityError, RuntimeError):
        for result in measure_operations("cuda", settings.precision, settings.seconds / 5):
            settings.show(operation_row(result, machine))
            yield result


def operation_row(result: dict[str, Any], machine: dict[str, Any]) -> str:
    """An operation's line: its time, fractions of the GPU's limits, and the rivals' ratios."""
    cells = [
        result["ms"],
        100 * result["gflops"] / machine["peak_gflops"],
        100 * result["gbs"] / machine["bandwidth_gbs"],
        *result["ratio"].values(),
    ]
    name = f"{result['operation']} {result['config']}"
    return f"{name:>24}" + "".join(
        f"{'-' if cell is None else f'{cell:,.3f}':>12}" for cell in cells
    )


def step_report(
    letter: Letter,
    milliseconds: dict[str, float],
    peak_gflops: float | None,
    precision: MeasuredPrecision = "fp32",
) -> dict[str, Any]:
    """A configuration's entry in `--json`; a ratio is a rival's time over fastllm's."""
    shape, ours = CONFIGS[letter], milliseconds["fastllm"]
    gflops = shape.flops / ours / 1e6
    return {
        "config": letter,
        "precision": precision,
        "step_ms": ours,
        "tokens_per_second": 1000 * shape.B * shape.S / ours,
        "gflops": gflops,
        "fraction_of_peak": gflops / peak_gflops if peak_gflops else None,
        "ratio": {
            rival: milliseconds[rival] / ours if rival in milliseconds else None
            for rival in get_args(Rival)
            if rival in milliseconds or rival in COMPARE
        },
    }


def step_row(result: dict[str, Any]) -> str:
    """A configuration's line in the table."""
    fraction = result["fraction_of_peak"]
    percent = None if fraction is None else 100 * fraction
    cells = [result[name] for name in ("config", "step_ms", "tokens_per_second", "gflops")]
    return table_line(*cells, percent, *result["ratio"].values())


def table_line(*cells: Any) -> str:
    return "".join(f"{cell_text(cell):>12}" for cell in cells)


def cell_text(value: Any) -> str:
    return f"{value:,.2f}" if isinstance(value, float) else str(value or "-")
