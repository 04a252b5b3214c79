"""What the autograd functions around the kernels share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastllm.ops.torch_private import graph_is_kept, in_functorch_transform


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward may follow a computation on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def check_first_derivative() -> None:
    """Refuses a backward that autograd would have to differentiate; call it in every backward.

    Raises:
        RuntimeError: a second derivative or a batch of gradients is asked for.
    """
    if torch.is_grad_enabled() or in_functorch_transform():
        raise RuntimeError(
            "the kernels give no second derivatives (create_graph=True) and no batched ones "
            '(is_grads_batched=True); compute the forward under fastllm.use("ref")'
        )


def scale_grads(grads: Sequence[Tensor | None], grad_out: Tensor) -> Sequence[Tensor | None]:
    """The gradients that a forward computed for a `grad_out` of 1, for the actual scalar."""
    scale = grad_out.item()
    if graph_is_kept():
        # A second backward needs them again, and a caller may change those it gets.
        return [None if grad is None else grad * scale for grad in grads]
    return grads if scale == 1 else [None if grad is None else grad.mul_(scale) for grad in grads]
