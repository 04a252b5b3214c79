"""transformers' `generate` by the kernel that takes a token through all layers."""

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from fastllm.integrations.huggingface.fusible import (
    CannotFuse,
    FusedModule,
    assert_plain,
    norm_parameters,
)
from fastllm.integrations.huggingface.layers import rope_table
from fastllm.integrations.huggingface.padding import has_gaps
from fastllm.ops import decode
from fastllm.ops.decode import Decoding, packed_once
from fastllm.ops.decoder import Decoder, Embedding, Layer, Linear, Rope
from fastllm.ops.memory import contiguous
from fastllm.ops.precision import PRECISIONS, product_precision

# Packing the weights takes as long as a few tokens.
FEWEST_NEW_TOKENS = 4
# The kernel allocates memory for all tokens of a sequence at its first.
LONGEST_SEQUENCE = 8192
# Of the tables of angles, so that calls of different lengths share one.
FEWEST_POSITIONS = 2048


class DecoderPaths(NamedTuple):
    """Where a decoder keeps its parts, as paths of submodules.

    Attributes:
        base: the model without its head, whose forward is bypassed.
        embedding: the token embeddings.
        layers: the list of transformer layers.
        norm: the final norm.
        positions: learned positions.
        rotary: the module that computes cosines and sines of positions.
        dropout: of the embeddings.
    """

    base: str
    embedding: str
    layers: str
    norm: str
    positions: str | None = None
    rotary: str | None = None
    dropout: str | None = None


def decoder_record(
    model: FusedModule, paths: DecoderPaths, head: Linear, softcap: float | None, length: int
) -> Decoder:
    """A whole model for sequences of up to `length` tokens.

    Raises:
        CannotFuse: the model must run itself.
    """
    embedding, layers = model.at(paths.embedding), model.at(paths.layers)
    model.assert_bypassable(paths.base)
    assert_plain(*layers, known=model.bypassed)
    assert_plain(embedding)
    if paths.dropout and model.training and model.at(paths.dropout).p:
        raise CannotFuse("dropout is on; call model.eval() first")
    positions, tables = None, {}
    if paths.positions:
        assert_plain(model.at(paths.positions))
        positions = model.at(paths.positions).weight
        if len(positions) < length:
            raise CannotFuse(f"the model has {len(positions)} positions, not {length}")
        length = len(positions)
    if paths.rotary:
        length = max(FEWEST_POSITIONS, 1 << (length - 1).bit_length())
        model.assert_bypassable(paths.rotary)
        tables = rope_tables(model.at(paths.rotary), embedding.weight, length)
    decoder = Decoder(
        embedding=Embedding(
            embedding.weight,
            positions,
            float(getattr(embedding, "embed_scale", 1.0)),
            embedding.padding_idx,
        ),
        layers=[with_rope(layer, tables) for layer in layers],
        norm=norm_parameters(model.at(paths.norm)),
        head=head,
        length=length,
        softcap=softcap,
    )
    if (reason := decode.why_not(decoder)) is not None:
        raise CannotFuse(reason)
    return decoder


def with_rope(layer: Any, tables: dict[str | None, Tensor]) -> Layer:
    """The record of a layer with contiguous weights, its angles included."""
    attention, mlp, _ = layer.record()
    if not attention.causal:
        raise CannotFuse("the attention is not causal")
    attention = attention.with_parameters(iter(contiguous(*attention.parameters())))
    mlp = mlp.with_parameters(iter(contiguous(*mlp.parameters())))
    if tables:
        key = None if None in tables else layer.at(layer.paths.attention).layer_type
        attention = attention._replace(rope=Rope(tables[key]))
    return Layer(attention, mlp)


_tables: WeakKeyDictionary[nn.Module, dict[str | None, Tensor]] = WeakKeyDictionary()


def rope_tables(rotary: Any, like: Tensor, length: int) -> dict[str | None, Tensor]:
    """The angles of the first `length` positions, by the type of the layer if they depend on it.

    The same tensors as at the previous call while they have not changed: with others, the weights
    would be packed again.
    """
    kinds = rotary.rope_type if isinstance(rotary.rope_type, dict) else {None: rotary.rope_type}
    if any("dynamic" in kind or kind == "longrope" for kind in kinds.values()):
        raise CannotFuse("the rotary angles depend on the length of the sequence")
    positions, tables = torch.arange(length)[None], {}
    for layer_type in kinds:
        arguments = () if layer_type is None else (layer_type,)
        tables[layer_type] = rope_table(rotary(like, positions, *arguments))[0]
    known = _tables.get(rotary, {})
    if known.keys() != tables.keys() or not all(torch.equal(known[k], tables[k]) for k in known):
        _tables[rotary] = known = tables
    return known


