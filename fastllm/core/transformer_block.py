"""One layer of a transformer."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from fastllm.core.attn.mha import KeyValueCache, MultiHeadAttention
from fastllm.core.fusible import FORWARDS, all_are, is_plain
from fastllm.core.mlp import MLP
from fastllm.ops.decoder import Layer
from fastllm.ops.dropout import fresh_seeds
from fastllm.ops.mlp import mlp
from fastllm.ops.multi_head_attention import multi_head_attention
from fastllm.ops.torch_private import submodules


class TransformerBlock(nn.Module):
    """Self-attention and MLP, each with a norm and a residual connection.

    Args:
        hidden_size: H.
        num_heads: N.
        mlp_intermediate_size: I; 4 H unless given.
        attn_dropout_p: see `MultiHeadAttention`.
        mlp_dropout_p, mlp_activation: see `MLP`.
        norm_eps: of all norms.
        norm_first: Pre-LN, `x + f(norm(x))`, rather than Post-LN, `norm(x + f(x))`.
        is_causal: hide later positions unless `forward` says otherwise.
        qkv_bias: biases in the attention's projections.
        mlp_bias: biases in the MLP.
        gated: see `MLP`.
        norm_type: builds every norm from `(hidden_size, eps=, device=, dtype=)`.
        out_norms: norms of the sublayers' outputs too, before they are added (Gemma 2).
        in_norms: norms of the sublayers' inputs; without, only `out_norms` (OLMo 2).
        parallel: `x + attention(norm1(x)) + mlp(norm2(x))`, as in GPT-NeoX.
        residual_scale: factor of what each sublayer adds to x.
        attention: further arguments of `MultiHeadAttention`, such as `num_kv_heads` and `softcap`.

    Raises:
        ValueError: Post-LN with parallel sublayers, sublayers without a norm, or a setting that a
            part refuses.
    """

    norm1: nn.Module | None
    norm2: nn.Module | None

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
        gated: bool = False,
        norm_type: Callable[..., nn.Module] = nn.LayerNorm,
        out_norms: bool = False,
        parallel: bool = False,
        residual_scale: float = 1.0,
        in_norms: bool = True,
        **attention: Any,
    ) -> None:
        super().__init__()
        if parallel and not norm_first:
            raise ValueError("parallel sublayers need norm_first: their norms are of the input")
        if not in_norms and (parallel or not norm_first or not out_norms):
            raise ValueError("without in_norms, sublayers need out_norms, and to be in series")
        self.hidden_size = hidden_size
        self.norm_first = norm_first
        self.parallel = parallel
        self.residual_scale = residual_scale
        make_norm = partial(norm_type, eps=norm_eps, device=device, dtype=dtype)
        make_out_norm = make_norm if out_norms else None
        self.register_module("norm1", make_norm(hidden_size) if in_norms else None)
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
            out_norm=make_out_norm,
            **attention,
        )
        self.register_module("norm2", make_norm(hidden_size) if in_norms else None)
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
            gated=gated,
            out_norm=make_out_norm,
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
            if self.parallel:
                return mlp(hidden_states, layer.mlp.with_seeds(seeds), x)
            return mlp(x, layer.mlp.with_seeds(seeds))
        # A module that replaces ours need not know about caches.
        extra = {} if cache is None else {"cache": cache}
        attend = partial(self.self_attn, attn_mask=attn_mask, is_causal=is_causal, **extra)
        norm1, norm2 = self.norm1 or nn.Identity(), self.norm2 or nn.Identity()
        x = hidden_states
        if not self.norm_first:
            x = norm1(x + self._scaled(attend(x)))
            return norm2(x + self._scaled(self.mlp(x)))
        x = x + self._scaled(attend(norm1(x)))
        mlp_input = hidden_states if self.parallel else x
        return x + self._scaled(self.mlp(norm2(mlp_input)))

    def _scaled(self, out: Tensor) -> Tensor:
        """What a sublayer with this output adds to x."""
        return out if self.residual_scale == 1 else out * self.residual_scale

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
        attention_record = attention.record(norm1, self.norm_first, attn_mask, is_causal)
        mlp_record = mlp.record(norm2, self.norm_first)
        if attention_record is None or mlp_record is None:
            return None
        if (scale := self.residual_scale) != 1:
            attention_record = attention_record._replace(residual_scale=scale)
            mlp_record = mlp_record._replace(residual_scale=scale)
        return Layer(attention_record, mlp_record, self.parallel)


FORWARDS[TransformerBlock] = TransformerBlock.forward
