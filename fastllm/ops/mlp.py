"""The feed-forward network of a transformer layer (Vaswani et al. 2017, section 3.3) as a whole."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.ops import dispatch, extension
from fastllm.ops.autograd import check_first_derivative, needs_grad
from fastllm.ops.decoder import ACTIVATIONS, Mlp
from fastllm.ops.dropout import DROPOUT_RANGE, dropout
from fastllm.ops.memory import address, kernel_layout, new_grad
from fastllm.ops.norm import norm_ref
from fastllm.ops.precision import autocast_input, product_precision

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "leaky_relu": F.leaky_relu,
    "relu_squared": lambda x: F.relu(x).square(),
}


def mlp_ref(x: Tensor, mlp: Mlp) -> Tensor:
    normed = norm_ref(x, mlp.norm, None) if mlp.norm and mlp.norm_first else x
    hidden = FUNCTIONS[mlp.activation](F.linear(normed, *mlp.fc1))
    if mlp.up:
        hidden = hidden * F.linear(normed, *mlp.up)
    out = F.linear(dropout(hidden, *mlp.hidden_dropout), *mlp.fc2)
    out = dropout(out, *mlp.out_dropout)
    if mlp.norm is None:
        return out
    return x + out if mlp.norm_first else norm_ref(out, mlp.norm, x)


class MlpFunction(torch.autograd.Function):
    """The C++ kernel; saves the outputs of `fc1` and `up` and recomputes the rest."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: Mlp, keep: bool, *parameters: Tensor | None) -> Tensor:
        rows = x.numel() // x.size(-1)
        out = torch.empty_like(x)
        stats = x.new_empty(rows, 2) if keep and mlp.norm else None
        hidden = x.new_empty(rows, mlp.fc1.weight.size(0)) if keep else None
        up = x.new_empty(rows, mlp.fc1.weight.size(0)) if keep and mlp.up else None
        post_norm = mlp.norm is not None and not mlp.norm_first
        residual = torch.empty_like(x) if keep and post_norm else None
        ctx.precision = product_precision()
        extension.kernels.mlp_fwd(
            out=out.data_ptr(),
            saved=saved_to_kernel(stats, hidden, up, residual),
            x=x.data_ptr(),
            mlp=mlp.to_kernel(rows, ctx.precision),
            threads=torch.get_num_threads(),
        )
        if keep:
            ctx.mlp = mlp.with_parameters(iter([None] * len(parameters)))
            ctx.save_for_backward(x, stats, hidden, up, residual, *parameters)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        x, stats, hidden, up, residual, *parameters = ctx.saved_tensors
        x_needed, _, _, *needed = ctx.needs_input_grad
        grad_x = new_grad(x, x_needed)
        grads = [new_grad(p, need) for p, need in zip(parameters, needed, strict=True)]
        grad_out = grad_out.contiguous()
        extension.kernels.mlp_bwd(
            grad_x=address(grad_x),
            grad=ctx.mlp.with_parameters(iter(grads)).to_kernel_grad(),
            grad_out=grad_out.data_ptr(),
            saved=saved_to_kernel(stats, hidden, up, residual),
            x=x.data_ptr(),
            mlp=ctx.mlp.with_parameters(iter(parameters)).to_kernel(len(hidden), ctx.precision),
            threads=torch.get_num_threads(),
        )
        return grad_x, None, None, *grads


def saved_to_kernel(
    stats: Tensor | None, hidden: Tensor | None, up: Tensor | None, residual: Tensor | None
) -> Any:
    return extension.kernels.MlpSaved(
        stats=address(stats), hidden=address(hidden), up=address(up), residual=address(residual)
    )


def mlp_cpu(x: Tensor, mlp: Mlp) -> Tensor:
    x = x.contiguous()
    mlp = mlp.with_parameters(iter(map(kernel_layout, mlp.parameters())))
    parameters = mlp.parameters()
    return MlpFunction.apply(x, mlp, needs_grad(x, *parameters), *parameters)


def why_not(x: Tensor, mlp: Mlp) -> str | None:
    """Why no kernel can take these arguments, or None."""
    if x.numel() == 0:
        return "x is empty"
    if not 0 <= mlp.hidden_dropout.p < 1 or not 0 <= mlp.out_dropout.p < 1:
        return DROPOUT_RANGE
    return mlp.why_not_sizes(x.size(-1))


def why_not_cpu(x: Tensor, mlp: Mlp) -> str | None:
    return why_not(x, mlp) or dispatch.why_not_cpu_fused(x, *mlp.parameters())


def why_not_triton(x: Tensor, mlp: Mlp) -> str | None:
    return why_not(x, mlp) or dispatch.why_not_triton(x, *mlp.parameters())


IMPLEMENTATIONS = [
    dispatch.cpu(mlp_cpu, why_not_cpu),
    dispatch.triton("mlp", why_not_triton),
    dispatch.reference(mlp_ref),
]


def mlp(x: Tensor, mlp: Mlp) -> Tensor:
    """`dropout(fc2(dropout(activation(fc1(x)))))`, with norm and residual if there is a norm.

    In a gated network, the activation is multiplied by `up(x)`.

    Args:
        x: [..., H].
        mlp: see `Mlp`.

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
    arguments = (autocast_input(x, mlp.fc1.weight), mlp)
    return dispatch.choose("mlp", IMPLEMENTATIONS, *arguments).run(*arguments)
