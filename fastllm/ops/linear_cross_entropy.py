"""The cross-entropy of a linear layer's outputs, which are never all in memory."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.ops import dispatch
from fastllm.ops.embedding import check_token_ids, why_not_ids
from fastllm.ops.parameters import (
    Linear,
    address,
    addresses,
    check_first_derivative,
    contiguous,
    linear_description,
    needs_grad,
    new_grad,
    times,
)


def linear_cross_entropy_ref(x: Tensor, head: Linear, targets: Tensor, ignore_index: int) -> Tensor:
    logits = F.linear(x, *head)
    if not targets.is_floating_point() and targets.dtype is not torch.bool:
        targets = targets.long()  # the only integers that PyTorch takes; others it refuses itself
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=ignore_index)


class LinearCrossEntropyFunction(torch.autograd.Function):
    """The C++ kernel. Its forward gives the gradients as well: they need the logits, which are
    only there once, and nothing that comes later."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        ignore_index: int,
        keep: bool,
    ) -> Tensor:
        V, H = weight.shape
        wanted = ctx.needs_input_grad if keep else (False, False, False)
        grads = [new_grad(t, need) for t, need in zip((x, weight, bias), wanted[:3], strict=True)]
        grad_x, grad_weight, grad_bias = grads
        loss = dispatch.kernels.linear_cross_entropy(
            address(grad_x),
            addresses(grad_weight, grad_bias),
            address(x),
            (
                (targets.numel(), H, V),
                address(targets),
                ignore_index,
                linear_description(weight, bias),
                dispatch.precision(),
            ),
            torch.get_num_threads(),
        )
        ctx.save_for_backward(*grads)
        return torch.tensor(loss, dtype=x.dtype, device="cpu")

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        grads = times(ctx.saved_tensors, grad_out)
        return *grads, None, None, None


def linear_cross_entropy_cpu(x: Tensor, head: Linear, targets: Tensor, ignore_index: int) -> Tensor:
    x, weight, bias, targets = contiguous(x, *head, targets.long())  # type: ignore[assignment]
    keep = needs_grad(x, weight, bias)
    return LinearCrossEntropyFunction.apply(x, weight, bias, targets, ignore_index, keep)


def why_not_cpu(
    x: Tensor | None = None,
    head: Linear | None = None,
    targets: Tensor | None = None,
    ignore_index: int = -100,
) -> str | None:
    if x is None or head is None or targets is None:
        return dispatch.why_not_cpu()
    reason = why_not_ids(targets) or why_not_head(x, head)
    return reason or dispatch.why_not_fused(x, *head)


def why_not_triton(
    x: Tensor | None = None,
    head: Linear | None = None,
    targets: Tensor | None = None,
    ignore_index: int = -100,
) -> str | None:
    if x is None or head is None or targets is None:
        return dispatch.why_not_triton()
    reason = why_not_ids(targets, x.device) or why_not_head(x, head)
    return reason or dispatch.why_not_triton(x, *head)


def why_not_head(x: Tensor, head: Linear) -> str | None:
    if x.numel() == 0:
        return "there are no elements"
    if not head.fits(head.weight.size(0), x.size(-1)):
        return "the head does not fit x"
    return None


IMPLEMENTATIONS: list[dispatch.Implementation] = [
    dispatch.Implementation("cpu", linear_cross_entropy_cpu, why_not_cpu),
    dispatch.Implementation("triton", dispatch.run_triton("linear_cross_entropy"), why_not_triton),
    dispatch.Implementation("ref", linear_cross_entropy_ref),
]


def linear_cross_entropy(
    x: Tensor, head: Linear, targets: Tensor, ignore_index: int = -100
) -> Tensor:
    """Mean of `-log softmax(head(x))[target]` over the positions that have a target.

    Args:
        x: [..., H].
        head: weight [V, H], bias [V] or None.
        targets: integers in [0, V), or `ignore_index`; of x's shape without the last dimension.
        ignore_index: a target that is not scored.

    Returns:
        A scalar in nats; not a number when nothing is scored.

    Raises:
        IndexError: a target is outside the vocabulary.
        ValueError: the shapes do not fit.
    """
    if targets.shape != x.shape[:-1]:
        raise ValueError(f"x {list(x.shape)} and targets {list(targets.shape)} do not fit")
    check_token_ids(targets[targets != ignore_index], head.weight.size(0))
    arguments = (dispatch.autocast_input(x, head.weight), head, targets, ignore_index)
    return dispatch.choose("linear_cross_entropy", IMPLEMENTATIONS, *arguments).run(*arguments)
