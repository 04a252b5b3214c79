"""Which implementation of an operation runs: an ordered list per operation, best first.

Two functions decide: `why_not_here()` says whether an implementation can run on this machine, and
`why_not(*arguments)` whether it can take these arguments. Both return None, or the reason why not.
The automatic choice falls through the list to the reference, which takes everything. An
implementation requested by name, with `use` or the variable `FASTLLM_IMPL`, raises with its reason
if it cannot run; operations without an implementation of that name choose automatically.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastllm.ops import extension
from fastllm.ops.precision import why_not_autocast
from fastllm.ops.torch_private import in_forward_ad, in_functorch_transform

# Triton then interprets its kernels on CPU tensors: slow, but enough to test their results.
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")

NAMES = ("auto", "ref", "cpu", "triton")

_requested: ContextVar[str | None] = ContextVar("fastllm_implementation", default=None)


def always(*arguments: Any) -> None:
    """For an implementation that never declines."""


class Implementation(NamedTuple):
    """One way to compute an operation: its name, its function, and its reasons to decline."""

    name: str
    run: Callable[..., Any]
    why_not_here: Callable[[], str | None] = always
    why_not: Callable[..., str | None] = always

    def reason(self, *arguments: Any) -> str | None:
        """Why it cannot compute the operation for these arguments on this machine, or None."""
        return self.why_not_here() or self.why_not(*arguments)


class ImplementationError(RuntimeError):
    """The implementation requested by name cannot run; the message says why."""


def use(name: str) -> AbstractContextManager[None]:
    """Run every operation inside the `with` block by one implementation.

    Args:
        name: `auto`, `ref`, `cpu` or `triton`. Takes precedence over `FASTLLM_IMPL`.

    Raises:
        ValueError: the name is not one of these.
    """
    return _using(_checked(name, "fastllm.use"))


def use_implementation(name: str) -> AbstractContextManager[None]:
    """`use` for a setting of a command, where `auto` lets FASTLLM_IMPL apply."""
    return nullcontext() if name == "auto" else use(name)


@contextmanager
def _using(name: str) -> Iterator[None]:
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def requested() -> str:
    """The implementation requested by `use`, else by `FASTLLM_IMPL`, else `auto`."""
    return _requested.get() or _checked(os.environ.get("FASTLLM_IMPL") or "auto", "FASTLLM_IMPL")


def why_not_requested(*names: str) -> str | None:
    """Why none of these implementations is wanted: another one was requested; else None."""
    name = requested()
    return None if name in ("auto", *names) else f"'{name}' was requested"


def _checked(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(
            f"{source}: there is no implementation '{name}'; choose from {', '.join(NAMES)}"
        )
    return name


def choose(operation: str, table: Sequence[Implementation], *arguments: Any) -> Implementation:
    """The implementation that runs `operation` on these arguments.

    Raises:
        ImplementationError: the one requested by name declines; the message lists every
            implementation with its reason.
    """
    return _choose(operation, table, lambda candidate: candidate.reason(*arguments))


def choose_here(operation: str, table: Sequence[Implementation]) -> Implementation:
    """The implementation that runs `operation` here, for arguments that every one can take.

    Raises:
        ImplementationError: as for `choose`.
    """
    return _choose(operation, table, lambda candidate: candidate.why_not_here())


def _choose(
    operation: str,
    table: Sequence[Implementation],
    reason_of: Callable[[Implementation], str | None],
) -> Implementation:
    name = requested()
    for candidate in [each for each in table if each.name == name] or table:
        reason = reason_of(candidate)
        if reason is None:
            return candidate
        if reason is extension.problem:
            _warn_once(f"fastllm runs on the slow PyTorch reference: {reason}")
    reasons = "; ".join(f"{each.name}: {reason_of(each) or 'can run it'}" for each in table)
    raise ImplementationError(f"'{name}' was requested and cannot run '{operation}' ({reasons})")


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=5)


# Checks of tensors that hold for every operation on a device.

_is_cpu, _dtype = attrgetter("is_cpu"), attrgetter("dtype")


def why_not_cpu(*tensors: Tensor | None) -> str | None:
    """Why the C++ kernels cannot read these tensors, or None."""
    present = [tensor for tensor in tensors if tensor is not None]
    # A small model's training step checks hundreds of tensors: `map` loops over them in C.
    if not all(map(_is_cpu, present)):
        return f"a tensor is on {next(t.device for t in present if not t.is_cpu)}"
    for dtype in set(map(_dtype, present)):
        if dtype is not torch.float32:
            return f"a tensor is {dtype}; the kernels compute in torch.float32"
    for cls in set(map(type, present)):
        if (reason := _why_not_class(cls)) is not None:
            return reason
    if in_functorch_transform():
        return "a torch.func transform is active"
    return None


def why_not_cpu_fused(*tensors: Tensor | None) -> str | None:
    """Why one C++ kernel cannot replace several PyTorch operations on these tensors, or None."""
    reason = why_not_cpu(*tensors)
    if reason is None and torch.is_autocast_enabled("cpu"):
        reason = why_not_autocast(torch.get_autocast_dtype("cpu"))
    if reason is None and in_forward_ad():
        return "forward-mode differentiation is active"
    return reason


def why_not_triton(*tensors: Tensor | None) -> str | None:
    """Why the Triton kernels cannot take these tensors, or None."""
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
    if in_functorch_transform():
        return "a torch.func transform is active"
    if in_forward_ad():
        return "forward-mode differentiation is active"
    return None


def _why_not_class(cls: type) -> str | None:
    if cls is Tensor or cls is torch.nn.Parameter:
        return None
    return f"a tensor is a {cls.__name__}, whose memory may not be plain"


@cache
def why_not_triton_here() -> str | None:
    """Why the Triton kernels cannot run on this machine, or None."""
    if not TRITON_INTERPRETED:
        if not torch.cuda.is_available():
            return "this machine has no CUDA GPU, or this PyTorch is built without CUDA"
        major, minor = torch.cuda.get_device_capability()
        if major < 8:
            return f"the GPU's compute capability is {major}.{minor}; the kernels need 8.0"
    if find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    return None


def reference(run: Callable[..., Any]) -> Implementation:
    """The table's last entry: plain PyTorch, which takes everything."""
    return Implementation("ref", run)


def cpu(run: Callable[..., Any], why_not: Callable[..., str | None]) -> Implementation:
    """The table's entry for a C++ kernel."""
    return Implementation("cpu", run, extension.why_not_here, why_not)


def triton(operation: str, why_not: Callable[..., str | None]) -> Implementation:
    """The table's entry for `{operation}_triton`; its module is imported at the first call."""

    def run(*arguments: Any) -> Any:
        name = f"{operation}_triton"
        function = getattr(import_module(f"fastllm.ops.{name}"), name)
        first = arguments[0]
        if not isinstance(first, Tensor):
            return function(*arguments)
        # Triton launches on the current GPU, wherever the tensors are.
        with torch.cuda.device_of(first):
            return function(*arguments)

    return Implementation("triton", run, why_not_triton_here, why_not)
