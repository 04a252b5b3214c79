"""A decoder in stock PyTorch, which fastllm is compared with."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastllm.benchmarking.shapes import StepShape

Attention = Literal["explicit", "sdpa"]


class StockBlock(nn.Module):
    """A Pre-LN layer with one product for q, k and v."""

    hidden: Tensor

    def __init__(self, shape: StepShape, attention: Attention) -> None:
        super().__init__()
        H, S = shape.H, shape.S
        self.num_heads, self.p, self.attention = shape.N, shape.dropout, attention
        self.norm1 = nn.LayerNorm(H)
        self.qkv = nn.Linear(H, 3 * H)
        self.out = nn.Linear(H, H)
        self.norm2 = nn.LayerNorm(H)
        self.fc1 = nn.Linear(H, 4 * H)
        self.fc2 = nn.Linear(4 * H, H)
        self.register_buffer("hidden", torch.ones(S, S, dtype=torch.bool).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        """One layer over `x` [B, S, H]."""
        B, S, H = x.shape
        p = self.p if self.training else 0.0
        qkv = self.qkv(self.norm1(x)).view(B, S, 3, self.num_heads, H // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, N, S, D]
        if self.attention == "sdpa":
            heads = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
            weights = scores.masked_fill(self.hidden, -math.inf).softmax(-1)
            heads = F.dropout(weights, p) @ v
        x = x + F.dropout(self.out(heads.transpose(1, 2).reshape(B, S, H)), p)
        return x + self.fc2(F.dropout(F.gelu(self.fc1(self.norm2(x))), p))


class StockDecoder(nn.Module):
    """The work of `DecoderModel.loss` in PyTorch, as one would write it without fastllm.

    Args:
        attention: `explicit` masks and normalises the scores step by step; `sdpa` calls PyTorch's
            fused attention.
        chunked: compute head and loss by PyTorch's `linear_cross_entropy`.
    """

    positions: Tensor

    def __init__(self, shape: StepShape, attention: Attention, chunked: bool = False) -> None:
        super().__init__()
        self.chunked = chunked
        H, V = shape.H, shape.V
        self.scale, self.dropout = math.sqrt(H), nn.Dropout(shape.dropout)
        self.embedding = nn.Embedding(V, H)
        angles = torch.arange(shape.S)[:, None] / 10000 ** (torch.arange(0, H, 2) / H)
        self.register_buffer("positions", torch.stack([angles.sin(), angles.cos()], -1).flatten(1))
        self.blocks = nn.Sequential(*(StockBlock(shape, attention) for _ in range(shape.L)))
        self.norm = nn.LayerNorm(H)
        self.head = nn.Linear(H, V)

    def forward(self, ids: Tensor) -> Tensor:
        """Mean cross-entropy of the next token, for `ids` [B, S]."""
        x = self.dropout(self.embedding(ids) * self.scale + self.positions)
        x, targets = self.norm(self.blocks(x)), ids[:, 1:].flatten()
        if self.chunked:
            return F.linear_cross_entropy(
                x[:, :-1].flatten(0, 1),
                self.head.weight,
                targets,
                linear_bias=self.head.bias,
                options=nn.LinearCrossEntropyOptions(),
            )
        return F.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), targets)
