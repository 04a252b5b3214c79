"""One layer of a transformer."""

from typing import Any

from torch import Tensor, nn

from fastllm.core.attn.mha import KeyValueCache, MultiHeadAttention
from fastllm.core.fusible import FORWARDS, all_are, is_plain, plain_norm
from fastllm.core.mlp import MLP
from fastllm.ops.decoder import Layer
from fastllm.ops.dropout import fresh_seeds
from fastllm.ops.mlp import mlp
from fastllm.ops.multi_head_attention import multi_head_attention
from fastllm.ops.torch_private import submodules


class TransformerBlock(nn.Module):
    """Self-attention and MLP, each with a layer norm and a residual connection.

    Args:
        hidden_size: H.
        num_heads: N.
        mlp_intermediate_size: I; 4 H unless given.
        attn_dropout_p: see `MultiHeadAttention`.
        mlp_dropout_p, mlp_activation: see `MLP`.
        norm_eps: of both layer norms.
        norm_first: Pre-LN, `x + f(norm(x))`, rather than Post-LN, `norm(x + f(x))`.
        is_causal: hide later positions unless `forward` says otherwise.
        qkv_bias: biases in the attention's projections.
        mlp_bias: biases in the MLP.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_intermediate_size: int | None = None,
        attn_dropout_p: float = 0.1,
        mlp_dropout_p: float = 0.1,
        mlp_activation: str | nn.Module = "gelu",
        norm_eps: float = 1e-5,
        norm_first: bool = True,
        is_causal: bool = False,
        qkv_bias: bool = True,
        mlp_bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.norm_first = norm_first
        self.norm1 = nn.LayerNorm(hidden_size, eps=norm_eps, device=device, dtype=dtype)
        self.self_attn = MultiHeadAttention(
            hidden_size,
            num_heads,
            p=attn_dropout_p,
            bias=qkv_bias,
            eps=norm_eps,
            norm_first=norm_first,
            is_causal=is_causal,
            include_norm_residual=False,
            device=device,
            dtype=dtype,
        )
        self.norm2 = nn.LayerNorm(hidden_size, eps=norm_eps, device=device, dtype=dtype)
        self.mlp = MLP(
            hidden_size,
            mlp_intermediate_size,
            activation=mlp_activation,
            dropout_p=mlp_dropout_p,
            norm_first=norm_first,
            norm_eps=norm_eps,
            bias=mlp_bias,
            include_norm_residual=False,
            device=device,
            dtype=dtype,
        )

    def forward(
        self,
        hidden_states: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Applies the layer to `hidden_states` [B, S, H]; arguments as for the attention."""
        if cache is None and (layer := self.record(attn_mask, is_causal)) is not None:
            seeds = fresh_seeds()
            x = multi_head_attention(hidden_states, layer.attention.with_seeds(seeds))
            return mlp(x, layer.mlp.with_seeds(seeds))
        # A module that replaces ours need not know about caches.
        extra = {} if cache is None else {"cache": cache}
        x = hidden_states
        if self.norm_first:
            x = x + self.self_attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal, **extra)
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.self_attn(x, attn_mask=attn_mask, is_causal=is_causal, **extra))
        return self.norm2(x + self.mlp(x))

    def record(
        self, attn_mask: Tensor | None = None, is_causal: bool | None = None
    ) -> Layer | None:
        """Parameters and settings for the operations, seeds not drawn yet; None if the modules must
        run."""
        norm1, attention, norm2, mlp = submodules(self, "norm1", "self_attn", "norm2", "mlp")
        if not all_are(MultiHeadAttention, attention) or not all_are(MLP, mlp):
            return None
        if not is_plain(attention, mlp) or attention.norm is not None or mlp.norm is not None:
            return None
        norms = plain_norm(norm1, self.hidden_size), plain_norm(norm2, self.hidden_size)
        if None in norms:
            return None
        attention_record = attention.record(norms[0], self.norm_first, attn_mask, is_causal)
        mlp_record = mlp.record(norms[1], self.norm_first)
        if attention_record is None or mlp_record is None:
            return None
        return Layer(attention_record, mlp_record)


FORWARDS[TransformerBlock] = TransformerBlock.forward
