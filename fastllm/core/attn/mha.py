"""Multi-head self-attention as a module."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.core.dropout import Dropout
from fastllm.core.fusible import FORWARDS, all_are, is_plain, plain_norms, sublayer_norms
from fastllm.core.rotary import RotaryEncoding
from fastllm.ops import decoder as records
from fastllm.ops.attention import attention
from fastllm.ops.dropout import draw_seed, fresh_seeds
from fastllm.ops.multi_head_attention import multi_head_attention
from fastllm.ops.torch_private import submodules, weight_and_bias


class KeyValueCache:
    """The keys and values of the positions so far, for one attention layer.

    Memory for `max_seq_len` positions is allocated on first use, so that a generation step writes
    one position and copies nothing. With a window, only the positions in view are kept.
    """

    def __init__(self, max_seq_len: int) -> None:
        self.max_seq_len = max_seq_len
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, k: Tensor, v: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
        """Appends k and v [B, K, S, D] of new positions; returns all of them, [B, K, T, D].

        Args:
            window: keys that a query sees, the same at every call; T is then `window - 1 + S` at
                most.

        Raises:
            ValueError: they do not fit into `max_seq_len` positions.
        """
        B, K, S, D = k.shape
        start, end = self.length, self.length + S
        if end > self.max_seq_len:
            raise ValueError(
                f"Sequence length {end} exceeds maximum sequence length {self.max_seq_len}"
            )
        if window is not None:
            self.length = end
            if self._keys is not None and self._values is not None:
                k, v = torch.cat((self._keys, k), 2), torch.cat((self._values, v), 2)
            first = max(k.size(2) - window + 1, 0)
            self._keys, self._values = k[:, :, first:].clone(), v[:, :, first:].clone()
            return k, v
        if self._keys is None or self._values is None:
            self._keys = k.new_empty(B, K, self.max_seq_len, D)
            self._values = v.new_empty(B, K, self.max_seq_len, D)
        self._keys[:, :, start:end] = k
        self._values[:, :, start:end] = v
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]


class MultiHeadAttention(nn.Module):
    """Self-attention over N heads, optionally with its layer norm and residual connection.

    Args:
        hidden_size: H, a multiple of `num_heads` unless `head_dim` is given.
        num_heads: N.
        p: dropout probability, of the attention weights and of the output.
        bias: biases in all projections.
        eps: the layer norm's epsilon.
        norm_first: normalise the input (Pre-LN) rather than the sum (Post-LN).
        is_causal: hide later positions unless `forward` says otherwise.
        include_norm_residual: include the layer norm and the residual connection.
        num_kv_heads: K, a divisor of N: heads of keys and values, each for N / K heads of queries
            (Ainslie et al. 2023); N unless given.
        head_dim: D; H / N unless given.
        separate_qkv: three projections, `q_proj`, `k_proj` and `v_proj`, rather than `qkv_proj`.
        out_bias: a bias in `out_proj`; as `bias` unless given.
        rotary: rotates queries and keys; several attentions may share it.
        qk_norm: builds the norm of each head of the queries, and that of the keys, from D.
        window: with `is_causal`, each query sees this many keys at most, its own included.
        scale: factor of the scores; 1 / sqrt(D) unless given.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        out_norm: builds a norm of the output from H, applied before dropout and residual.
        qk_norm_of_all_heads: `qk_norm` builds one norm of all heads together, from N D and K D.

    Raises:
        ValueError: `hidden_size` is not a multiple of `num_heads`, or `num_heads` not of
            `num_kv_heads`.
    """

    rotary: RotaryEncoding | None
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    out_norm: nn.Module | None

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
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        separate_qkv: bool = False,
        out_bias: bool | None = None,
        rotary: RotaryEncoding | None = None,
        qk_norm: Callable[[int], nn.Module] | None = None,
        window: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        out_norm: Callable[[int], nn.Module] | None = None,
        qk_norm_of_all_heads: bool = False,
    ) -> None:
        super().__init__()
        if num_heads < 1 or (head_dim is None and hidden_size % num_heads):
            raise ValueError(
                f"hidden_size ({hidden_size}) must be divisible by num_heads ({num_heads})"
            )
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if self.num_kv_heads < 1 or num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads ({self.num_kv_heads}) must divide num_heads ({num_heads})"
            )
        self.head_dim = head_dim or hidden_size // num_heads
        self.p = p
        self.norm_first = norm_first
        self.is_causal = is_causal
        self.include_norm_residual = include_norm_residual
        self.window = window
        self.scale = scale
        self.softcap = softcap

        self.norm = (
            nn.LayerNorm(hidden_size, eps=eps, device=device, dtype=dtype)
            if include_norm_residual
            else None
        )
        linear = partial(nn.Linear, device=device, dtype=dtype)
        D, N, K = self.head_dim, num_heads, self.num_kv_heads
        if separate_qkv:
            self.q_proj = linear(hidden_size, N * D, bias=bias)
            self.k_proj = linear(hidden_size, K * D, bias=bias)
            self.v_proj = linear(hidden_size, K * D, bias=bias)
        else:
            self.qkv_proj = linear(hidden_size, (N + 2 * K) * D, bias=bias)
        self.out_proj = linear(N * D, hidden_size, bias=bias if out_bias is None else out_bias)
        self.register_module("out_norm", None if out_norm is None else out_norm(hidden_size))
        self.dropout = Dropout(p)
        self.register_module("rotary", rotary)
        widths = (N * D, K * D) if qk_norm_of_all_heads else (D, D)
        for name, width in zip(("q_norm", "k_norm"), widths, strict=True):
            self.register_module(name, None if qk_norm is None else qk_norm(width))
        self._projections = ("q_proj", "k_proj", "v_proj") if separate_qkv else ("qkv_proj",)
        for projection in submodules(self, *self._projections, "out_proj"):
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
                counts earlier and new positions); **True means masked**.
            is_causal: overrides the constructor's setting.
            cache: the earlier positions; the new ones are appended.
        """
        if cache is None:
            record = self.record(
                self.norm, self.norm_first, attn_mask, is_causal, self.norm is not None
            )
            if record is not None:
                return multi_head_attention(hidden_states, record.with_seeds(fresh_seeds()))
        B, S, _ = hidden_states.shape
        x = hidden_states
        if self.norm is not None and self.norm_first:
            x = self.norm(x)

        outputs = [projection(x) for projection in submodules(self, *self._projections)]
        qkv = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        N, K = self.num_heads, self.num_kv_heads
        heads = qkv.view(B, S, N + 2 * K, self.head_dim).transpose(1, 2)
        q, k, v = heads.split((N, K, K), 1)  # [B, N, S, D] and twice [B, K, S, D]
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.k_norm is not None:
            k = self.k_norm(k)
        if self.rotary is not None:
            offset = 0 if cache is None else cache.length
            q, k = self.rotary(q, offset), self.rotary(k, offset)
        if cache is not None:
            k, v = cache.append(k, v, self.window)
            if attn_mask is not None and attn_mask.ndim and attn_mask.size(-1) > k.size(2):
                attn_mask = attn_mask[..., -k.size(2) :]
        causal = self.is_causal if is_causal is None else is_causal
        p, seed = self._draw()
        heads = attention(
            q, k, v, attn_mask, causal, p, seed, self.window, self.scale, self.softcap
        )
        out = self.out_proj(heads.transpose(1, 2).flatten(2))
        if self.out_norm is not None:
            out = self.out_norm(out)
        out = self.dropout(out)

        if self.norm is None:
            return out
        out = hidden_states + out
        return out if self.norm_first else self.norm(out)

    def record(
        self,
        norm: nn.Module | None,
        norm_first: bool,
        attn_mask: Tensor | None = None,
        is_causal: bool | None = None,
        residual: bool = True,
    ) -> records.MultiHeadAttention | None:
        """Parameters and settings for the operation, seeds not drawn yet; None if the modules must
        run.

        Args:
            norm: the norm to include, if any.
            residual: include the residual connection.
        """
        *projections, out = submodules(self, *self._projections, "out_proj")
        dropout, rotary = submodules(self, "dropout", "rotary")
        q_norm, k_norm, out_norm = submodules(self, "q_norm", "k_norm", "out_norm")
        if not all_are(nn.Linear, *projections, out) or not is_plain(*projections, out, dropout):
            return None
        if rotary is not None and (not all_are(RotaryEncoding, rotary) or not is_plain(rotary)):
            return None
        norms = sublayer_norms(norm, out_norm, self.hidden_size, residual)
        head_norms = plain_norms((q_norm, self.head_dim), (k_norm, self.head_dim))
        if norms is None or head_norms is None:
            return None
        linears = [records.Linear(*weight_and_bias(each)) for each in projections]
        return records.MultiHeadAttention(
            linears[0] if len(linears) == 1 else (linears[0], linears[1], linears[2]),
            records.Linear(*weight_and_bias(out)),
            self.num_heads,
            norms[0],
            norm_first,
            self.is_causal if is_causal is None else is_causal,
            attn_mask,
            weights_dropout=records.Dropout(self.p if self.training else 0.0),
            out_dropout=records.Dropout(dropout.active_p()),
            kv_heads=self.num_kv_heads,
            rope=None if rotary is None else rotary.record(),
            q_norm=head_norms[0],
            k_norm=head_norms[1],
            window=self.window,
            scale=self.scale,
            softcap=self.softcap,
            out_norm=norms[1],
        )

    def _draw(self) -> tuple[float, int]:
        p = self.p if self.training else 0.0
        return p, draw_seed() if p else 0


FORWARDS[MultiHeadAttention] = MultiHeadAttention.forward
