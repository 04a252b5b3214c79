"""Linear layer with cross-entropy in Triton: logits for a chunk of rows at a time.

cuBLAS computes the products: V is far too large for a product of our own to pay off (see
`mlp_triton`). Between the products, one kernel turns a chunk of logits into their gradients in
place, so that the forward yields the gradients as well (as in Liger Kernel; Hsu et al. 2024).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllm.ops.autograd import check_first_derivative, needs_grad
from fastllm.ops.blocks_triton import in_autocast, rounded, tanh
from fastllm.ops.decoder import Linear

# Logits per chunk: 128 MB in 16 bits, large enough for products at full speed.
LOGITS = 2**26
# Elements of a row that a program holds in registers at a time.
BLOCK_V = 4096


@triton.jit
def _capped(x, softcap):
    """`softcap * tanh(x / softcap)` and its derivative."""
    if softcap is None:
        return x, 1.0
    else:
        share = tanh(x / softcap)
        return softcap * share, 1 - share * share


@triton.jit
def cross_entropy(
    losses, logits, targets, scale, softcap, V, ignore_index,
    KEEP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Replaces a row of logits by its gradient times `scale`; the loss is 0 for an ignored row."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    target = tl.load(targets + row)
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for first in range(0, V, BLOCK_V):
        v = first + tl.arange(0, BLOCK_V)
        x = tl.load(logits + v, v < V, other=0).to(tl.float32)
        x, _ = _capped(x, softcap)
        x = tl.where(v < V, x, float("-inf"))
        larger = tl.maximum(largest, tl.max(x))
        # Until a row has a finite logit, avoid -inf - -inf.
        base = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(largest - base) + tl.sum(tl.exp(x - base))
        largest = larger
    scored = target != ignore_index
    at_target = tl.load(logits + tl.where(scored, target, 0)).to(tl.float32)
    at_target, _ = _capped(at_target, softcap)
    loss = largest + tl.log(total) - at_target
    tl.store(losses + row, tl.where(scored, loss, 0.0))
    if KEEP:
        tl.debug_barrier()  # read the target's logit before overwriting it
        factor = tl.where(scored, scale, 0.0)
        for first in range(0, V, BLOCK_V):
            v = first + tl.arange(0, BLOCK_V)
            x = tl.load(logits + v, v < V, other=0).to(tl.float32)
            x, slope = _capped(x, softcap)
            grad = tl.exp(x - largest) / total - tl.where(v == target, 1.0, 0.0)
            grad = tl.where(scored, grad * slope * factor, 0.0)
            tl.store(logits + v, rounded(grad, logits.dtype.element_ty), v < V)


# Factors for the logits' gradients, in [-1, 1], until the backward divides by the number of rows:
# fp16 would lose small probabilities, and its largest number is 65,504.
SCALES = {torch.float32: 1.0, torch.bfloat16: 1.0, torch.float16: 64.0}


def product_in_fp32(a: Tensor, b: Tensor) -> Tensor:
    """The product in fp32, since a sum over many rows may overflow fp16."""
    if a.is_cuda and a.dtype is not torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


class LinearCrossEntropyFunction(torch.autograd.Function):
    """Computes the gradients in the forward."""

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
        loss_type: torch.dtype,
    ) -> Tensor:
        rows, targets = x.reshape(-1, x.size(-1)), targets.flatten()
        (R, H), V = rows.shape, weight.size(0)
        wanted = ctx.needs_input_grad if keep else (False, False, False)
        grad_x = torch.empty_like(rows) if wanted[0] else None
        # Sums over the chunks, in fp32.
        grad_weight = weight.new_zeros(V, H, dtype=torch.float32) if wanted[1] else None
        grad_bias = weight.new_zeros(V, dtype=torch.float32) if wanted[2] else None
        losses = rows.new_empty(R, dtype=torch.float32)
        scored = (targets != ignore_index).sum()
        chunk = max(1, LOGITS // V)
        for first in range(0, R, chunk):
            part = slice(first, first + chunk)
            logits = torch.nn.functional.linear(rows[part], weight, bias)
            cross_entropy[(logits.size(0),)](
                losses[part], logits, targets[part], SCALES[x.dtype], softcap, V, ignore_index,
                KEEP=keep, BLOCK_V=min(BLOCK_V, triton.next_power_of_2(V)), num_warps=8,
            )  # fmt: skip
            if grad_x is not None:
                torch.mm(logits, weight, out=grad_x[part])
            if grad_weight is not None:
                grad_weight += product_in_fp32(logits.t(), rows[part])
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=torch.float32)
        ctx.save_for_backward(scored, grad_x, grad_weight, grad_bias)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return (losses.sum() / scored).to(loss_type)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        scored, *grads = ctx.saved_tensors
        factor = grad_out.float() / (scored * SCALES[ctx.dtype])
        grad_x, *others = [None if g is None else (g.float() * factor).to(ctx.dtype) for g in grads]
        grad_x = None if grad_x is None else grad_x.view(ctx.shape)
        return grad_x, *others, None, None, None, None, None


def linear_cross_entropy_triton(
    x: Tensor, head: Linear, targets: Tensor, ignore_index: int, softcap: float | None
) -> Tensor:
    """See `fastllm.ops.linear_cross_entropy.linear_cross_entropy`; an fp32 loss under autocast."""
    loss_type = torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype
    x, weight, bias = in_autocast(x, *head)  # type: ignore[assignment]
    keep = needs_grad(x, weight, bias)
    return LinearCrossEntropyFunction.apply(
        x, weight, bias, targets.long().contiguous(), ignore_index, softcap, keep, loss_type
    )
