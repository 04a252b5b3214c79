"""The C++ extension: loaded once, with the best instruction set that this CPU can run."""

import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any

# The instruction sets that the kernels are compiled for; each includes all earlier ones.
ISAS = ("base", "avx2", "avx512", "avx512_bf16")


def best_isa(cap: str, runnable: Sequence[str]) -> str:
    """The best of `runnable`, the sets that this CPU can run, up to `cap`.

    Raises:
        ValueError: `cap` is not an instruction set.
    """
    if cap not in ISAS:
        raise ValueError(
            f"FASTLLM_CPU_ISA: there is no instruction set '{cap}'; choose from {', '.join(ISAS)}"
        )
    return next(isa for isa in reversed(ISAS[: ISAS.index(cap) + 1]) if isa in runnable)


kernels: Any = None
problem: str | None = None
try:
    kernels = import_module("fastllm._kernels")
except ImportError as error:
    problem = (
        f"the C++ extension cannot be loaded ({error}); "
        "install a C++ compiler, then install fastllm again"
    )
if kernels and os.environ.get("FASTLLM_CPU_ISA"):
    kernels.set_isa(best_isa(os.environ["FASTLLM_CPU_ISA"], kernels.isas()))


def why_not_here() -> str | None:
    """Why the C++ kernels cannot run on this machine, or None."""
    return problem
