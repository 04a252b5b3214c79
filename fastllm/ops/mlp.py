"""The feed-forward network of a transformer layer (Vaswani et al. 2017, section 3.3) as a whole."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.ops import dispatch
from fastllm.ops.dropout import dropout
from fastllm.ops.layer_norm import layer_norm_ref
from fastllm.ops.parameters import (
    Linear,
    Norm,
    address,
    addresses,
    check_first_derivative,
    contiguous,
    laid_out,
    linear_description,
    needs_grad,
    new_grad,
)

# In the order of the kernel's enumeration.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "leaky_relu": F.leaky_relu,
}


def mlp_ref(
    x: Tensor,
    fc1: Linear,
    fc2: Linear,
    activation: str,
    dropout_p: float,
    seed: int,
    norm: Norm | None,
    norm_first: bool,
    out_dropout_p: float,
    out_seed: int,
) -> Tensor:
    normed = layer_norm_ref(x, norm, None) if norm and norm_first else x
    hidden = ACTIVATIONS[activation](F.linear(normed, *fc1))
    out = F.linear(dropout(hidden, dropout_p, seed), *fc2)
    out = dropout(out, out_dropout_p, out_seed)
    if norm is None:
        return out
    return x + out if norm_first else layer_norm_ref(out, norm, x)


class Settings(NamedTuple):
    """What is no tensor."""

    activation: str
    dropout_p: float
    seed: int
    eps: float
    norm_first: bool
    out_dropout_p: float
    out_seed: int
    keep: bool  # for a backward


class MLPFunction(torch.autograd.Function):
    """The C++ kernel; keeps what `fc1` gave and computes the rest again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: Settings, *parameters: Tensor | None) -> Tensor:
        I, H = parameters[0].shape  # type: ignore[union-attr]
        rows = x.numel() // H
        normed = parameters[4] is not None
        out = torch.empty_like(x)
        stats = x.new_empty(rows, 2) if settings.keep and normed else None
        hidden = x.new_empty(rows, I) if settings.keep else None
        total = (
            torch.empty_like(x) if settings.keep and normed and not settings.norm_first else None
        )
        ctx.settings, ctx.sizes, ctx.precision = settings, (rows, H, I), dispatch.precision()
        dispatch.kernels.mlp_fwd(
            address(out),
            addresses(stats, hidden, total),
            address(x),
            MLPFunction.description(ctx, parameters),
            torch.get_num_threads(),
        )
        if settings.keep:
            ctx.save_for_backward(x, stats, hidden, total, *parameters)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        x, stats, hidden, total, *parameters = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        wanted_norm = wanted[6] or wanted[7]  # the kernel gives both or neither
        grad_x = new_grad(x, wanted[0])
        grads = [new_grad(p, need) for p, need in zip(parameters[:4], wanted[2:6], strict=True)]
        grads += [new_grad(p, wanted_norm) for p in parameters[4:]]
        grad_out = grad_out.contiguous()
        fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm_weight, norm_bias = addresses(*grads)
        dispatch.kernels.mlp_bwd(
            address(grad_x),
            [(norm_weight, norm_bias), (fc1_weight, fc1_bias), (fc2_weight, fc2_bias)],
            address(grad_out),
            addresses(stats, hidden, total),
            address(x),
            MLPFunction.description(ctx, parameters),
            torch.get_num_threads(),
        )
        return grad_x, None, *grads

    @staticmethod
    def description(ctx: Any, parameters: Any) -> tuple[Any, ...]:
        """`Mlp` of csrc/kernels.h."""
        norm_weight, norm_bias = addresses(*parameters[4:])
        settings = ctx.settings
        return (
            ctx.sizes,
            (norm_weight, norm_bias, settings.eps),
            settings.norm_first,
            linear_description(*parameters[:2]),
            linear_description(*parameters[2:4]),
            list(ACTIVATIONS).index(settings.activation),
            (settings.dropout_p, settings.seed),
            (settings.out_dropout_p, settings.out_seed),
            ctx.precision,
        )


