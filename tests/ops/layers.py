"""Records of layers of every architecture, with random tensors."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.ops.decoder import (
    Decoder,
    Dropout,
    Embedding,
    Layer,
    Linear,
    Mlp,
    MultiHeadAttention,
    Norm,
    Rope,
)
from fastllm.ops.embedding import embedding
from fastllm.ops.mlp import mlp
from fastllm.ops.multi_head_attention import multi_head_attention
from fastllm.ops.norm import norm

# At a kink, rounding decides which slope a gradient has; tests/ops/test_mlp.py covers the others.
SMOOTH = ("gelu", "gelu_tanh", "silu", "relu_squared")


class Maker:
    """Random numbers from a seed, and records made of them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def tensor(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def linear(self, outputs: int, inputs: int, bias: bool) -> Linear:
        weight = self.tensor(outputs, inputs) / inputs**0.5
        return Linear(weight, self.tensor(outputs) if bias else None)

    def norm(self, width: int, kind: str, weight: bool = True, offset: float = 0.0) -> Norm:
        bias = self.tensor(width) if kind == "layer" and weight else None
        return Norm(self.tensor(width) if weight else None, bias, 1e-5, kind, offset)

    def rope(self, S: int, R: int, interleaved: bool = False) -> Rope:
        angles = torch.arange(S)[:, None] / 7 ** (torch.arange(R // 2) / R)
        return Rope(torch.cat((angles.cos(), angles.sin()), -1), interleaved)

    def any_norm(self, width: int) -> Norm:
        kind = self.random.choice(("layer", "rms"))
        return self.norm(width, kind, self.random.random() < 0.8, self.random.choice((0.0, 1.0)))

    def maybe(self, value: Any, otherwise: Any = None) -> Any:
        return value if self.random.random() < 0.5 else otherwise

    def around(self, H: int, parallel: bool) -> dict[str, Any]:
        """Norms and residual connection; a parallel layer is Pre-LN."""
        norm, out_norm = self.any_norm(H), self.any_norm(H)
        first = parallel or self.random.random() < 0.7
        return {
            "norm": norm,
            "norm_first": first,
            "out_norm": self.maybe(out_norm),
            "residual_scale": self.maybe(0.7, 1.0),
        }

    def attention(self, S: int, H: int, parallel: bool = False, p: float = 0.0) -> Any:
        K, shared, D = (self.random.choice(c) for c in ((1, 2), (1, 2, 3), (5, 8, 17, 32)))
        N = K * shared
        bias = self.maybe(True, False)
        separate = tuple(self.linear(heads * D, H, bias) for heads in (N, K, K))
        packed = self.linear((N + 2 * K) * D, H, bias)
        size = self.random.randint(1, D // 2) * 2
        causal = self.random.random() < 0.8
        return MultiHeadAttention(
            qkv=self.maybe(separate, packed),
            out=self.linear(H, N * D, self.maybe(True, False)),
            heads=N,
            kv_heads=K,
            causal=causal,
            rope=self.maybe(self.rope(S, size, self.maybe(True, False))),
            # a layer norm of a few elements has little but rounding errors in its gradient
            q_norm=self.maybe(self.norm(D, "rms", self.maybe(True, False))),
            k_norm=self.maybe(self.norm(D, "rms", offset=self.maybe(1.0, 0.0))),
            window=self.maybe(self.random.randint(1, S + 3)) if causal else None,
            scale=self.maybe(0.3),
            softcap=self.maybe(2.0),
            weights_dropout=Dropout(p, 3),
            out_dropout=Dropout(p, 5),
            **self.around(H, parallel),
        )

    def mlp(self, H: int, parallel: bool = False, p: float = 0.0) -> Mlp:
        I, bias = self.random.choice((33, 41, 64)), self.maybe(True, False)
        return Mlp(
            self.linear(I, H, bias),
            self.linear(H, I, bias),
            self.random.choice(SMOOTH),
            hidden_dropout=Dropout(p, 7),
            out_dropout=Dropout(p, 9),
            up=self.maybe(self.linear(I, H, bias)),
            **self.around(H, parallel),
        )

    def decoder(self, S: int, H: int, V: int, p: float = 0.0) -> Decoder:
        """Up to three layers, each with settings of its own."""
        layers = []
        for _ in range(self.random.randint(1, 3)):
            parallel = self.maybe(True, False)
            layers.append(
                Layer(self.attention(S, H, parallel, p), self.mlp(H, parallel, p), parallel)
            )
        embedding = Embedding(
            self.tensor(V, H), self.maybe(self.tensor(S, H)), self.maybe(1.0, 3.0),
            dropout=Dropout(p, 11),
        )  # fmt: skip
        head = self.linear(V, H, self.maybe(True, False))
        return Decoder(embedding, layers, self.maybe(self.any_norm(H)), head, S, self.maybe(4.0))


def logits(ids: Tensor, decoder: Decoder) -> Tensor:
    """The decoder's logits [B, S, V] by its single operations."""
    return capped(F.linear(hidden_states(ids, decoder), *decoder.head), decoder.softcap)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def hidden_states(ids: Tensor, decoder: Decoder) -> Tensor:
    S, positions = ids.size(1), decoder.embedding.positions
    if positions is not None:
        positions = positions[:S]
    x = embedding(ids, decoder.embedding._replace(positions=positions))
    for attention, layer_mlp, parallel in decoder.layers:
        middle = multi_head_attention(x, attention)
        x = mlp(x, layer_mlp, middle) if parallel else mlp(middle, layer_mlp)
    return norm(x, decoder.norm) if decoder.norm else x


def tensors_of(record: Any) -> list[Tensor]:
    return [tensor for tensor in record.parameters() if tensor is not None]


def with_tensors(record: Any, tensors: Sequence[Tensor]) -> Any:
    """The record with these in place of `tensors_of`."""
    given: Iterator[Tensor] = iter(tensors)
    replaced = [None if tensor is None else next(given) for tensor in record.parameters()]
    return record.with_parameters(iter(replaced))


def problem(
    operation: Callable[..., Tensor], record: Any, *inputs: Tensor
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The operation as a function of its inputs and the record's tensors, and these tensors."""

    def run(*tensors: Tensor) -> Tensor:
        first, rest = tensors[: len(inputs)], tensors[len(inputs) :]
        x, *others = first
        return operation(x, with_tensors(record, rest), *others)

    return run, [*inputs, *tensors_of(record)]
