"""Layers that one or two operations compute as a whole."""

import inspect
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastllm.integrations.huggingface.attention import DROPOUT_FORWARDS
from fastllm.integrations.huggingface.fusible import (
    CannotFuse,
    FusedModule,
    activation_name,
    are_ignorable,
    assert_plain,
    linear_parameters,
    norm_parameters,
    stacked_linear_parameters,
    why_not_kernels,
)
from fastllm.ops.decoder import Dropout, Layer, Mlp, MultiHeadAttention
from fastllm.ops.dropout import fresh_seeds
from fastllm.ops.mlp import mlp
from fastllm.ops.multi_head_attention import multi_head_attention
from fastllm.ops.precision import autocast_input


class LayerPaths(NamedTuple):
    """Where the transformer layer of an architecture keeps its parts, as paths of attributes.

    Attributes:
        norm_first: Pre-LN: `x + f(norm(x))` rather than `norm(x + f(x))`.
        containers: modules whose forwards are bypassed, besides those named below.
        norm1, norm2: the layer norms of the attention and of the feed-forward network.
        attention: the module with the attributes `is_causal` and `scaling`.
        num_heads: number of attention heads.
        qkv: the projections to queries, keys and values, or the one to all of them.
        out: the projection of the heads' outputs.
        weights_dropout: dropout of the attention weights; active when `attention` is in training
            mode, whatever its own mode.
        out_dropout: dropout after `out`, if any.
        fc1, activation, fc2: the feed-forward network.
        mlp_dropout: dropout after `fc2`.
    """

    norm_first: bool
    containers: tuple[str, ...]
    norm1: str
    attention: str
    num_heads: str
    qkv: tuple[str, ...]
    out: str
    weights_dropout: str
    out_dropout: str | None
    norm2: str
    fc1: str
    activation: str
    fc2: str
    mlp_dropout: str


def compute_layer(
    layer: Layer,
    x: Tensor,
    mask: Tensor | None,
    causal: bool,
    starts: tuple[int, ...] | None = None,
) -> Tensor:
    """The output of a layer for x: [B, S, H], or [rows, H] with `starts`."""
    seeds = fresh_seeds()
    attention = layer.attention._replace(mask=mask, causal=causal, starts=starts)
    x = multi_head_attention(x, attention.with_seeds(seeds))
    return mlp(x, layer.mlp.with_seeds(seeds))


class TransformerLayer(FusedModule):
    """Attention and feed-forward network, each with layer norm and residual connection."""

    FUSED_PARTS = "whole layers fused"

    paths: ClassVar[LayerPaths]
    argument_names: ClassVar[list[str]]
    """The arguments of transformers' `forward` after the hidden states, in order."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        cls.argument_names = list(inspect.signature(super().forward).parameters)[2:]
        super().__init_subclass__(**kwargs)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        named = dict(zip(self.argument_names, args, strict=False)) | kwargs
        output = self.fused_forward(hidden_states, **named)
        if output is not None:
            return output
        return super().forward(hidden_states, *args, **kwargs)

    def fused_forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        encoder_hidden_states: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | None:
        """The output of `forward`, by two operations; None if the modules must compute it."""
        if cache is not None or encoder_hidden_states is not None or not are_ignorable(kwargs):
            return None
        if attention_mask is not None and attention_mask.dtype is not torch.bool:
            return None  # a mask for another attention than ours
        try:
            layer = self.record()
        except CannotFuse:
            return None
        causal, weight = layer.attention.causal, layer.attention.out.weight
        x = autocast_input(hidden_states, weight)
        if why_not_kernels(x, *layer.attention.parameters(), *layer.mlp.parameters()) is not None:
            return None
        unpadded = getattr(attention_mask, "unpadded", None)
        if unpadded is None or unpadded.is_causal != causal:
            masked = None if attention_mask is None else ~attention_mask
            # A mask includes causality.
            return compute_layer(layer, x, masked, causal and masked is None)
        flat = x.flatten(0, 1)
        rows = flat.index_select(0, unpadded.rows)
        rows = compute_layer(layer, rows, None, causal, unpadded.starts)
        return torch.zeros_like(flat).index_copy(0, unpadded.rows, rows).view_as(x)

    def record(self) -> Layer:
        paths = self.paths
        attention = self.at(paths.attention)
        weights_dropout, mlp_dropout = self.at(paths.weights_dropout), self.at(paths.mlp_dropout)
        out_dropout = self.at(paths.out_dropout) if paths.out_dropout else None
        self.assert_bypassable(*paths.containers, paths.attention)
        dropouts = [d for d in (weights_dropout, out_dropout, mlp_dropout) if d is not None]
        assert_plain(*dropouts, known=DROPOUT_FORWARDS)
        out, num_heads = linear_parameters(self.at(paths.out)), self.at(paths.num_heads)
        head_dim = out.weight.size(0) / num_heads
        if abs(attention.scaling * head_dim**0.5 - 1) > 1e-6:
            raise CannotFuse("the scores are not divided by the square root of the head width")
        out_dropout_p = out_dropout.p if out_dropout and out_dropout.training else 0.0
        return Layer(
            MultiHeadAttention(
                qkv=stacked_linear_parameters(*map(self.at, paths.qkv)),
                out=out,
                heads=num_heads,
                norm=norm_parameters(self.at(paths.norm1)),
                norm_first=paths.norm_first,
                causal=attention.is_causal,
                weights_dropout=Dropout(weights_dropout.p if attention.training else 0.0),
                out_dropout=Dropout(out_dropout_p),
            ),
            Mlp(
                fc1=linear_parameters(self.at(paths.fc1)),
                fc2=linear_parameters(self.at(paths.fc2)),
                activation=activation_name(self.at(paths.activation)),
                norm=norm_parameters(self.at(paths.norm2)),
                norm_first=paths.norm_first,
                out_dropout=Dropout(mlp_dropout.p if mlp_dropout.training else 0.0),
            ),
        )


class FeedForwardPaths(NamedTuple):
    """Where a feed-forward network keeps its parts.

    Attributes:
        containers: modules whose forwards are bypassed, besides those named below.
        fc1, activation, fc2: the network.
        norm: called with its output plus its input.
    """

    containers: tuple[str, ...]
    fc1: str
    activation: str
    fc2: str
    norm: str


class FeedForward(FusedModule):
    """A feed-forward network with a residual connection and any kind of norm, which is called."""

    paths: ClassVar[FeedForwardPaths]

    def forward(self, hidden_states: Tensor) -> Tensor:
        try:
            network = self.record()
        except CannotFuse:
            return super().forward(hidden_states)
        x = autocast_input(hidden_states, network.fc1.weight)
        if why_not_kernels(x, *network.parameters()) is not None:
            return super().forward(hidden_states)
        return self.at(self.paths.norm)(mlp(x, network) + x)

    def record(self) -> Mlp:
        paths = self.paths
        self.assert_bypassable(*paths.containers)
        return Mlp(
            linear_parameters(self.at(paths.fc1)),
            linear_parameters(self.at(paths.fc2)),
            activation_name(self.at(paths.activation)),
        )
