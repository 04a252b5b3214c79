"""Attention and dropout of any model, by transformers' attention interface."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from fastllm.core.dropout import Dropout
from fastllm.integrations.huggingface.fusible import (
    FEWEST_ROWS,
    are_ignorable,
    forwards_of,
    why_not_kernels,
)
from fastllm.integrations.huggingface.padding import attention_mask
from fastllm.ops.attention import attention
from fastllm.ops.dropout import draw_seed

ATTENTION = "fastllm"
"""The name of our attention, as transformers' `attn_implementation`."""


class FusedDropout(Dropout):
    """`nn.Dropout` by the kernel, if it can run."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return input
        if why_not_kernels(input) is not None:
            return nn.Dropout.forward(self, input)
        return super().forward(input)


DROPOUT_FORWARDS = forwards_of(nn.Dropout, FusedDropout)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """For transformers' `AttentionInterface`: q [B, N, S, D], k and v [B, K, T, D] to [B, S, N, D].

    Calls that the kernel does not support go to transformers' "sdpa", which takes the same masks;
    those with a softcap, which "sdpa" lacks, to the operation's reference.
    """
    S = query.size(2)
    few = query.size(0) * S < FEWEST_ROWS and not torch.is_grad_enabled()
    if softcap is None and (S == 1 or few):
        # PyTorch's kernel takes less time, for a token of generation without transformers' checks.
        if S == 1 and attention_mask is None and "position_bias" not in kwargs:
            shared = query.size(1) != key.size(1)
            out = F.scaled_dot_product_attention(
                query, key, value, dropout_p=dropout, scale=scaling, enable_gqa=shared
            )
            return out.transpose(1, 2), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    is_causal = is_causal and attention_mask is None and S > 1
    q, k, v = query, key, value
    if torch.is_autocast_enabled("cpu"):
        q, k, v = q.float(), k.float(), v.float()
    mask_is_added = attention_mask is not None and attention_mask.dtype is not torch.bool
    if softcap is not None and mask_is_added:
        return eager_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, softcap
        )
    if softcap is None and (
        why_not_kernels(q, k, v) is not None
        or mask_is_added
        or (is_causal and k.size(2) != S)  # transformers aligns them at the beginning
        or k.size(-1) != v.size(-1)
        or not are_ignorable(kwargs)
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    hidden = None if attention_mask is None else ~attention_mask
    seed = draw_seed() if dropout else 0
    out = attention(q, k, v, hidden, is_causal, dropout, seed, scale=scaling, softcap=softcap)
    return out.transpose(1, 2), None


AttentionInterface.register(ATTENTION, attention_forward)
AttentionMaskInterface.register(ATTENTION, attention_mask)