def mlp_cpu(
    x: Tensor,
    fc1: Linear,
    fc2: Linear,
    activation: str,
    dropout_p: float,
    seed: int,
    norm: Norm | None,
    norm_first: bool,
    out_dropout_p: float,
    out_seed: int,
) -> Tensor:
    weight, bias, eps = norm or (None, None, 0.0)
    x, parameters = x.contiguous(), [*laid_out(fc1), *laid_out(fc2), *contiguous(weight, bias)]
    keep = needs_grad(x, *parameters)
    dropouts = (out_dropout_p, out_seed)
    settings = Settings(activation, dropout_p, seed, eps, norm_first, *dropouts, keep)
    return MLPFunction.apply(x, settings, *parameters)


def why_not_cpu(
    x: Tensor | None = None,
    fc1: Linear | None = None,
    fc2: Linear | None = None,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    seed: int = 0,
    norm: Norm | None = None,
    norm_first: bool = True,
    out_dropout_p: float = 0.0,
    out_seed: int = 0,
) -> str | None:
    if x is None or fc1 is None or fc2 is None:
        return dispatch.why_not_cpu()
    reason = why_not_fused(x, fc1, fc2, norm, dropout_p, out_dropout_p)
    return reason or dispatch.why_not_fused(x, *fc1, *fc2, *(norm[:2] if norm else ()))


def why_not_triton(
    x: Tensor | None = None,
    fc1: Linear | None = None,
    fc2: Linear | None = None,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    seed: int = 0,
    norm: Norm | None = None,
    norm_first: bool = True,
    out_dropout_p: float = 0.0,
    out_seed: int = 0,
) -> str | None:
    if x is None or fc1 is None or fc2 is None:
        return dispatch.why_not_triton()
    reason = why_not_fused(x, fc1, fc2, norm, dropout_p, out_dropout_p)
    return reason or dispatch.why_not_triton(x, *fc1, *fc2, *(norm[:2] if norm else ()))


def why_not_fused(
    x: Tensor, fc1: Linear, fc2: Linear, norm: Norm | None, *dropout_ps: float
) -> str | None:
    if x.numel() == 0:
        return "there are no elements"
    if not all(0 <= p < 1 for p in dropout_ps):
        return "everything is dropped, or the probability is none"
    I, H = fc1.weight.shape
    if not (fc1.fits(I, H) and fc2.fits(H, I) and (norm is None or norm.fits(H))):
        return "a bias or a norm does not fit the weights"
    return None


IMPLEMENTATIONS: list[dispatch.Implementation] = [
    dispatch.Implementation("cpu", mlp_cpu, why_not_cpu),
    dispatch.Implementation("triton", dispatch.run_triton("mlp"), why_not_triton),
    dispatch.Implementation("ref", mlp_ref),
]


def mlp(
    x: Tensor,
    fc1: Linear,
    fc2: Linear,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    seed: int = 0,
    norm: Norm | None = None,
    norm_first: bool = True,
    out_dropout_p: float = 0.0,
    out_seed: int = 0,
) -> Tensor:
    """`dropout(fc2(dropout(activation(fc1(x)))))`, with layer norm and residual if wanted.

    Args:
        x: [..., H].
        fc1, fc2: weights [I, H] and [H, I].
        activation: `gelu` (exact), `gelu_tanh`, `relu`, `silu` or `leaky_relu` (slope 0.01).
        dropout_p, seed: probability of dropping an activation, and the mask's name; see `dropout`.
        norm: a layer norm; it brings the residual connection.
        norm_first: `x + f(norm(x))` rather than `norm(x + f(x))`.
        out_dropout_p, out_seed: of what fc2 gives.

    Raises:
        ValueError: sizes do not fit each other, or the activation is unknown.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"Unknown activation '{activation}'; choose from {', '.join(ACTIVATIONS)}")
    I, H = fc1.weight.shape
    if x.size(-1) != H or fc2.weight.shape != (H, I):
        raise ValueError(
            f"x {list(x.shape)}, fc1 {[I, H]} and fc2 {list(fc2.weight.shape)} do not fit: "
            "[..., H], [I, H] and [H, I] are needed"
        )
    x = dispatch.autocast_input(x, fc1.weight)
    dropouts = (dropout_p, seed), (out_dropout_p, out_seed)
    arguments = (x, fc1, fc2, activation, *dropouts[0], norm, norm_first, *dropouts[1])
    return dispatch.choose("mlp", IMPLEMENTATIONS, *arguments).run(*arguments)
