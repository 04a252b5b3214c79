"""The machine: its processor, and how fast it computes and moves memory at best."""

import contextlib
import platform
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fastllm.benchmarking.shapes import MeasuredPrecision
from fastllm.benchmarking.timing import time_call, time_in_turns
from fastllm.device import TYPES
from fastllm.ops import extension
from fastllm.ops.precision import PRECISIONS
from fastllm.version import __version__


def describe_machine(threads: int, precision: MeasuredPrecision = "fp32") -> dict[str, Any]:
    """The CPU, its measured limits (None without the C++ extension) and the versions in use."""
    kernels = extension.kernels
    return {
        "cpu": cpu_name(),
        "isa": kernels.isa() if kernels else None,
        "threads": threads,
        "peak_gflops": measure_peak(threads, precision) if kernels else None,
        "bandwidth_gbs": measure_bandwidth(threads) if kernels else None,
        "torch": torch.__version__,
        "fastllm": __version__,
    }


def cpu_name() -> str:
    """The processor's model name, or its architecture if the system does not tell the model."""
    with contextlib.suppress(OSError):  # only Linux has this file
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def measure_peak(threads: int, precision: MeasuredPrecision = "fp32") -> float:
    """GFLOP/s of multiply-adds on all threads: median of nine runs of about 50 ms.

    `FASTLLM_CPU_ISA` does not apply: the peak is that of the processor's widest registers, so that
    giving up registers cannot raise a fraction of the peak.
    """
    kernels = extension.kernels
    isa = kernels.isa()
    kernels.set_isa(kernels.isas()[-1])
    try:
        iterations, rest = 1000, (PRECISIONS.index(precision), threads)
        while (seconds := time_call(kernels.fma_loop, iterations, *rest)) < 0.02:
            iterations *= 2
        iterations = int(iterations * 0.05 / seconds)
        flops = kernels.fma_loop(iterations, *rest)
        runs = [time_call(kernels.fma_loop, iterations, *rest) for _ in range(9)]
    finally:
        kernels.set_isa(isa)
    return flops / median(runs) / 1e9


def measure_bandwidth(threads: int, update: bool = False, size: int = 2**26) -> float:
    """GB/s between an array and the processor: median of nine passes.

    Args:
        update: read and write back every element, which counts twice, instead of only reading it.
        size: elements of the array; the default, 256 MiB, is larger than any cache.
    """
    data = torch.ones(size)  # written, because untouched zeros all share one page
    walk = extension.kernels.memory_update if update else extension.kernels.memory_read
    runs = [time_call(walk, data.data_ptr(), data.numel(), threads) for _ in range(9)]
    return data.nbytes * (2 if update else 1) / median(runs) / 1e9


def describe_gpu(precision: MeasuredPrecision) -> dict[str, Any]:
    """The GPU, and its limits: the speed of a large cuBLAS product and of a copy."""
    dtype = TYPES.get(precision, torch.float32)
    n, size = 8192, 2**30
    a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
    source, target = (torch.zeros(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    runs = {"product": lambda _: a @ b, "copy": lambda _: target.copy_(source)}
    milliseconds = time_in_turns(runs, 1, lambda: None)
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "peak_gflops": 2 * n**3 / milliseconds["product"] / 1e6,
        "bandwidth_gbs": 2 * size / milliseconds["copy"] / 1e6,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "torch": torch.__version__,
        "fastllm": __version__,
    }


def process_memory_mb(field: str) -> float:
    """A field of this process's /proc/self/status in MiB: `VmRSS` is now, `VmHWM` the peak."""
    # `ru_maxrss` would not do: a new process inherits the peak of the process that started it.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}")
