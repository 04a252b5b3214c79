"""Helpers shared by the autograd functions around the kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastllm.ops.torch_private import graph_is_kept, in_functorch_transform


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a computation on these tensors may need a backward."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def check_first_derivative() -> None:
    """Refuses second derivatives and batched gradients; call it in every backward.

    Raises:
        RuntimeError: a second derivative or a batch of gradients was requested.
    """
    if torch.is_grad_enabled() or in_functorch_transform():
        raise RuntimeError(
            "the kernels give no second derivatives (create_graph=True) and no batched ones "
            '(is_grads_batched=True); compute the forward under fastllm.use("ref")'
        )


def scale_grads(grads: Sequence[Tensor | None], grad_out: Tensor) -> Sequence[Tensor | None]:
    """Scales the gradients that a forward computed for a `grad_out` of 1 by the actual scalar."""
    scale = grad_out.item()
    if graph_is_kept():
        # A second backward needs the originals, and a caller may change the returned ones.
        return [None if grad is None else grad * scale for grad in grads]
    return grads if scale == 1 else [None if grad is None else grad.mul_(scale) for grad in grads]
