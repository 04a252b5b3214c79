"""The feed-forward network of a transformer layer (Vaswani et al. 2017, section 3.3) as a whole."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.ops import dispatch, extension, residual
from fastllm.ops.autograd import check_first_derivative, needs_grad
from fastllm.ops.decoder import ACTIVATIONS, Mlp
from fastllm.ops.dropout import DROPOUT_RANGE, dropout
from fastllm.ops.memory import address, kernel_layout, new_grad
from fastllm.ops.precision import autocast_input, product_precision

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "leaky_relu": F.leaky_relu,
    "relu_squared": lambda x: F.relu(x).square(),
}


def mlp_ref(x: Tensor, mlp: Mlp, base: Tensor | None) -> Tensor:
    normed = residual.enter(x, mlp)
    hidden = FUNCTIONS[mlp.activation](F.linear(normed, *mlp.fc1))
    if mlp.up:
        hidden = hidden * F.linear(normed, *mlp.up)
    out = F.linear(dropout(hidden, *mlp.hidden_dropout), *mlp.fc2)
    return residual.leave(out, x if base is None else base, mlp)


class MlpFunction(torch.autograd.Function):
    """The C++ kernel; saves the outputs of `fc1` and `up` and recomputes the rest."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base: Tensor | None, mlp: Mlp, keep: bool, *parameters: Tensor | None
    ) -> Tensor:
        rows, I = x.numel() // x.size(-1), mlp.fc1.weight.size(0)
        out = torch.empty_like(x)
        saved = residual.saved_for_backward(x, mlp) if keep else residual.NOTHING_SAVED
        hidden = x.new_empty(rows, I) if keep else None
        up = x.new_empty(rows, I) if keep and mlp.up else None
        ctx.precision, ctx.x_is_base = product_precision(), base is None
        extension.kernels.mlp_fwd(
            out=out.data_ptr(),
            saved=saved_to_kernel(saved, hidden, up),
            x=x.data_ptr(),
            base=(x if base is None else base).data_ptr(),
            mlp=mlp.to_kernel(rows, ctx.precision),
            threads=torch.get_num_threads(),
        )
        if keep:
            ctx.mlp = mlp.with_parameters(iter([None] * len(parameters)))
            ctx.save_for_backward(x, *saved, hidden, up, *parameters)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        x, *tensors = ctx.saved_tensors
        saved, (hidden, up, *parameters) = tensors[:4], tensors[4:]
        x_needed, base_needed, _, _, *needed = ctx.needs_input_grad
        grad_x = new_grad(x, x_needed)
        grads = [new_grad(p, need) for p, need in zip(parameters, needed, strict=True)]
        grad_out = grad_out.contiguous()
        extension.kernels.mlp_bwd(
            grad_x=address(grad_x),
            x_is_base=ctx.x_is_base,
            grad=ctx.mlp.with_parameters(iter(grads)).to_kernel_grad(),
            grad_out=grad_out.data_ptr(),
            saved=saved_to_kernel(saved, hidden, up),
            x=x.data_ptr(),
            mlp=ctx.mlp.with_parameters(iter(parameters)).to_kernel(len(hidden), ctx.precision),
            threads=torch.get_num_threads(),
        )
        return grad_x, grad_out if base_needed else None, None, None, *grads


def saved_to_kernel(
    around: Sequence[Tensor | None], hidden: Tensor | None, up: Tensor | None
) -> Any:
    return extension.kernels.MlpSaved(
        residual=residual.saved_to_kernel(around), hidden=address(hidden), up=address(up)
    )


def mlp_cpu(x: Tensor, mlp: Mlp, base: Tensor | None) -> Tensor:
    x, base = x.contiguous(), None if base is None else base.contiguous()
    mlp = mlp.with_parameters(iter(map(kernel_layout, mlp.parameters())))
    parameters = mlp.parameters()
    return MlpFunction.apply(x, base, mlp, needs_grad(x, base, *parameters), *parameters)


def why_not(x: Tensor, mlp: Mlp, base: Tensor | None) -> str | None:
    """Why no kernel can take these arguments, or None."""
    if base is not None and (base.shape != x.shape or mlp.norm is None or not mlp.norm_first):
        return "another base is for Pre-LN only, and of the shape of x"
    if x.numel() == 0:
        return "x is empty"
    if not 0 <= mlp.hidden_dropout.p < 1 or not 0 <= mlp.out_dropout.p < 1:
        return DROPOUT_RANGE
    return mlp.why_not_sizes(x.size(-1))


def why_not_cpu(x: Tensor, mlp: Mlp, base: Tensor | None) -> str | None:
    return why_not(x, mlp, base) or dispatch.why_not_cpu_fused(x, base, *mlp.parameters())


def why_not_triton(x: Tensor, mlp: Mlp, base: Tensor | None) -> str | None:
    return why_not(x, mlp, base) or dispatch.why_not_triton(x, base, *mlp.parameters())


IMPLEMENTATIONS = [
    dispatch.cpu(mlp_cpu, why_not_cpu),
    dispatch.triton("mlp", why_not_triton),
    dispatch.reference(mlp_ref),
]


def mlp(x: Tensor, mlp: Mlp, base: Tensor | None = None) -> Tensor:
    """`dropout(fc2(dropout(activation(fc1(x)))))`, with norm and residual if there is a norm.

    In a gated network, the activation is multiplied by `up(x)`.

    Args:
        x: [..., H].
        mlp: see `Mlp`.
        base: what the residual connection adds, x unless given: parallel layers have another one.

    Raises:
        ValueError: sizes do not match, or the activation is unknown.
    """
    if mlp.activation not in ACTIVATIONS:
        raise ValueError(
            f"Unknown activation '{mlp.activation}'; choose from {', '.join(ACTIVATIONS)}"
        )
    I, H = mlp.fc1.weight.shape
    if x.size(-1) != H or mlp.fc2.weight.shape != (H, I):
        raise ValueError(
            f"the shapes of x {list(x.shape)}, fc1 {[I, H]} and fc2 {list(mlp.fc2.weight.shape)} "
            "do not match: [..., H], [I, H] and [H, I] are needed"
        )
    if mlp.up and mlp.up.weight.shape != (I, H):
        raise ValueError(f"the shape of up is {list(mlp.up.weight.shape)}, not fc1's {[I, H]}")
    if base is not None:
        base = autocast_input(base, mlp.fc1.weight)
    arguments = (autocast_input(x, mlp.fc1.weight), mlp, base)
    return dispatch.choose("mlp", IMPLEMENTATIONS, *arguments).run(*arguments)
