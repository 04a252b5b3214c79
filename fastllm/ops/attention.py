"""Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1) over heads."""

import math

import torch
from torch import Tensor

from fastllm.ops import dispatch
from fastllm.ops.dropout import dropout


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    seed: int,
) -> Tensor:
    S, T = q.size(-2), k.size(-2)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
    masked = attn_mask
    if is_causal:
        # Aligned at the end: with a cache, the S queries are the last of T positions.
        ahead = torch.ones(S, T, dtype=torch.bool, device=q.device).triu(T - S + 1)
        masked = ahead if masked is None else masked | ahead
    if masked is None:
        weights = scores.softmax(-1)
    else:
        weights = scores.masked_fill(masked, -math.inf).softmax(-1)
        # The softmax of a row with nothing left is 0 / 0; such a row attends to nothing.
        weights = weights.masked_fill(masked.all(-1, keepdim=True), 0)
    return dropout(weights, dropout_p, seed) @ v


IMPLEMENTATIONS: list[dispatch.Implementation] = [dispatch.Implementation("ref", attention_ref)]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """`softmax(q k^T / sqrt(D)) v` with masks and dropout on the weights.

    Args:
        q: [B, N, S, D].
        k, v: [B, N, T, D]; the S queries are the last S of the T positions.
        attn_mask: boolean, broadcastable to [B, N, S, T]; **True means masked**, the opposite of
            `torch.nn.functional.scaled_dot_product_attention`. Combined with causality by "or".
        is_causal: hide the positions after the query's own.
        dropout_p: probability of dropping a weight.
        seed: names the dropout mask; see `dropout`.

    Returns:
        [B, N, S, D]; zeros where a query may attend to nothing.

    Raises:
        TypeError: the mask is not boolean.
    """
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        raise TypeError(
            f"attn_mask must be boolean, True where masked, got {attn_mask.dtype}; "
            "turn an additive mask into one with `mask < 0`"
        )
    arguments = (q, k, v, attn_mask, is_causal, dropout_p, seed)
    return dispatch.choose("attention", IMPLEMENTATIONS).run(*arguments)
