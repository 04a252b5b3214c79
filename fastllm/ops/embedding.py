"""From token ids to hidden states: lookup, scale, position and dropout."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.ops import dispatch
from fastllm.ops.dropout import dropout
from fastllm.ops.parameters import address, check_first_derivative, contiguous, new_grad

CPU = torch.device("cpu")


class Settings(NamedTuple):
    """What is no tensor."""

    scale: float = 1.0
    padding_idx: int | None = None
    dropout_p: float = 0.0
    seed: int = 0


def embedding_ref(ids: Tensor, weight: Tensor, positions: Tensor, settings: Settings) -> Tensor:
    tokens = F.embedding(ids, weight, settings.padding_idx) * settings.scale
    return dropout(tokens + positions, settings.dropout_p, settings.seed)


class EmbeddingFunction(torch.autograd.Function):
    """The C++ kernel; keeps the ids alone."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: Tensor, positions: Tensor, settings: Settings
    ) -> Tensor:
        out = weight.new_empty(*ids.shape, weight.size(1))
        ctx.settings = settings
        dispatch.kernels.embedding_fwd(
            address(out),
            EmbeddingFunction.description(ctx, ids, weight, positions),
            torch.get_num_threads(),
        )
        ctx.save_for_backward(ids, weight, positions)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        ids, weight, positions = ctx.saved_tensors
        _, for_weight, for_positions, _ = ctx.needs_input_grad
        grad_weight = new_grad(weight, for_weight)
        grad_positions = new_grad(positions, for_positions)
        grad_out = grad_out.contiguous()
        padding_idx = -1 if ctx.settings.padding_idx is None else ctx.settings.padding_idx
        dispatch.kernels.embedding_bwd(
            address(grad_weight),
            address(grad_positions),
            address(grad_out),
            padding_idx,
            EmbeddingFunction.description(ctx, ids, weight, positions),
            torch.get_num_threads(),
        )
        return None, grad_weight, grad_positions, None

    @staticmethod
    def description(ctx: Any, ids: Tensor, weight: Tensor, positions: Tensor) -> tuple[Any, ...]:
        """`Embedding` of csrc/kernels.h."""
        scale, _, dropout_p, seed = ctx.settings
        return (
            (*ids.shape, weight.size(1), weight.size(0)),
            (address(ids), address(weight), address(positions)),
            scale,
            (dropout_p, seed),
        )


def embedding_cpu(ids: Tensor, weight: Tensor, positions: Tensor, settings: Settings) -> Tensor:
    return EmbeddingFunction.apply(*contiguous(ids.long(), weight, positions), settings)


def why_not_ids(ids: Tensor, device: torch.device = CPU) -> str | None:
    """Why kernels on that device cannot read these ids or targets, or None."""
    if type(ids) is not Tensor or ids.device != device:
        return f"the ids are a {type(ids).__name__} on {ids.device}"
    if ids.is_floating_point() or ids.dtype is torch.bool:
        return f"the ids are {ids.dtype}, which is no integer"
    return None


def why_not_cpu(
    ids: Tensor | None = None,
    weight: Tensor | None = None,
    positions: Tensor | None = None,
    settings: Settings | None = None,
) -> str | None:
    if ids is None or weight is None or positions is None or settings is None:
        return dispatch.why_not_cpu()
    reason = why_not_ids(ids) or why_not_fused(ids, weight, positions, settings)
    return reason or dispatch.why_not_fused(weight, positions)


def why_not_triton(
    ids: Tensor | None = None,
    weight: Tensor | None = None,
    positions: Tensor | None = None,
    settings: Settings | None = None,
) -> str | None:
    if ids is None or weight is None or positions is None or settings is None:
        return dispatch.why_not_triton()
    reason = why_not_ids(ids, weight.device) or why_not_fused(ids, weight, positions, settings)
    return reason or dispatch.why_not_triton(weight, positions)


def why_not_fused(ids: Tensor, weight: Tensor, positions: Tensor, settings: Settings) -> str | None:
    if ids.ndim != 2 or ids.numel() == 0:
        return "the ids are not [B, S], or none"
    if not 0 <= settings.dropout_p < 1:
        return "everything is dropped, or the probability is none"
    if positions.shape != (ids.size(1), weight.size(1)):
        return "the positions do not fit the ids and the embeddings"
    return None


IMPLEMENTATIONS: list[dispatch.Implementation] = [
    dispatch.Implementation("cpu", embedding_cpu, why_not_cpu),
    dispatch.Implementation("triton", dispatch.run_triton("embedding"), why_not_triton),
    dispatch.Implementation("ref", embedding_ref),
]


def check_token_ids(ids: Tensor, vocab_size: int) -> None:
    """Raises an `IndexError` that names an id outside [0, vocab_size), where values can be seen."""
    if ids.numel() == 0 or ids.is_meta or dispatch.inside_torch_func():
        return
    lowest, highest = torch.aminmax(ids)
    if lowest < 0 or highest >= vocab_size:
        wrong = int(lowest if lowest < 0 else highest)
        raise IndexError(f"Token id {wrong} is outside the vocabulary of {vocab_size} tokens")


def embedding(ids: Tensor, weight: Tensor, positions: Tensor, settings: Settings) -> Tensor:
    """`dropout(weight[ids] * scale + positions)`.

    Args:
        ids: [B, S], integers in [0, V).
        weight: [V, H].
        positions: [S, H].
        settings: `scale`; `padding_idx`, whose row gets no gradient; dropout and its seed.

    Returns:
        [B, S, H].

    Raises:
        IndexError: an id is outside the vocabulary.
    """
    check_token_ids(ids, weight.size(0))
    arguments = (ids, weight, positions, settings)
    return dispatch.choose("embedding", IMPLEMENTATIONS, *arguments).run(*arguments)
