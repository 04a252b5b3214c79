"""One Adam or AdamW step for all parameters: clipping, moments and update.

Kingma and Ba, "Adam: a method for stochastic optimization" (ICLR 2015); Loshchilov and Hutter,
"Decoupled weight decay regularization" (ICLR 2019). Arithmetic as in `torch.optim.Adam`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastllm.ops import dispatch


class AdamTensors(NamedTuple):
    """One parameter, its gradient and its state; all of one shape but `step`, a scalar."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor


class AdamSettings(NamedTuple):
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


Row = tuple[AdamTensors, AdamSettings]


def adam_ref(rows: Sequence[Row], decoupled_weight_decay: bool, max_grad_norm: float) -> float:
    grads = [tensors.grad for tensors, _ in rows]
    grad_norm = 0.0
    if max_grad_norm >= 0 and grads:
        norms = torch.stack([torch.linalg.vector_norm(g.double()).cpu() for g in grads])
        grad_norm = float(torch.linalg.vector_norm(norms))
        scale = max_grad_norm / (grad_norm + 1e-6)
        if not scale >= 1:  # nor when the norm is not a number, as in torch
            grads = [g * scale for g in grads]
    for (tensors, settings), grad in zip(rows, grads, strict=True):
        param, _, exp_avg, exp_avg_sq, step = tensors
        lr, beta1, beta2, eps, weight_decay = settings
        if param.is_complex():
            param, grad, exp_avg, exp_avg_sq = map(
                torch.view_as_real, (param, grad, exp_avg, exp_avg_sq)
            )
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


def adam_cpu(rows: Sequence[Row], decoupled_weight_decay: bool, max_grad_norm: float) -> float:
    settings = list({row_settings: None for _, row_settings in rows})
    index = {row_settings: i for i, row_settings in enumerate(settings)}
    addresses = [
        (*(t.data_ptr() for t in tensors), tensors.param.numel(), index[row_settings])
        for tensors, row_settings in rows
    ]
    grad_norm = dispatch.kernels.adam_step(
        addresses, settings, decoupled_weight_decay, max_grad_norm, torch.get_num_threads()
    )
    # So that a backward through what was computed before the step is refused, as after torch's.
    torch.autograd.graph.increment_version([tensors.param for tensors, _ in rows])
    return grad_norm


def why_not_cpu(rows: Sequence[Row] = ()) -> str | None:
    # Spelt out: on a small model these checks are most of a step's time.
    for (param, grad, m, v, _), _ in rows:
        size = param.numel()
        if not size == grad.numel() == m.numel() == v.numel():
            return "a parameter, its gradient and its state differ in size"
        if not (
            param.is_contiguous()
            and grad.is_contiguous()
            and m.is_contiguous()
            and v.is_contiguous()
        ):
            return "a parameter, its gradient or its state is not contiguous"
    return dispatch.why_not_cpu(*[tensor for tensors, _ in rows for tensor in tensors])


IMPLEMENTATIONS: list[dispatch.Implementation] = [
    dispatch.Implementation("cpu", adam_cpu, why_not_cpu),
    dispatch.Implementation("ref", adam_ref),
]


def adam(
    rows: Sequence[Row], decoupled_weight_decay: bool = False, max_grad_norm: float = -1.0
) -> float:
    """Update parameters, moments and step counts in place.

    Args:
        rows: a parameter's tensors and its settings, one row a parameter.
        decoupled_weight_decay: AdamW's decay of the parameter, instead of Adam's on the gradient.
        max_grad_norm: scale all gradients together so that their norm is at most this, without
            writing them back; negative for no clipping.

    Returns:
        The norm of all gradients before clipping; 0 when nothing is clipped.
    """
    run = dispatch.choose("adam", IMPLEMENTATIONS, rows).run
    return run(rows, decoupled_weight_decay, max_grad_norm)