class DecodingCache(DynamicCache):
    """The cache of a `generate` call, in the kernel's memory while only the model uses it.

    When something else reads `layers`, the model computes these from all tokens so far, and from
    then on this is a `DynamicCache` like any other.

    Args:
        model: a `LanguageModel`.
        capacity: the maximum number of tokens per sequence.
    """

    is_compileable = False

    def __init__(self, model: Any, capacity: int) -> None:
        self._model = model
        self._capacity = capacity
        self._decoding: Decoding | None = None
        self._calls: list[tuple[Any, Any]] = []
        self._mask: Tensor | None = None
        super().__init__(config=model.config)

    @property
    def layers(self) -> list[Any]:
        if self._decoding is not None:
            self._leave_kernel()
        return self._layers

    @layers.setter
    def layers(self, layers: list[Any]) -> None:
        self._layers = layers

    def __getstate__(self) -> dict[str, Any]:
        self._leave_kernel()
        return self.__dict__

    def get_seq_length(self, layer_idx: int = 0) -> int:
        if self._decoding is None:
            return super().get_seq_length(layer_idx)
        return sum(ids.size(1) for ids, _ in self._calls)

    @torch.no_grad()
    def _leave_kernel(self) -> None:
        model, decoding = self._model, self._decoding
        self._model = self._decoding = None
        if decoding is not None:
            ids, positions = (torch.cat(each, 1) for each in zip(*self._calls, strict=True))
            model(
                input_ids=ids,
                attention_mask=self._mask,
                position_ids=positions,
                cache=self,
                logits_to_keep=1,
            )

    def extend(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: Any = 0,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Tensor | None:
        """The logits [B, 1, V] after these tokens [B, S]; None if the model must compute them.

        Arguments are those of the model's `forward`.
        """
        if self._model is None:
            return None
        one_row = logits_to_keep == 1 if isinstance(logits_to_keep, int) else False
        tokens = None
        if (
            input_ids is not None
            and position_ids is not None
            and (one_row or input_ids.size(1) == 1)
            and not any(value is not None and value is not False for value in others.values())
            and not torch.is_grad_enabled()
        ):
            tokens = self._unpadded(input_ids, attention_mask, position_ids)
        if tokens is not None and self._decoding is None:
            self._decoding = self._start(tokens)
        if tokens is None or self._decoding is None:
            self._leave_kernel()
            return None
        self._calls.append((input_ids, position_ids))
        self._mask = attention_mask
        return self._decoding.extend(tokens)[:, None].clone()

    def _unpadded(
        self, ids: Tensor, mask: Tensor | None, positions: Tensor
    ) -> list[list[int]] | None:
        """The next tokens of each sequence; None unless their positions count up from 0, as far as
        there is memory, and padding is on the left."""
        B, S = ids.shape
        positions = positions.expand(B, S)
        if mask is None or (mask.ndim == 2 and bool(mask[:, -S:].all())):
            rows, places = ids.tolist(), positions.tolist()
        elif mask.ndim == 2 and bool(mask[:, -1].all()) and not has_gaps(mask == 1):
            real = mask[:, -S:] == 1
            rows = [row[seen].tolist() for row, seen in zip(ids, real, strict=True)]
            places = [row[seen].tolist() for row, seen in zip(positions, real, strict=True)]
        else:
            return None
        lengths = self._decoding.lengths if self._decoding else [0] * B
        for length, row, place in zip(lengths, rows, places, strict=True):
            end = length + len(row)
            if end > self._capacity or place != list(range(length, end)):
                return None
        return rows

    def _start(self, tokens: list[list[int]]) -> Decoding | None:
        """An empty `Decoding`; None if the kernel cannot take the model, or gains nothing."""
        longest = max(map(len, tokens))
        if not longest + FEWEST_NEW_TOKENS <= self._capacity <= LONGEST_SEQUENCE:
            return None
        try:
            decoder = self._model.decoder(self._capacity)
        except CannotFuse:
            return None
        packed = packed_once(self._model, decoder, PRECISIONS[product_precision()])
        return Decoding(packed, len(tokens), self._capacity)
