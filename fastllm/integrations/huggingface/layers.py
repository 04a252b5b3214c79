"""Layers that one or two operations compute as a whole."""

import inspect
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from fastllm.integrations.huggingface.attention import DROPOUT_FORWARDS
from fastllm.integrations.huggingface.fusible import (
    CannotFuse,
    FusedModule,
    activation_name,
    are_ignorable,
    are_too_few_rows,
    assert_plain,
    linear_parameters,
    norm_parameters,
    why_not_kernels,
)
from fastllm.integrations.huggingface.padding import Unpadded
from fastllm.ops.decoder import (
    NO_DROPOUT,
    Dropout,
    Layer,
    Linear,
    Mlp,
    MultiHeadAttention,
    Norm,
    Rope,
)
from fastllm.ops.dropout import fresh_seeds
from fastllm.ops.mlp import mlp
from fastllm.ops.multi_head_attention import (
    multi_head_attention,
    multi_head_attention_and_cache,
)
from fastllm.ops.precision import autocast_input


class LayerPaths(NamedTuple):
    """Where the transformer layer of an architecture keeps its parts, as paths of attributes.

    Attributes:
        norm_first: Pre-LN: `x + f(norm(x))` rather than `norm(x + f(x))`.
        containers: modules whose forwards are bypassed, besides those named below.
        norm1, norm2: the norms of the attention and of the feed-forward network.
        attention: the module with the attributes `is_causal` and `scaling`.
        num_heads: number of attention heads.
        qkv: the projections to queries, keys and values, or the one to all of them.
        out: the projection of the heads' outputs.
        weights_dropout: dropout of the attention weights, a module or a probability; active when
            `attention` is in training mode, whatever its own mode.
        fc1, activation, fc2: the feed-forward network.
        out_dropout, mlp_dropout: dropout after `out` and after `fc2`.
        num_kv_heads: number of heads of keys and values, if fewer.
        rotary: whether the layer is called with `position_embeddings`.
        q_norm, k_norm: of each head.
        window, softcap: see `MultiHeadAttention`.
        up: the second projection of a gated network.
        out_norm1, out_norm2: norms of what the attention and the network add.
    """

    norm_first: bool
    containers: tuple[str, ...]
    norm1: str
    attention: str
    num_heads: str
    qkv: tuple[str, ...]
    out: str
    weights_dropout: str
    norm2: str
    fc1: str
    activation: str
    fc2: str
    out_dropout: str | None = None
    mlp_dropout: str | None = None
    num_kv_heads: str | None = None
    rotary: bool = False
    q_norm: str | None = None
    k_norm: str | None = None
    window: str | None = None
    softcap: str | None = None
    up: str | None = None
    out_norm1: str | None = None
    out_norm2: str | None = None


def compute_layer(
    layer: Layer,
    x: Tensor,
    mask: Tensor | None,
    causal: bool,
    starts: tuple[int, ...] | None = None,
    update_cache: Callable[[Tensor, Tensor], Any] | None = None,
) -> Tensor:
    """The output of a layer for x: [B, S, H], or [rows, H] with `starts`.

    `update_cache` gets the keys and values [B, K, S, D]; gradients must be off.
    """
    seeds = fresh_seeds()
    window = layer.attention.window if causal else None
    attention = layer.attention._replace(mask=mask, causal=causal, window=window, starts=starts)
    attention = attention.with_seeds(seeds)
    if update_cache is None:
        x = multi_head_attention(x, attention)
    else:
        x, keys, values = multi_head_attention_and_cache(x, attention)
        update_cache(keys, values)
    return mlp(x, layer.mlp.with_seeds(seeds))


