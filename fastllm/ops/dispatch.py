"""Which implementation of an operation runs: an ordered list per operation, best first.

Each entry answers `why_not(*arguments)`: `None`, or the reason why it cannot take them. Asked
without arguments it speaks for the machine alone. The automatic choice falls through the list to
the reference, which takes everything. An implementation asked for by name, with `use` or the
variable `FASTLLM_IMPL`, raises with its reason where it cannot serve; operations that have none of
that name choose automatically.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Instruction sets that kernels are compiled for, each with all that those before it have.
ISAS = ("base", "avx2", "avx512", "avx512_bf16")


def best_isa(cap: str, runnable: Sequence[str]) -> str:
    """The last of `runnable`, what this CPU can run, that does not go beyond `cap`.

    Raises:
        ValueError: `cap` is no instruction set.
    """
    if cap not in ISAS:
        raise ValueError(
            f"FASTLLM_CPU_ISA: there is no instruction set '{cap}'; choose from {', '.join(ISAS)}"
        )
    return next(isa for isa in reversed(ISAS[: ISAS.index(cap) + 1]) if isa in runnable)


# Triton then runs its kernels on CPU tensors: slowly, to test what they compute.
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")

kernels: Any = None
extension_problem: str | None = None
try:
    kernels = import_module("fastllm._kernels")
except ImportError as error:
    extension_problem = (
        f"the C++ extension cannot be loaded ({error}); "
        "install a C++ compiler, then install fastllm again"
    )
if kernels and os.environ.get("FASTLLM_CPU_ISA"):
    kernels.set_isa(best_isa(os.environ["FASTLLM_CPU_ISA"], kernels.isas()))

NAMES = ("auto", "ref", "cpu", "triton")

_asked_for: ContextVar[str | None] = ContextVar("fastllm_implementation", default=None)


class Implementation(NamedTuple):
    """One way to compute an operation: its name, its function, and when it declines."""

    name: str
    run: Callable[..., Any]
    why_not: Callable[..., str | None] = lambda *arguments: None


class ImplementationError(RuntimeError):
    """The implementation asked for by name cannot serve; the message says why."""


def use(name: str) -> AbstractContextManager[None]:
    """Run every operation inside the `with` block by one implementation.

    Args:
        name: `auto`, `ref`, `cpu` or `triton`. Takes precedence over `FASTLLM_IMPL`.

    Raises:
        ValueError: the name is none of these.
    """
    return _using(_checked(name, "fastllm.use"))


@contextmanager
def _using(name: str) -> Iterator[None]:
    token = _asked_for.set(name)
    try:
        yield
    finally:
        _asked_for.reset(token)


def requested() -> str:
    """The implementation asked for by `use`, else by `FASTLLM_IMPL`, else `auto`."""
    return _asked_for.get() or _checked(os.environ.get("FASTLLM_IMPL") or "auto", "FASTLLM_IMPL")


def choose(operation: str, table: Sequence[Implementation], *arguments: Any) -> Implementation:
    """The implementation that runs `operation` on these arguments.

    Raises:
        ImplementationError: the one asked for by name declines; the message lists every
            implementation with its reason.
    """
    name = requested()
    wanted = [each for each in table if each.name == name] or table
    for candidate in wanted:
        reason = candidate.why_not(*arguments)
        if reason is None:
            return candidate
        if candidate.name == "cpu" and reason == extension_problem:
            _warn_once(f"fastllm runs on the slow PyTorch reference: {reason}")
    reasons = "; ".join(
        f"{each.name}: {each.why_not(*arguments) or 'can run it'}" for each in table
    )
    raise ImplementationError(f"'{name}' was asked for and cannot run '{operation}' ({reasons})")


_is_cpu, _dtype = attrgetter("is_cpu"), attrgetter("dtype")


def why_not_cpu(*tensors: Tensor) -> str | None:
    """Why the C++ kernels cannot take these tensors: the reason that all of them share."""
    if kernels is None:
        return extension_problem
    # A small model's step checks hundreds of tensors: `map` goes through them in C.
    if not all(map(_is_cpu, tensors)):
        return f"a tensor is on {next(t.device for t in tensors if not t.is_cpu)}"
    for dtype in set(map(_dtype, tensors)):
        if dtype is not torch.float32:
            return f"a tensor is {dtype}; the kernels compute in torch.float32"
    for cls in set(map(type, tensors)):
        if (reason := _why_not_class(cls)) is not None:
            return reason
    if inside_torch_func():
        return "a torch.func transform is under way"
    return None


def _why_not_class(cls: type) -> str | None:
    if cls is Tensor or cls is torch.nn.Parameter:
        return None
    return f"a tensor is a {cls.__name__}, whose memory may not be plain"


@cache
def _why_no_triton() -> str | None:
    if not TRITON_INTERPRETED:
        if not torch.cuda.is_available():
            return "this machine has no CUDA GPU, or this PyTorch is built without CUDA"
        major, minor = torch.cuda.get_device_capability()
        if major < 8:
            return f"the GPU's compute capability is {major}.{minor}; the kernels need 8.0"
    if find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    return None


def why_not_triton(*tensors: Tensor | None) -> str | None:
    """Why the Triton kernels cannot take these tensors: the reason that all of them share."""
    present = [tensor for tensor in tensors if tensor is not None]
    for tensor in present:
        interpreted = TRITON_INTERPRETED and tensor.is_cpu and requested() == "triton"
        if not tensor.is_cuda and not interpreted:
            return f"a tensor is on {tensor.device}; the Triton kernels are for CUDA"
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"a tensor is {tensor.dtype}; the kernels take fp32, bf16 and fp16"
        if (reason := _why_not_class(type(tensor))) is not None:
            return reason
        if tensor.device != present[0].device:
            return f"tensors are on {present[0].device} and on {tensor.device}"
        autocast = torch.is_autocast_enabled(tensor.device.type)
        if tensor.dtype != present[0].dtype and not autocast:
            return f"tensors are {present[0].dtype} and {tensor.dtype}"
    if inside_torch_func():
        return "a torch.func transform is under way"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation is under way"
    return _why_no_triton()


def run_triton(operation: str) -> Callable[..., Any]:
    """`{operation}_triton` of the file of that name, which is imported when it is called."""

    def run(*arguments: Any) -> Any:
        name = f"{operation}_triton"
        function = getattr(import_module(f"fastllm.ops.{name}"), name)
        first = arguments[0]
        if not isinstance(first, Tensor):
            return function(*arguments)
        # Triton launches on the current GPU, wherever the tensors are.
        with torch.cuda.device_of(first):
            return function(*arguments)

    return run


def why_not_fused(*tensors: Tensor | None) -> str | None:
    """Why an operation of many steps cannot run as one kernel on these tensors, or None."""
    reason = why_not_cpu(*[tensor for tensor in tensors if tensor is not None])
    if reason is None and torch.is_autocast_enabled("cpu"):
        reason = why_not_autocast(torch.get_autocast_dtype("cpu"))
    if reason is None and torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation is under way"
    return reason


# What the kernels round the operands of matrix products to, in the order of their enumeration.
PRECISIONS = ("fp32", "bf16", "int8")


def why_not_autocast(dtype: torch.dtype) -> str | None:
    """Why products cannot run in C++ under autocast to `dtype`, or None."""
    if kernels is None:
        return extension_problem
    if dtype is not torch.bfloat16:
        return f"autocast to {dtype} is on; on a CPU the kernels know torch.bfloat16"
    if not kernels.native_bf16():
        return f"this CPU has no dot product of bf16 numbers ({kernels.isa()} is in use)"
    return None


def precision() -> int:
    """Of the kernels' products: bf16 under autocast, else fp32; an index into `PRECISIONS`."""
    return PRECISIONS.index("bf16" if torch.is_autocast_enabled("cpu") else "fp32")


def autocast_input(x: Tensor, weight: Tensor) -> Tensor:
    """What another module made under autocast, as the kernels take it: they round it themselves.

    Anything else stays as it is, such as the input of a module whose weights are bf16.
    """
    made = x.dtype is torch.bfloat16 and weight.dtype is torch.float32 and x.is_cpu
    return x.float() if made and torch.is_autocast_enabled("cpu") else x


def inside_torch_func() -> bool:
    """Whether a transform such as `torch.func.vmap` is under way: tensors hide their values."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _checked(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(
            f"{source}: there is no implementation '{name}'; choose from {', '.join(NAMES)}"
        )
    return name


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=4)
