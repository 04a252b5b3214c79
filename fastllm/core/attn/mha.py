"""Multi-head self-attention as a module."""

from typing import Any

from torch import Tensor, nn

from fastllm.core.dropout import Dropout
from fastllm.core.fusible import FORWARDS, all_are, is_plain, plain_norm
from fastllm.ops import decoder as records
from fastllm.ops.attention import attention
from fastllm.ops.dropout import draw_seed, fresh_seeds
from fastllm.ops.multi_head_attention import multi_head_attention
from fastllm.ops.torch_private import submodules, weight_and_bias


class KeyValueCache:
    """The keys and values of the positions so far, for one attention layer.

    Memory for `max_seq_len` positions is allocated on first use, so that a generation step writes
    one position and copies nothing.
    """

    def __init__(self, max_seq_len: int) -> None:
        self.max_seq_len = max_seq_len
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends k and v [B, N, S, D] of new positions; returns all of them, [B, N, T, D].

        Raises:
            ValueError: they do not fit into `max_seq_len` positions.
        """
        B, N, S, D = k.shape
        start, end = self.length, self.length + S
        if end > self.max_seq_len:
            raise ValueError(
                f"Sequence length {end} exceeds maximum sequence length {self.max_seq_len}"
            )
        if self._keys is None or self._values is None:
            self._keys = k.new_empty(B, N, self.max_seq_len, D)
            self._values = v.new_empty(B, N, self.max_seq_len, D)
        self._keys[:, :, start:end] = k
        self._values[:, :, start:end] = v
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]


class MultiHeadAttention(nn.Module):
    """Self-attention over N heads, optionally with its layer norm and residual connection.

    Args:
        hidden_size: H, a multiple of `num_heads`.
        num_heads: N.
        p: dropout probability, of the attention weights and of the output.
        bias: biases in both projections.
        eps: the layer norm's epsilon.
        norm_first: normalise the input (Pre-LN) rather than the sum (Post-LN).
        is_causal: hide later positions unless `forward` says otherwise.
        include_norm_residual: include the layer norm and the residual connection.

    Raises:
        ValueError: `hidden_size` is not a multiple of `num_heads`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 8,
        p: float = 0.1,
        bias: bool = False,
        eps: float = 1e-5,
        norm_first: bool = True,
        is_causal: bool = False,
        include_norm_residual: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(
                f"hidden_size ({hidden_size}) must be divisible by num_heads ({num_heads})"
            )
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.p = p
        self.norm_first = norm_first
        self.is_causal = is_causal
        self.include_norm_residual = include_norm_residual

        self.norm = (
            nn.LayerNorm(hidden_size, eps=eps, device=device, dtype=dtype)
            if include_norm_residual
            else None
        )
        self.qkv_proj = nn.Linear(
            hidden_size, 3 * hidden_size, bias=bias, device=device, dtype=dtype
        )
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=bias, device=device, dtype=dtype)
        self.dropout = Dropout(p)
        for projection in (self.qkv_proj, self.out_proj):
            nn.init.xavier_uniform_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    def forward(
        self,
        hidden_states: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Attends from every position of `hidden_states` [B, S, H]; returns [B, S, H].

        Args:
            attn_mask: boolean, broadcastable to [B, N, S, S] ([B, N, S, T] with a cache, where T
                counts cached and new positions); **True means masked**.
            is_causal: overrides the constructor's setting.
            cache: the earlier positions; the new ones are appended.
        """
        norm = None if self.norm is None else plain_norm(self.norm, self.hidden_size)
        if cache is None and (self.norm is None or norm is not None):
            record = self.record(norm, self.norm_first, attn_mask, is_causal)
            if record is not None:
                return multi_head_attention(hidden_states, record.with_seeds(fresh_seeds()))
        B, S, H = hidden_states.shape
        x = hidden_states
        if self.norm is not None and self.norm_first:
            x = self.norm(x)

        qkv = self.qkv_proj(x).view(B, S, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, N, S, D]
        if cache is not None:
            k, v = cache.append(k, v)
        causal = self.is_causal if is_causal is None else is_causal
        heads = attention(q, k, v, attn_mask, causal, *self._draw())
        out = self.dropout(self.out_proj(heads.transpose(1, 2).reshape(B, S, H)))

        if self.norm is None:
            return out
        out = hidden_states + out
        return out if self.norm_first else self.norm(out)

    def record(
        self,
        norm: records.Norm | None,
        norm_first: bool,
        attn_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> records.MultiHeadAttention | None:
        """Parameters and settings for the operation, seeds not drawn yet; None if the modules must
        run.

        Args:
            norm: the layer norm to include, if any.
        """
        qkv, out, dropout = submodules(self, "qkv_proj", "out_proj", "dropout")
        if not all_are(nn.Linear, qkv, out) or not is_plain(qkv, out, dropout):
            return None
        return records.MultiHeadAttention(
            records.Linear(*weight_and_bias(qkv)),
            records.Linear(*weight_and_bias(out)),
            self.num_heads,
            norm,
            norm_first,
            self.is_causal if is_causal is None else is_causal,
            attn_mask,
            weights_dropout=records.Dropout(self.p if self.training else 0.0),
            out_dropout=records.Dropout(dropout.active_p()),
        )

    def _draw(self) -> tuple[float, int]:
        p = self.p if self.training else 0.0
        return p, draw_seed() if p else 0


FORWARDS[MultiHeadAttention] = MultiHeadAttention.forward
