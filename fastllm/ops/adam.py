"""One Adam or AdamW step for all parameters: clipping, moments and update.

Kingma and Ba, "Adam: a method for stochastic optimization" (ICLR 2015); Loshchilov and Hutter,
"Decoupled weight decay regularization" (ICLR 2019). Arithmetic as in `torch.optim.Adam`.
"""

import math
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from fastllm.ops import dispatch, extension


class AdamGroup(NamedTuple):
    """Parameters that share their settings, with gradients and state: lists of one length.

    A parameter's gradient and moments have its shape, its step count is a scalar.
    """

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def adam_ref(
    groups: Sequence[AdamGroup], decoupled_weight_decay: bool, max_grad_norm: float
) -> float:
    grad_norm, clipping = 0.0, 1.0
    grads = [grad for group in groups for grad in group.grads]
    if max_grad_norm >= 0 and grads:
        norms = torch.stack([torch.linalg.vector_norm(g.double()).cpu() for g in grads])
        grad_norm = float(torch.linalg.vector_norm(norms))
        scale = max_grad_norm / (grad_norm + 1e-6)
        if not scale >= 1:  # also true for NaN, which propagates as in torch
            clipping = scale
    for group in groups:
        lr, beta1, beta2, eps, weight_decay = group[5:]
        for param, grad, exp_avg, exp_avg_sq, step in zip(*group[:5], strict=True):
            if param.is_complex():
                param, grad, exp_avg, exp_avg_sq = map(
                    torch.view_as_real, (param, grad, exp_avg, exp_avg_sq)
                )
            if clipping != 1:
                grad = grad * clipping
            step += 1
            if decoupled_weight_decay:
                param.mul_(1 - lr * weight_decay)
            else:
                grad = grad + weight_decay * param
            exp_avg.lerp_(grad, 1 - beta1)
            exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            bias_correction1 = 1 - beta1 ** step.item()
            bias_correction2 = 1 - beta2 ** step.item()
            denominator = exp_avg_sq.sqrt().div_(math.sqrt(bias_correction2)).add_(eps)
            param.addcdiv_(exp_avg, denominator, value=-lr / bias_correction1)
    return grad_norm


# For a small model, building these lists takes most of the time: `map` loops in C.


def adam_cpu(
    groups: Sequence[AdamGroup], decoupled_weight_decay: bool, max_grad_norm: float
) -> float:
    def addresses(tensors: list[Tensor]) -> list[int]:
        return list(map(Tensor.data_ptr, tensors))

    grad_norm = extension.kernels.adam_step(
        groups=[
            extension.kernels.AdamGroup(
                params=addresses(group.params),
                grads=addresses(group.grads),
                exp_avgs=addresses(group.exp_avgs),
                exp_avg_sqs=addresses(group.exp_avg_sqs),
                steps=addresses(group.steps),
                sizes=list(map(Tensor.numel, group.params)),
                lr=group.lr,
                beta1=group.beta1,
                beta2=group.beta2,
                eps=group.eps,
                weight_decay=group.weight_decay,
            )
            for group in groups
        ],
        decoupled_weight_decay=decoupled_weight_decay,
        max_grad_norm=max_grad_norm,
        threads=torch.get_num_threads(),
    )
    # As after torch's step, autograd refuses a backward through results from before it.
    torch.autograd.graph.increment_version([p for group in groups for p in group.params])
    return grad_norm


def why_not_cpu(
    groups: Sequence[AdamGroup], decoupled_weight_decay: bool, max_grad_norm: float
) -> str | None:
    return why_not(groups) or dispatch.why_not_cpu(
        *chain(*[tensors for group in groups for tensors in group[:5]])
    )


def why_not_triton(
    groups: Sequence[AdamGroup], decoupled_weight_decay: bool, max_grad_norm: float
) -> str | None:
    tensors = list(chain(*[tensors for group in groups for tensors in group[:4]]))
    if any(tensor.dtype is not torch.float32 for tensor in tensors):
        return "a parameter, its gradient or its state is not torch.float32"
    return why_not(groups) or dispatch.why_not_triton(*tensors)


def why_not(groups: Sequence[AdamGroup]) -> str | None:
    """Why no kernel can take these groups, or None."""
    for group in groups:
        sizes = [list(map(Tensor.numel, tensors)) for tensors in group[:4]]
        if sizes.count(sizes[0]) != 4:
            return "a parameter, its gradient and its state differ in size"
        if not all(map(Tensor.is_contiguous, chain(*group[:4]))):
            return "a parameter, its gradient or its state is not contiguous"
    return None


IMPLEMENTATIONS = [
    dispatch.cpu(adam_cpu, why_not_cpu),
    dispatch.triton("adam", why_not_triton),
    dispatch.reference(adam_ref),
]


def adam(
    groups: Sequence[AdamGroup], decoupled_weight_decay: bool = False, max_grad_norm: float = -1.0
) -> float | Tensor:
    """Update parameters, moments and step counts in place.

    Args:
        decoupled_weight_decay: AdamW's decay of the parameter, instead of Adam's on the gradient.
        max_grad_norm: scale all gradients together so that their norm is at most this, without
            writing them back; negative for no clipping.

    Returns:
        The norm of all gradients before clipping, as a scalar tensor if it is still on a GPU; 0
        without clipping.
    """
    arguments = (groups, decoupled_weight_decay, max_grad_norm)
    return dispatch.choose("adam", IMPLEMENTATIONS, *arguments).run(*arguments)
