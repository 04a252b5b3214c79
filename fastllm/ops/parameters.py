"""What layers hand to the operations, and how it is handed to the kernels."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastllm.ops import dispatch

# Bytes from which on the C library returns memory to the system whenever it is freed (glibc's
# largest threshold). Taking it anew costs a page fault for every 4 kB.
LARGE = 2**25


class Norm(NamedTuple):
    """A layer norm's parameters, each [H]."""

    weight: Tensor
    bias: Tensor
    eps: float

    def fits(self, size: int) -> bool:
        """Whether it is one over `size` elements: the kernels read so much without looking."""
        return self.weight.shape == (size,) and self.bias.shape == (size,)


class Linear(NamedTuple):
    """A linear layer's parameters: [outputs, inputs] and [outputs] or None.

    A weight may be a transposed view: some libraries keep theirs as [inputs, outputs].
    """

    weight: Tensor
    bias: Tensor | None

    def fits(self, outputs: int, inputs: int) -> bool:
        """Whether its sizes are these: the kernels read so much without looking."""
        weight, bias = self
        return weight.shape == (outputs, inputs) and (bias is None or bias.shape == (outputs,))


def laid_out(linear: Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias as the kernels take them: without gaps, a transposed view as it is."""
    weight, bias = linear
    as_it_is = weight.is_contiguous() or weight.t().is_contiguous()
    return weight if as_it_is else weight.contiguous(), None if bias is None else bias.contiguous()


def linear_description(weight: Tensor, bias: Tensor | None) -> tuple[int, int, bool]:
    """`Linear` of csrc/kernels.h."""
    return weight.data_ptr(), address(bias), not weight.is_contiguous()


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def address(tensor: Tensor | None) -> int:
    """Where a tensor's data begins; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple([0 if tensor is None else tensor.data_ptr() for tensor in tensors])


def new_grad(tensor: Tensor | None, wanted: bool) -> Tensor | None:
    """Memory for the gradient by a tensor, laid out as that is; None where it is not wanted."""
    if tensor is None or not wanted:
        return None
    if tensor.nbytes < LARGE:
        return torch.empty_like(tensor)
    memory = dispatch.kernels.Memory(tensor.nbytes)
    # In place: autograd adds to what no view shares.
    flat = torch.frombuffer(memory, dtype=tensor.dtype)
    return flat.as_strided_(tensor.shape, tensor.stride())


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward through what is computed of these may come."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def check_first_derivative() -> None:
    """Called in a backward that autograd cannot look into.

    Raises:
        RuntimeError: a second derivative is asked for, or many gradients at once.
    """
    if torch.is_grad_enabled() or dispatch.inside_torch_func():
        raise RuntimeError(
            "the kernels give no second derivatives (create_graph=True) and no batched ones "
            '(is_grads_batched=True); compute the forward under fastllm.use("ref")'
        )


def graph_is_kept() -> bool:
    """Whether the backward under way may come again (retain_graph=True)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def times(grads: Sequence[Tensor | None], grad_out: Tensor) -> Sequence[Tensor | None]:
    """What a backward hands out that had its gradients since the forward."""
    scale = grad_out.item()
    if graph_is_kept():
        # They are needed again, whatever becomes of those handed out.
        return [None if grad is None else grad * scale for grad in grads]
    return grads if scale == 1 else [None if grad is None else grad.mul_(scale) for grad in grads]
