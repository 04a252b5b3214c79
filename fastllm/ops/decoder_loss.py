"""The next-token loss of a whole decoder model as one operation, gradients included.

A group of sequences goes through all layers and back by itself, so that its activations stay in a
core's caches and nothing is kept for a later backward but the gradients. It is the sum of the
other operations, for which it stands where they would all run in C++.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastllm.ops import dispatch
from fastllm.ops.attention import check_mask, mask_description, why_not_mask
from fastllm.ops.dropout import draw_seeds
from fastllm.ops.embedding import why_not_ids
from fastllm.ops.mlp import ACTIVATIONS
from fastllm.ops.parameters import (
    Linear,
    Norm,
    address,
    addresses,
    check_first_derivative,
    graph_is_kept,
    linear_description,
    needs_grad,
    new_grad,
    times,
)

# A larger vocabulary's logits would leave the caches.
LARGEST_VOCABULARY = 4096
# Sequences are taken together until they have so many positions; see csrc/decoder_loss.inc.
GROUP_ROWS = 64
# With fewer groups of them, threads share out the rows of each operation instead.
FEWEST_GROUPS = 4


class Layer(NamedTuple):
    """A transformer layer; probabilities of attention weights, attention output and MLP."""

    norm1: Norm
    qkv: Linear
    out: Linear
    norm2: Norm
    fc1: Linear
    fc2: Linear
    num_heads: int
    is_causal: bool
    norm_first: bool
    activation: str
    dropout_ps: tuple[float, float, float]


class Decoder(NamedTuple):
    """A decoder model; `positions` [S, H] are those of the sequences at hand."""

    tokens: Tensor
    positions: Tensor
    scale: float
    padding_idx: int | None
    dropout_p: float
    layers: Sequence[Layer]
    attn_mask: Tensor | None
    norm: Norm | None
    head: Linear

    def fits(self, S: int) -> bool:
        """Whether all sizes are what the kernel takes them to be for sequences of length S."""
        H = self.tokens.size(1)
        for layer in self.layers:
            I = layer.fc1.weight.size(0)
            if (
                H % layer.num_heads
                or not (layer.norm1.fits(H) and layer.qkv.fits(3 * H, H) and layer.out.fits(H, H))
                or not (layer.norm2.fits(H) and layer.fc1.fits(I, H) and layer.fc2.fits(H, I))
            ):
                return False
        return (
            self.positions.shape == (S, H)
            and (self.norm is None or self.norm.fits(H))
            and self.head.fits(self.head.weight.size(0), H)
        )

    def parameters(self) -> list[Tensor | None]:
        """Every tensor, pairs of weight and bias side by side."""
        tensors: list[Tensor | None] = [self.tokens, self.positions]
        for layer in self.layers:
            tensors += [*layer.norm1[:2], *layer.qkv, *layer.out]
            tensors += [*layer.norm2[:2], *layer.fc1, *layer.fc2]
        return [*tensors, *(self.norm[:2] if self.norm else (None, None)), *self.head]

    def dropout_ps(self) -> list[float]:
        """The probability of every dropout, in the order in which the modules come to them."""
        return [self.dropout_p, *(p for layer in self.layers for p in layer.dropout_ps)]


class DecoderLossFunction(torch.autograd.Function):
    """The C++ kernel, whose forward gives the gradients as well."""

    @staticmethod
    def forward(
        ctx: Any,
        decoder: Decoder,
        ids: Tensor,
        labels: Tensor,
        ignore_index: int,
        seeds: Sequence[int],
        keep: bool,
        *parameters: Tensor | None,
    ) -> Tensor:
        grads: list[Tensor | None] = []
        if keep:
            wanted = ctx.needs_input_grad[6:]
            grads = [new_grad(p, need) for p, need in zip(parameters, wanted, strict=True)]
            for i in _norm_pairs(len(decoder.layers)):
                # The kernel gives both gradients of a norm or neither.
                if (grads[i] is None) != (grads[i + 1] is None):
                    grads[i], grads[i + 1] = (new_grad(p, True) for p in parameters[i : i + 2])
        loss = dispatch.kernels.decoder_loss(
            *description(decoder, ids, labels, ignore_index, seeds),
            grad_description(grads) if keep else None,
            torch.get_num_threads(),
        )
        # Saving the gradients would take a microsecond each. What is saved instead tells a second
        # backward that it comes too late.
        ctx.save_for_backward(torch.empty(0))
        ctx.grads = grads
        return torch.tensor(loss, dtype=decoder.tokens.dtype, device="cpu")

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        _ = ctx.saved_tensors
        grads = times(ctx.grads, grad_out)
        if not graph_is_kept():
            ctx.grads = None
        return None, None, None, None, None, None, *grads


def _norm_pairs(layers: int) -> list[int]:
    """Where norms' weights stand among the parameters."""
    return [i for l in range(layers) for i in (2 + 12 * l, 8 + 12 * l)] + [2 + 12 * layers]


