"""From token ids to hidden states: lookup, scale, positions and dropout."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.ops import dispatch, extension
from fastllm.ops.autograd import check_first_derivative
from fastllm.ops.decoder import Embedding
from fastllm.ops.dropout import DROPOUT_RANGE, dropout
from fastllm.ops.memory import address, contiguous, new_grad
from fastllm.ops.torch_private import in_functorch_transform


def embedding_ref(ids: Tensor, embedding: Embedding) -> Tensor:
    tokens = F.embedding(ids, embedding.weight, embedding.padding_idx) * embedding.scale
    if embedding.positions is not None:
        tokens = tokens + embedding.positions
    return dropout(tokens, *embedding.dropout)


class EmbeddingFunction(torch.autograd.Function):
    """The C++ kernel; saves only the ids."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, embedding: Embedding, weight: Tensor, positions: Tensor | None
    ) -> Tensor:
        B, S = ids.shape
        out = weight.new_empty(B, S, weight.size(1))
        extension.kernels.embedding_fwd(
            out=out.data_ptr(),
            embedding=embedding.to_kernel(B, S, ids),
            threads=torch.get_num_threads(),
        )
        ctx.embedding = embedding.with_parameters(iter((None, None)))
        ctx.save_for_backward(ids, weight, positions)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        ids, weight, positions = ctx.saved_tensors
        _, _, weight_needed, positions_needed = ctx.needs_input_grad
        grad_weight = new_grad(weight, weight_needed)
        grad_positions = new_grad(positions, positions_needed)
        grad_out = grad_out.contiguous()
        embedding = ctx.embedding.with_parameters(iter((weight, positions)))
        extension.kernels.embedding_bwd(
            grad_weight=address(grad_weight),
            grad_positions=address(grad_positions),
            grad_out=grad_out.data_ptr(),
            padding_idx=embedding.row_without_grad,
            embedding=embedding.to_kernel(*ids.shape, ids),
            threads=torch.get_num_threads(),
        )
        return None, None, grad_weight, grad_positions


def embedding_cpu(ids: Tensor, embedding: Embedding) -> Tensor:
    tables = contiguous(*embedding.parameters())
    embedding = embedding.with_parameters(iter(tables))
    return EmbeddingFunction.apply(ids.long().contiguous(), embedding, *tables)


def why_not_ids(ids: Tensor, device: torch.device) -> str | None:
    """Why kernels on that device cannot read these ids or targets, or None."""
    if type(ids) is not Tensor or ids.device != device:
        return f"the ids are a {type(ids).__name__} on {ids.device}"
    if ids.is_floating_point() or ids.dtype is torch.bool:
        return f"the ids are {ids.dtype}, not integers"
    return None


def why_not(ids: Tensor, embedding: Embedding) -> str | None:
    """Why no kernel can take these arguments, or None."""
    if (reason := why_not_ids(ids, embedding.weight.device)) is not None:
        return reason
    if ids.ndim != 2 or ids.numel() == 0:
        return "the ids are empty or not [B, S]"
    if not 0 <= embedding.dropout.p < 1:
        return DROPOUT_RANGE
    positions = embedding.positions
    if positions is not None and positions.shape != (ids.size(1), embedding.weight.size(1)):
        return "the positions do not match the ids and the embeddings"
    return None


def why_not_cpu(ids: Tensor, embedding: Embedding) -> str | None:
    return why_not(ids, embedding) or dispatch.why_not_cpu_fused(
        embedding.weight, embedding.positions
    )


def why_not_triton(ids: Tensor, embedding: Embedding) -> str | None:
    return why_not(ids, embedding) or dispatch.why_not_triton(embedding.weight, embedding.positions)


IMPLEMENTATIONS = [
    dispatch.cpu(embedding_cpu, why_not_cpu),
    dispatch.triton("embedding", why_not_triton),
    dispatch.reference(embedding_ref),
]


def check_token_ids(ids: Tensor, vocab_size: int) -> None:
    """Raises an `IndexError` that names an id outside [0, vocab_size), if values are visible."""
    if ids.numel() == 0 or ids.is_meta or in_functorch_transform():
        return
    lowest, highest = torch.aminmax(ids)
    if lowest < 0 or highest >= vocab_size:
        wrong = int(lowest if lowest < 0 else highest)
        raise IndexError(f"Token id {wrong} is outside the vocabulary of {vocab_size} tokens")


def embedding(ids: Tensor, embedding: Embedding) -> Tensor:
    """`dropout(weight[ids] * scale + positions)`, perhaps without positions.

    Args:
        ids: [B, S], integers in [0, V).
        embedding: see `Embedding`; positions [S, H].

    Returns:
        [B, S, H].

    Raises:
        IndexError: an id is outside the vocabulary.
    """
    check_token_ids(ids, embedding.weight.size(0))
    arguments = (ids, embedding)
    return dispatch.choose("embedding", IMPLEMENTATIONS, *arguments).run(*arguments)
