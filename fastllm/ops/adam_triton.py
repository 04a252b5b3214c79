"""Adam and AdamW in Triton: two launches, regardless of the number of parameters.

Roofline: a step reads parameter, gradient and both moments and writes three of them, 28 bytes a
parameter; clipping reads the gradient once more.
"""

from collections.abc import Sequence
from functools import lru_cache
from operator import itemgetter

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllm.ops.adam import AdamGroup

# Elements per program: eight per thread.
ELEMENTS = 1024


@triton.jit
def _place(tensors, firsts, sizes, ELEMENTS: tl.constexpr):
    """A program's tensor, its element indices, and a mask of those within the tensor."""
    program = tl.program_id(0)
    tensor = tl.load(tensors + program)
    at = tl.load(firsts + program) + tl.arange(0, ELEMENTS)
    return tensor, at, at < tl.load(sizes + tensor)


@triton.jit
def _at(addresses, tensor):
    return tl.load(addresses + tensor).to(tl.pointer_type(tl.float32))


@triton.jit
def adam_norms(norms, grads, tensors, firsts, sizes, ELEMENTS: tl.constexpr):
    """One sum of squares per program, in fp64 so that large gradients do not overflow."""
    tensor, at, inside = _place(tensors, firsts, sizes, ELEMENTS)
    grad = tl.load(_at(grads, tensor) + at, inside, other=0).to(tl.float64)
    tl.store(norms + tl.program_id(0), tl.sum(grad * grad))


@triton.jit
def adam_update(
    parameters, grads, exp_avgs, exp_avg_sqs, settings, clipping, tensors, firsts, sizes,
    DECOUPLED: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Updates parameters and moments, which are given as lists of addresses."""
    tensor, at, inside = _place(tensors, firsts, sizes, ELEMENTS)
    settings += tensor * 7
    step_size, root, rate1, beta2 = (
        tl.load(settings),
        tl.load(settings + 1),
        tl.load(settings + 2),
        tl.load(settings + 3),
    )
    rate2, eps, decay = tl.load(settings + 4), tl.load(settings + 5), tl.load(settings + 6)
    p, m, v = (
        _at(parameters, tensor) + at,
        _at(exp_avgs, tensor) + at,
        _at(exp_avg_sqs, tensor) + at,
    )
    param = tl.load(p, inside, other=0)
    grad = tl.load(_at(grads, tensor) + at, inside, other=0) * tl.load(clipping)
    if DECOUPLED:
        param *= decay
    else:
        grad += decay * param
    moment = tl.load(m, inside, other=0)
    moment += (grad - moment) * rate1
    square = tl.load(v, inside, other=0) * beta2 + grad * grad * rate2
    param -= step_size * moment / (tl.sqrt_rn(square) / root + eps)
    tl.store(p, param, inside)
    tl.store(m, moment, inside)
    tl.store(v, square, inside)


@lru_cache(maxsize=8)
def programs_of(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Each program's tensor and first element, and the sizes of the tensors."""
    counts = torch.tensor([triton.cdiv(size, ELEMENTS) for size in sizes])
    tensors = torch.arange(len(sizes)).repeat_interleave(counts)
    before = (counts.cumsum(0) - counts)[tensors]
    firsts = (torch.arange(len(tensors)) - before) * ELEMENTS
    return tensors.to(device), firsts.to(device), torch.tensor(sizes).to(device)


def settings_of(group: AdamGroup, step: float, decoupled_weight_decay: bool) -> list[float]:
    """The settings of `adam_update` for a parameter's `step`-th update."""
    lr, beta1, beta2, eps, weight_decay = group[5:]
    decay = 1 - lr * weight_decay if decoupled_weight_decay else weight_decay
    step_size, root = lr / (1 - beta1**step), (1 - beta2**step) ** 0.5
    return [step_size, root, 1 - beta1, beta2, 1 - beta2, eps, decay]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, copied without waiting for the work queued there."""
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def adam_triton(
    groups: Sequence[AdamGroup], decoupled_weight_decay: bool, max_grad_norm: float
) -> float | Tensor:
    """See `fastllm.ops.adam.adam`."""
    params = [param for group in groups for param in group.params]
    if not params:
        return 0.0
    device = params[0].device
    lists = [
        [tensor.data_ptr() for group in groups for tensor in tensors(group)]
        for tensors in map(itemgetter, range(4))
    ]
    addresses = sent(torch.tensor(lists), device)
    rows = []
    for group in groups:
        for step in group.steps:
            step += 1
            rows.append(settings_of(group, step.item(), decoupled_weight_decay))
    settings = sent(torch.tensor(rows, dtype=torch.float32), device)
    places = programs_of(tuple(param.numel() for param in params), device)
    grid = (len(places[0]),)
    norm: float | Tensor = 0.0
    clipping = torch.ones((), dtype=torch.float32, device=device)
    with torch.cuda.device_of(params[0]):  # Triton launches on the current device
        if max_grad_norm >= 0:
            norms = torch.empty(grid, dtype=torch.float64, device=device)
            adam_norms[grid](norms, addresses[1], *places, ELEMENTS=ELEMENTS)
            norm = norms.sum().sqrt()
            scale = max_grad_norm / (norm + 1e-6)
            clipping = torch.where(scale >= 1, 1, scale).float()  # NaN propagates, as in torch
        adam_update[grid](
            *addresses, settings, clipping, *places,
            DECOUPLED=decoupled_weight_decay, ELEMENTS=ELEMENTS,
        )  # fmt: skip
    # As after torch's step, autograd refuses a backward through results from before it.
    torch.autograd.graph.increment_version(params)
    return norm
