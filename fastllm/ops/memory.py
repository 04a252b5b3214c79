"""Passing tensors to the kernels: contiguous, by address, with memory for gradients."""

import torch
from torch import Tensor

from fastllm.ops import extension

# glibc's largest mmap threshold, in bytes: larger blocks are unmapped when freed, and a new one
# costs a page fault for every 4 kB.
LARGE = 2**25


def address(tensor: Tensor | None) -> int:
    """The address of a tensor's first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def kernel_layout(tensor: Tensor | None) -> Tensor | None:
    """A parameter in a layout that the kernels take: contiguous, or the transpose of a contiguous
    matrix."""
    if tensor is None or tensor.is_contiguous() or tensor.t().is_contiguous():
        return tensor
    return tensor.contiguous()


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def new_grad(tensor: Tensor | None, needed: bool) -> Tensor | None:
    """Uninitialised memory for the gradient of a tensor, in its layout; None if not needed."""
    if tensor is None or not needed:
        return None
    if tensor.nbytes < LARGE:
        return torch.empty_like(tensor)
    memory = extension.kernels.Memory(tensor.nbytes)
    # Set in place, because autograd accumulates in place only into tensors that are not views.
    flat = torch.frombuffer(memory, dtype=tensor.dtype)
    return flat.as_strided_(tensor.shape, tensor.stride())