def rope_table(position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """As `Rope` has them: transformers repeats the cosines and the sines of R / 2 angles."""
    return torch.cat([each.chunk(2, -1)[0] for each in position_embeddings], -1).float()


def shared_rope(
    position_embeddings: tuple[Tensor, Tensor],
    position_ids: Tensor | None,
    unpadded: Unpadded | None,
) -> Rope | None:
    """One table of angles that serves every sequence; None if they have different positions.

    Scores depend only on differences of positions, and so sequences whose positions count up, from
    wherever, share the table of the longest.

    Args:
        position_embeddings: cosines and sines [1 or B, S, R] of these positions.
        position_ids: [1 or B, S].
        unpadded: the rows to be computed, if not all.
    """
    tables = rope_table(position_embeddings)
    if unpadded is None:
        return Rope(tables[0]) if bool((tables[1:] == tables[0]).all()) else None
    if position_ids is None:
        return None
    S, rows = tables.size(1), unpadded.rows
    sequences, columns = rows // S, rows % S
    positions = position_ids[sequences % len(position_ids), columns]
    continued = sequences.diff() == 0
    if not bool((positions.diff()[continued] == 1).all()):
        return None
    begin, end = max(pairwise(unpadded.starts), key=lambda each: each[1] - each[0])
    return Rope(tables[sequences[begin:end] % len(tables), columns[begin:end]])


class TransformerLayer(FusedModule):
    """Attention and feed-forward network, each with norm and residual connection."""

    FUSED_PARTS = "whole layers fused"

    paths: ClassVar[LayerPaths]
    argument_names: ClassVar[list[str]]
    """The arguments of transformers' `forward` after the hidden states, in order."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        cls.argument_names = list(inspect.signature(super().forward).parameters)[2:]
        super().__init_subclass__(**kwargs)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        is_token = hidden_states.size(1) == 1 and kwargs.get("cache") is not None
        if is_token or are_too_few_rows(hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
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
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | None:
        """The output of `forward`, by two operations; None if the modules must compute it."""
        if encoder_hidden_states is not None or not are_ignorable(kwargs):
            return None
        update_cache = None
        if cache is not None:
            index = self.at(self.paths.attention).layer_idx
            if not isinstance(cache, DynamicCache) or cache.get_seq_length(index) > 0:
                return None
            if torch.is_grad_enabled():
                return None
            update_cache = partial(cache.update, layer_idx=index)
        if self.paths.rotary != (position_embeddings is not None):
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
        window = layer.attention.window
        if cache is not None or (unpadded and unpadded[2:] != (causal, window)):
            unpadded = None
        if position_embeddings is not None:
            rope = shared_rope(position_embeddings, position_ids, unpadded)
            if rope is None:
                return None
            layer = layer._replace(attention=layer.attention._replace(rope=rope))
        if unpadded is None:
            masked = None if attention_mask is None else ~attention_mask
            # A mask includes causality.
            causal = causal and masked is None
            return compute_layer(layer, x, masked, causal, update_cache=update_cache)
        flat = x.flatten(0, 1)
        rows = flat.index_select(0, unpadded.rows)
        rows = compute_layer(layer, rows, None, causal, unpadded.starts)
        return torch.zeros_like(flat).index_copy(0, unpadded.rows, rows).view_as(x)

    def record(self) -> Layer:
        paths = self.paths
        attention = self.at(paths.attention)
        self.assert_bypassable(*paths.containers, paths.attention)
        first, *others = map(self._linear_at, paths.qkv)
        weights_dropout = self.at(paths.weights_dropout)
        if isinstance(weights_dropout, nn.Module):
            assert_plain(weights_dropout, known=DROPOUT_FORWARDS)
            weights_dropout = weights_dropout.p
        return Layer(
            MultiHeadAttention(
                qkv=(first, others[0], others[1]) if others else first,
                out=self._linear_at(paths.out),
                heads=self.at(paths.num_heads),
                norm=self._norm_at(paths.norm1),
                norm_first=paths.norm_first,
                causal=attention.is_causal,
                weights_dropout=Dropout(weights_dropout if attention.training else 0.0),
                out_dropout=self._dropout_at(paths.out_dropout),
                kv_heads=self._value_at(paths.num_kv_heads),
                q_norm=self._norm_at(paths.q_norm),
                k_norm=self._norm_at(paths.k_norm),
                window=self._value_at(paths.window),
                scale=attention.scaling,
                softcap=self._value_at(paths.softcap),
                out_norm=self._norm_at(paths.out_norm1),
            ),
            Mlp(
                fc1=self._linear_at(paths.fc1),
                fc2=self._linear_at(paths.fc2),
                activation=activation_name(self.at(paths.activation)),
                norm=self._norm_at(paths.norm2),
                norm_first=paths.norm_first,
                out_dropout=self._dropout_at(paths.mlp_dropout),
                up=self._linear_at(paths.up) if paths.up else None,
                out_norm=self._norm_at(paths.out_norm2),
            ),
        )

    def _value_at(self, path: str | None) -> Any:
        return self.at(path) if path else None

    def _linear_at(self, path: str) -> Linear:
        return linear_parameters(self.at(path))

    def _norm_at(self, path: str | None) -> Norm | None:
        return norm_parameters(self.at(path)) if path else None

    def _dropout_at(self, path: str | None) -> Dropout:
        if path is None:
            return NO_DROPOUT
        module = self.at(path)
        assert_plain(module, known=DROPOUT_FORWARDS)
        return Dropout(module.p if module.training else 0.0)


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
        if are_too_few_rows(hidden_states):
            return super().forward(hidden_states)
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