def description(
    decoder: Decoder, ids: Tensor, labels: Tensor, ignore_index: int, seeds: Sequence[int]
) -> tuple[Any, ...]:
    """The arguments of the kernel, up to the gradients; see csrc/kernels.h."""
    B, S = ids.shape
    V, H = decoder.tokens.shape
    dropouts = list(zip(decoder.dropout_ps(), seeds, strict=True))
    precision = dispatch.precision()
    layers = []
    for layer, first in zip(decoder.layers, range(1, len(dropouts), 3), strict=True):
        N = layer.num_heads
        attention = (
            (B, S, N, H // N),
            0,
            (*addresses(*layer.norm1[:2]), layer.norm1.eps),
            layer.norm_first,
            linear_description(*layer.qkv),
            linear_description(*layer.out),
            mask_description(decoder.attn_mask, B, N, S, S),
            layer.is_causal,
            dropouts[first],
            dropouts[first + 1],
            precision,
        )
        mlp = (
            (B * S, H, layer.fc1.weight.size(0)),
            (*addresses(*layer.norm2[:2]), layer.norm2.eps),
            layer.norm_first,
            linear_description(*layer.fc1),
            linear_description(*layer.fc2),
            list(ACTIVATIONS).index(layer.activation),
            dropouts[first + 2],
            (0.0, 0),
            precision,
        )
        layers.append((attention, mlp))
    norm, padding_idx = decoder.norm, decoder.padding_idx
    head = (
        (B * S, H, decoder.head.weight.size(0)),
        address(labels),
        ignore_index,
        linear_description(*decoder.head),
        precision,
    )
    return (
        (
            (B, S, H, V),
            addresses(ids, decoder.tokens, decoder.positions),
            decoder.scale,
            dropouts[0],
        ),
        layers,
        (*addresses(*norm[:2]), norm.eps) if norm else (0, 0, 0.0),
        head,
        -1 if padding_idx is None else padding_idx,
    )


def grad_description(grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Where the gradients go, in the order of `Decoder.parameters`."""
    flat = addresses(*grads)
    pairs = list(zip(flat[::2], flat[1::2], strict=True))
    layers = [pairs[i : i + 6] for i in range(1, len(pairs) - 2, 6)]
    return pairs[0], layers, pairs[-2], pairs[-1]


def why_not_shape(B: int, S: int, V: int) -> str | None:
    """The same by the shape alone: which threads there are must not change a bit of the result."""
    if V > LARGEST_VOCABULARY:
        return "the logits are too many to stay in the caches"
    if -(-B // -(-GROUP_ROWS // S)) < FEWEST_GROUPS:
        return "the sequences are too few to be shared out among threads"
    return None


def why_not_decoder(decoder: Decoder, S: int) -> str | None:
    """Why the kernels cannot read this model, for sequences of length S; None if they can."""
    if dispatch.requested() not in ("auto", "cpu"):
        return f"'{dispatch.requested()}' was asked for"
    if not decoder.fits(S):
        return "sizes do not fit each other"
    parameters = decoder.parameters()
    if any(p is not None and not p.is_contiguous() for p in parameters):
        return "a parameter is not contiguous"
    return dispatch.why_not_fused(*parameters)


def why_not(decoder: Decoder, ids: Tensor, labels: Tensor) -> str | None:
    """Why this operation cannot, or should not, stand for the others; None if it can."""
    if ids.numel() == 0 or ids.ndim != 2:
        return "the ids are not [B, S], or none"
    if (reason := why_not_ids(ids) or why_not_ids(labels)) is not None:
        return reason
    B, S = ids.shape
    if (reason := why_not_shape(B, S, decoder.head.weight.size(0))) is not None:
        return reason
    if not all(0 <= p < 1 for p in decoder.dropout_ps()):
        return "everything is dropped, or the probability is none"
    return why_not_mask(decoder.attn_mask) or why_not_decoder(decoder, S)


def decoder_loss(decoder: Decoder, ids: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Mean cross-entropy of the next token: position t is scored against `labels[:, t + 1]`.

    Args:
        decoder: the model; see `why_not` for what it must be like.
        ids, labels: [B, S], integers in [0, V); labels may be `ignore_index`.

    Returns:
        A scalar in nats; not a number when nothing is scored.

    Raises:
        IndexError: an id or a label is outside the vocabulary.
        TypeError: the mask is not boolean.
    """
    check_mask(decoder.attn_mask)
    parameters = decoder.parameters()
    keep = needs_grad(*parameters)
    ids, labels = ids.long().contiguous(), labels.long().contiguous()
    dropout_ps = decoder.dropout_ps()
    drawn = iter(draw_seeds(sum(p > 0 for p in dropout_ps)))
    seeds = [next(drawn) if p else 0 for p in dropout_ps]
    return DecoderLossFunction.apply(decoder, ids, labels, ignore_index, seeds, keep, *parameters)
