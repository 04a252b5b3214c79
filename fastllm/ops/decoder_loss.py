"""The next-token loss of a whole decoder model as one operation, gradients included.

Each group of sequences goes through all layers and back on its own, so that its activations stay in
a core's caches and only the gradients are saved for the backward. The result equals that of the
separate operations, which it replaces if all of them would run in C++.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastllm.ops import dispatch, extension
from fastllm.ops.attention import check_mask, why_not_mask
from fastllm.ops.autograd import check_first_derivative, needs_grad, scale_grads
from fastllm.ops.decoder import Decoder, Dropout, mask_to_kernel
from fastllm.ops.dropout import DROPOUT_RANGE, draw_seeds
from fastllm.ops.embedding import why_not_ids
from fastllm.ops.memory import address, new_grad
from fastllm.ops.precision import product_precision
from fastllm.ops.torch_private import graph_is_kept

# The logits of a larger vocabulary would not stay in the caches.
LARGEST_VOCABULARY = 4096
# Sequences are grouped until a group has this many positions; see csrc/decoder_loss.inc.
GROUP_ROWS = 64
# With fewer groups, threads divide the rows of each operation instead.
FEWEST_GROUPS = 4


class DecoderLossFunction(torch.autograd.Function):
    """The C++ kernel, whose forward computes the gradients as well."""

    @staticmethod
    def forward(
        ctx: Any,
        decoder: Decoder,
        ids: Tensor,
        labels: Tensor,
        ignore_index: int,
        dropouts: Sequence[Dropout],
        keep: bool,
        *parameters: Tensor | None,
    ) -> Tensor:
        B, S = ids.shape
        grads: list[Tensor | None] = []
        if keep:
            needed = ctx.needs_input_grad[6:]
            grads = [new_grad(p, need) for p, need in zip(parameters, needed, strict=True)]
        addresses = list(map(address, parameters))
        mask = None
        for layer in decoder.layers[:1]:  # all layers have the same mask
            mask = mask_to_kernel(layer.attention.mask, B, layer.attention.heads, S, S)
        loss = extension.kernels.decoder_loss(
            decoder=decoder.to_kernel_once(addresses),
            batch=extension.kernels.Batch(
                B=B,
                S=S,
                ids=ids.data_ptr(),
                labels=labels.data_ptr(),
                ignore_index=ignore_index,
                mask=mask,
                dropouts=[dropout.to_kernel() for dropout in dropouts],
                precision=product_precision(),
            ),
            parameters=addresses,
            grads=list(map(address, grads)) if keep else None,
            threads=torch.get_num_threads(),
        )
        # Saving each gradient would take a microsecond. Saving anything makes autograd refuse a
        # second backward.
        ctx.save_for_backward(torch.empty(0))
        ctx.grads = grads
        return torch.scalar_tensor(loss, dtype=torch.float32, device="cpu")

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        _ = ctx.saved_tensors
        grads = scale_grads(ctx.grads, grad_out)
        if not graph_is_kept():
            ctx.grads = None
        return None, None, None, None, None, None, *grads


def decoder_loss_cpu(decoder: Decoder, ids: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    ids, labels = ids.long().contiguous(), labels.long().contiguous()
    parameters = decoder.parameters()
    keep = needs_grad(*parameters)
    dropouts = decoder.dropouts()
    seeds = iter(draw_seeds(sum(dropout.p > 0 for dropout in dropouts)))
    dropouts = [dropout.with_seed(seeds) for dropout in dropouts]
    return DecoderLossFunction.apply(
        decoder, ids, labels, ignore_index, dropouts, keep, *parameters
    )


def why_not_shape(B: int, S: int, V: int) -> str | None:
    """Why one operation for the whole model is unsuitable for the shape, or None.

    Independent of the number of threads, which must not change a bit of the result.
    """
    if V > LARGEST_VOCABULARY:
        return f"the logits of {V:,} tokens do not stay in the caches"
    if -(-B // -(-GROUP_ROWS // S)) < FEWEST_GROUPS:
        return f"{B} x {S} tokens are too few to share among threads"
    return None


def why_not_decoder(decoder: Decoder) -> str | None:
    """Why the kernels cannot read this model, or None."""
    if (reason := dispatch.why_not_requested("cpu") or decoder.why_not_sizes()) is not None:
        return reason
    parameters = decoder.parameters()
    if any(p is not None and not p.is_contiguous() for p in parameters):
        return "a parameter is not contiguous"
    return dispatch.why_not_cpu_fused(*parameters)


def why_not_cpu(decoder: Decoder, ids: Tensor, labels: Tensor, ignore_index: int) -> str | None:
    if ids.numel() == 0 or ids.ndim != 2:
        return "the ids are empty or not [B, S]"
    device = torch.device("cpu")
    if (reason := why_not_ids(ids, device) or why_not_ids(labels, device)) is not None:
        return reason
    B, S = ids.shape
    if (reason := why_not_shape(B, S, decoder.head.weight.size(0))) is not None:
        return reason
    if not all(0 <= dropout.p < 1 for dropout in decoder.dropouts()):
        return DROPOUT_RANGE
    masks = [layer.attention.mask for layer in decoder.layers[:1]]  # all layers have the same mask
    if masks and masks[0] is not None:
        if (reason := why_not_mask(masks[0], device)) is not None:
            return reason
        if len({layer.attention.heads for layer in decoder.layers}) > 1:
            return "there is a mask, and the layers differ in their number of heads"
    return why_not_decoder(decoder)


# Declined models run layer by layer, and each operation chooses its own implementation.
IMPLEMENTATIONS = [dispatch.cpu(decoder_loss_cpu, why_not_cpu)]


def why_not(decoder: Decoder, ids: Tensor, labels: Tensor, ignore_index: int = -100) -> str | None:
    """Why this operation cannot, or should not, replace the others, or None."""
    (implementation,) = IMPLEMENTATIONS
    return implementation.reason(decoder, ids, labels, ignore_index)


def decoder_loss(decoder: Decoder, ids: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Mean cross-entropy of the next token: position t is scored against `labels[:, t + 1]`.

    Args:
        decoder: a model and settings for which `why_not` returns None. This function draws the
            seeds of its dropouts.
        ids, labels: [B, S], integers in [0, V); labels may be `ignore_index`.

    Returns:
        A scalar in nats; NaN if nothing is scored.

    Raises:
        IndexError: an id or a label is outside the vocabulary.
        TypeError: the mask is not boolean.
    """
    for layer in decoder.layers[:1]:
        check_mask(layer.attention.mask)
    (implementation,) = IMPLEMENTATIONS
    return implementation.run(decoder, ids, labels, ignore_index)
