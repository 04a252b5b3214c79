"""The cross-entropy of a linear layer's outputs, which are never all in memory at once."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.ops import dispatch, extension
from fastllm.ops.autograd import check_first_derivative, needs_grad, scale_grads
from fastllm.ops.decoder import Linear
from fastllm.ops.embedding import check_token_ids, why_not_ids
from fastllm.ops.memory import address, contiguous, new_grad
from fastllm.ops.precision import autocast_input, product_precision


def linear_cross_entropy_ref(
    x: Tensor, head: Linear, targets: Tensor, ignore_index: int, softcap: float | None
) -> Tensor:
    logits = F.linear(x, *head)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if not targets.is_floating_point() and targets.dtype is not torch.bool:
        targets = targets.long()  # PyTorch takes no other integers, and refuses other types itself
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=ignore_index)


class LinearCrossEntropyFunction(torch.autograd.Function):
    """The C++ kernel. Its forward computes the gradients as well: they need the logits, which exist
    only there, and only a factor from the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        ignore_index: int,
        softcap: float | None,
        keep: bool,
    ) -> Tensor:
        V, H = weight.shape
        needed = ctx.needs_input_grad if keep else (False, False, False)
        grads = [new_grad(t, need) for t, need in zip((x, weight, bias), needed[:3], strict=True)]
        grad_x, grad_weight, grad_bias = grads
        loss = extension.kernels.linear_cross_entropy(
            grad_x=address(grad_x),
            grad=extension.kernels.LinearGrad(weight=address(grad_weight), bias=address(grad_bias)),
            x=x.data_ptr(),
            entropy=extension.kernels.LinearCrossEntropy(
                rows=targets.numel(),
                H=H,
                V=V,
                targets=targets.data_ptr(),
                ignore_index=ignore_index,
                head=Linear(weight, bias).to_kernel(),
                softcap=softcap or 0.0,
                precision=product_precision(),
            ),
            threads=torch.get_num_threads(),
        )
        ctx.save_for_backward(*grads)
        return torch.tensor(loss, dtype=x.dtype, device="cpu")

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        grads = scale_grads(ctx.saved_tensors, grad_out)
        return *grads, None, None, None, None


def linear_cross_entropy_cpu(
    x: Tensor, head: Linear, targets: Tensor, ignore_index: int, softcap: float | None
) -> Tensor:
    x, weight, bias, targets = contiguous(x, *head, targets.long())  # type: ignore[assignment]
    keep = needs_grad(x, weight, bias)
    settings = targets, ignore_index, softcap, keep
    return LinearCrossEntropyFunction.apply(x, weight, bias, *settings)


def why_not(
    x: Tensor, head: Linear, targets: Tensor, ignore_index: int, softcap: float | None
) -> str | None:
    """Why no kernel can take these arguments, or None."""
    if (reason := why_not_ids(targets, x.device)) is not None:
        return reason
    if x.numel() == 0:
        return "x is empty"
    if not head.fits(head.weight.size(0), x.size(-1)):
        return "the head's width differs from that of x"
    return None


def why_not_cpu(
    x: Tensor, head: Linear, targets: Tensor, ignore_index: int, softcap: float | None
) -> str | None:
    reason = why_not(x, head, targets, ignore_index, softcap)
    return reason or dispatch.why_not_cpu_fused(x, *head)


def why_not_triton(
    x: Tensor, head: Linear, targets: Tensor, ignore_index: int, softcap: float | None
) -> str | None:
    reason = why_not(x, head, targets, ignore_index, softcap)
    return reason or dispatch.why_not_triton(x, *head)


IMPLEMENTATIONS = [
    dispatch.cpu(linear_cross_entropy_cpu, why_not_cpu),
    dispatch.triton("linear_cross_entropy", why_not_triton),
    dispatch.reference(linear_cross_entropy_ref),
]


def linear_cross_entropy(
    x: Tensor,
    head: Linear,
    targets: Tensor,
    ignore_index: int = -100,
    softcap: float | None = None,
) -> Tensor:
    """Mean of `-log softmax(head(x))[target]` over the positions whose target is scored.

    Args:
        x: [..., H].
        head: weight [V, H], bias [V] or None.
        targets: integers in [0, V), or `ignore_index`; x's shape without the last dimension.
        ignore_index: a target that is not scored.
        softcap: the logits become `softcap * tanh(logits / softcap)`.

    Returns:
        A scalar in nats; NaN if nothing is scored.

    Raises:
        IndexError: a target is outside the vocabulary.
        ValueError: the shapes do not match.
    """
    if targets.shape != x.shape[:-1]:
        raise ValueError(f"x {list(x.shape)} and targets {list(targets.shape)} do not match")
    check_token_ids(targets[targets != ignore_index], head.weight.size(0))
    arguments = (autocast_input(x, head.weight), head, targets, ignore_index, softcap)
    return dispatch.choose("linear_cross_entropy", IMPLEMENTATIONS, *arguments).run(*arguments)
