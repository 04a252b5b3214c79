"""The records that describe a decoder, from a norm up to the whole model.

A layer is data: csrc/kernels.h, its bindings and this file define the same records with the same
field names. Modules make them and operations take them. Only `to_kernel` hands addresses to the
kernels, which trust every size: `why_not_sizes` must have returned None before.

`parameters` lists a record's tensors, and `with_parameters` replaces them, in the same order, by
others such as gradients or copies.
"""

from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor

from fastllm.ops import extension
from fastllm.ops.memory import address

# In the order of `Activation` in csrc/kernels.h.
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "leaky_relu", "relu_squared")


# In the order of `NormKind` in csrc/kernels.h.
NORM_KINDS = (None, "layer", "rms")


class Norm(NamedTuple):
    """A layer norm, or an RMS norm, which does not subtract the mean.

    Attributes:
        weight, bias: [H], or None for factors of 1 and nothing added.
        kind: `layer` or `rms`.
        offset: added to the weight; some models learn the difference from 1.
    """

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    kind: str = "layer"
    offset: float = 0.0

    def fits(self, H: int) -> bool:
        return all(vector is None or vector.shape == (H,) for vector in self[:2])

    def settings(self) -> tuple[Any, ...]:
        """All of the record except the parameters."""
        return self[2:]

    def to_kernel(self) -> Any:
        weight, bias, *settings = self
        return _kernel_norm(address(weight), address(bias), *settings)


class Linear(NamedTuple):
    """A linear layer; weight [outputs, inputs], bias [outputs] or None.

    The weight may be a transposed view, since some libraries keep theirs as [inputs, outputs].
    """

    weight: Tensor
    bias: Tensor | None

    def fits(self, outputs: int, inputs: int) -> bool:
        weight, bias = self
        return weight.shape == (outputs, inputs) and (bias is None or bias.shape == (outputs,))

    def to_kernel(self) -> Any:
        weight, bias = self
        return _kernel_linear(weight.data_ptr(), address(bias), not weight.is_contiguous())


class Dropout(NamedTuple):
    """Dropout with probability `p`; the seed selects the mask, see `fastllm.ops.dropout`."""

    p: float = 0.0
    seed: int = 0

    def with_seed(self, seeds: Iterator[int]) -> "Dropout":
        """A copy with the next seed, if dropout is active."""
        return Dropout(self.p, next(seeds)) if self.p else self

    def to_kernel(self) -> Any:
        p, seed = self
        return extension.kernels.Dropout(p=p, seed=seed) if p else _kernel_no_dropout()


NO_DROPOUT = Dropout()


class Rope(NamedTuple):
    """Rotary positions (Su et al. 2021): pairs of a head's elements are rotated by angles.

    Attributes:
        table: fp32 [S, R], R at most D: the cosines of a position's R/2 angles, then their sines,
            both times a factor if there is one. A head's elements from R on stay as they are.
        interleaved: pairs are elements 2 i and 2 i + 1, as in GPT-J, rather than i and i + R/2.
    """

    table: Tensor
    interleaved: bool = False

    def to_kernel(self) -> Any:
        R = self.table.size(1)
        return extension.kernels.Rope(
            table=self.table.data_ptr(), size=R, interleaved=self.interleaved
        )


class Embedding(NamedTuple):
    """Token embeddings [V, H] times `scale`, plus the positions [S, H] of these tokens, if any.

    The row `padding_idx` gets no gradient.
    """

    weight: Tensor
    positions: Tensor | None = None
    scale: float = 1.0
    padding_idx: int | None = None
    dropout: Dropout = NO_DROPOUT

    @property
    def row_without_grad(self) -> int:
        """`padding_idx` as the kernels take it: -1 for none."""
        return -1 if self.padding_idx is None else self.padding_idx

    def parameters(self) -> list[Tensor | None]:
        return [self.weight, self.positions]

    def with_parameters(self, tensors: Iterator[Any]) -> "Embedding":
        return self._replace(weight=next(tensors), positions=next(tensors))

    def with_seeds(self, seeds: Iterator[int]) -> "Embedding":
        return self._replace(dropout=self.dropout.with_seed(seeds))

    def to_kernel(self, B: int, S: int, ids: Tensor | None) -> Any:
        """Args: ids: [B, S], int64; None for a kernel that receives them separately."""
        V, H = self.weight.shape
        return extension.kernels.Embedding(
            B=B,
            S=S,
            H=H,
            V=V,
            ids=address(ids),
            weight=self.weight.data_ptr(),
            positions=address(self.positions),
            scale=self.scale,
            dropout=self.dropout.to_kernel(),
        )


class MultiHeadAttention(NamedTuple):
    """Self-attention over `heads` heads: [norm ->] qkv -> attention -> out -> dropout.

    N heads of queries share K heads of keys and values, N / K each in turn (Ainslie et al. 2023).

    Attributes:
        qkv: weight [(N + 2 K) D, H], its rows ordered q, k, v, each by head; or three layers.
        out: weight [H, N D].
        norm: of the input, or of the sum; it brings the residual connection.
        norm_first: `x + f(norm(x))` rather than `norm(x + f(x))`.
        causal: hide the positions after the query's own.
        mask: boolean, broadcastable to [B, N, S, S]; **True means masked**. Combined with `causal`
            by "or".
        starts: for sequences packed into one x [rows, H]: the row where each begins, and the number
            of rows; excludes a mask.
        weights_dropout, out_dropout: on the attention weights and on the result.
        kv_heads: K, a divisor of N; N unless given.
        rope: the positions of queries and keys.
        q_norm, k_norm: of every head of the queries and keys [D], before `rope`.
        window: with `causal`, each query sees this many keys at most, its own included.
        scale: of the scores; 1 / sqrt(D) unless given.
        softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2).
        out_norm: of the sublayer's output, before dropout; it, too, brings the residual connection.
        residual_scale: factor of what is added to x.
    """

    qkv: "Linear | tuple[Linear, Linear, Linear]"
    out: Linear
    heads: int
    norm: Norm | None = None
    norm_first: bool = True
    causal: bool = False
    mask: Tensor | None = None
    starts: tuple[int, ...] | None = None
    weights_dropout: Dropout = NO_DROPOUT
    out_dropout: Dropout = NO_DROPOUT
    kv_heads: int | None = None
    rope: Rope | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None
    out_norm: Norm | None = None
    residual_scale: float = 1.0

    @property
    def projections(self) -> tuple[Linear, ...]:
        """The layers that make q, k and v: one or three."""
        return (self.qkv,) if isinstance(self.qkv, Linear) else self.qkv

    @property
    def kv_heads_or_heads(self) -> int:
        """K."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_dim(self) -> int:
        """D."""
        return self.out.weight.size(1) // self.heads

    @property
    def widths(self) -> tuple[int, int, int]:
        """The widths of all queries, keys and values of a position: N D, K D and K D."""
        keys = self.kv_heads_or_heads * self.head_dim
        return self.heads * self.head_dim, keys, keys

    def with_seeds(self, seeds: Iterator[int]) -> "MultiHeadAttention":
        return self._replace(
            weights_dropout=self.weights_dropout.with_seed(seeds),
            out_dropout=self.out_dropout.with_seed(seeds),
        )

    def sizes(self, x: Tensor) -> tuple[int, int]:
        """B and S of x [B, S, H]; of packed sequences, S is the length of the longest."""
        if self.starts is None:
            return x.size(0), x.size(1)
        return len(self.starts) - 1, max(end - begin for begin, end in pairwise(self.starts))

    def why_not_sizes(self, S: int, H: int) -> str | None:
        """For sequences of at most S positions."""
        N, K, D = self.heads, self.kv_heads_or_heads, self.head_dim
        if N < 1 or K < 1 or N % K:
            return f"{N} heads cannot share {K} heads of keys and values"
        if self.out.weight.size(1) % N:
            return f"out's width {self.out.weight.size(1)} is not divisible by the {N} heads"
        if not self.out.fits(H, N * D):
            return _misfit("out", self.out, H, N * D)
        widths = self.widths
        names = ("qkv",) if isinstance(self.qkv, Linear) else ("q", "k", "v")
        outputs = (sum(widths),) if isinstance(self.qkv, Linear) else widths
        for name, linear, width in zip(names, self.projections, outputs, strict=True):
            if not linear.fits(width, H):
                return _misfit(name, linear, width, H)
        if any(norm and not norm.fits(H) for norm in (self.norm, self.out_norm)):
            return f"the attention's norm does not have the width {H}"
        if any(norm and not norm.fits(D) for norm in (self.q_norm, self.k_norm)):
            return f"the norm of queries or keys does not have the width {D}"
        if self.window is not None and (self.window < 1 or not self.causal):
            return "a window must be positive, and the attention causal"
        if self.rope is not None:
            rows, R = self.rope.table.shape
            if rows < S or R > D or R % 2:
                return f"the rotary table is {[rows, R]} for {S} positions and heads of {D}"
        return None

    def parameters(self) -> list[Tensor | None]:
        linears = [tensor for linear in (*self.projections, self.out) for tensor in linear]
        norms = self.norm, self.q_norm, self.k_norm, self.out_norm
        return linears + [tensor for norm in norms for tensor in _weight_and_bias(norm)]

    def with_parameters(self, tensors: Iterator[Any]) -> "MultiHeadAttention":
        linears = [_next_linear(tensors) for _ in self.projections]
        return self._replace(
            qkv=linears[0] if len(linears) == 1 else (linears[0], linears[1], linears[2]),
            out=_next_linear(tensors),
            norm=_next_norm(self.norm, tensors),
            q_norm=_next_norm(self.q_norm, tensors),
            k_norm=_next_norm(self.k_norm, tensors),
            out_norm=_next_norm(self.out_norm, tensors),
        )

    def settings(self) -> tuple[Any, ...]:
        """All of the record except parameters, dropout and batch data."""
        norms = self.norm, self.q_norm, self.k_norm, self.out_norm
        rope = self.rope and (self.rope.table.data_ptr(), *self.rope.table.shape, self.rope[1:])
        return (
            self.heads, self.kv_heads, self.norm_first, self.causal, rope, self.window, self.scale,
            self.softcap, self.residual_scale, *(norm and norm.settings() for norm in norms),
            *(linear.weight.shape for linear in self.projections),
        )  # fmt: skip

    def to_kernel(self, B: int, S: int, starts: Tensor | None, precision: int) -> Any:
        """Args: starts: `self.starts` as int64 [B + 1] in memory, or None."""
        N, D = self.heads, self.head_dim
        return extension.kernels.MultiHeadAttention(
            B=B,
            S=S,
            H=self.out.weight.size(0),
            N=N,
            K=self.kv_heads_or_heads,
            D=D,
            starts=address(starts),
            norm=self.norm and self.norm.to_kernel(),
            norm_first=self.norm_first,
            qkv=[linear.to_kernel() for linear in self.projections],
            out=self.out.to_kernel(),
            q_norm=self.q_norm and self.q_norm.to_kernel(),
            k_norm=self.k_norm and self.k_norm.to_kernel(),
            rope=self.rope and self.rope.to_kernel(),
            mask=mask_to_kernel(self.mask, B, N, S, S),
            causal=self.causal,
            window=self.window or 0,
            scale=D**-0.5 if self.scale is None else self.scale,
            softcap=self.softcap or 0.0,
            weights_dropout=self.weights_dropout.to_kernel(),
            out_dropout=self.out_dropout.to_kernel(),
            out_norm=self.out_norm and self.out_norm.to_kernel(),
            residual_scale=self.residual_scale,
            precision=precision,
        )

    def to_kernel_grad(self) -> Any:
        """The kernels' record of gradients, for a record whose tensors are gradients."""
        return extension.kernels.MultiHeadAttentionGrad(
            norm=self.norm and _norm_grad(self.norm),
            qkv=[_linear_grad(linear) for linear in self.projections],
            out=_linear_grad(self.out),
            q_norm=self.q_norm and _norm_grad(self.q_norm),
            k_norm=self.k_norm and _norm_grad(self.k_norm),
            out_norm=self.out_norm and _norm_grad(self.out_norm),
        )


class Mlp(NamedTuple):
    """A feed-forward network: [norm ->] fc1 -> activation -> dropout -> fc2 -> dropout.

    Attributes:
        fc1, fc2: weights [I, H] and [H, I].
        activation: one of `ACTIVATIONS`: `gelu` (exact), `gelu_tanh`, `relu`, `silu`,
            `leaky_relu` (slope 0.01) or `relu_squared`.
        norm: it brings the residual connection.
        norm_first: `x + f(norm(x))` rather than `norm(x + f(x))`.
        hidden_dropout, out_dropout: on the activations and on the result.
        up: weight [I, H]; a gated MLP multiplies the activation by `up` of the same input. SwiGLU
            has `silu`, GeGLU `gelu` or `gelu_tanh`, ReGLU `relu` (Shazeer 2020).
        out_norm, residual_scale: as for the attention.
    """

    fc1: Linear
    fc2: Linear
    activation: str = "gelu"
    norm: Norm | None = None
    norm_first: bool = True
    hidden_dropout: Dropout = NO_DROPOUT
    out_dropout: Dropout = NO_DROPOUT
    up: Linear | None = None
    out_norm: Norm | None = None
    residual_scale: float = 1.0

    def with_seeds(self, seeds: Iterator[int]) -> "Mlp":
        return self._replace(
            hidden_dropout=self.hidden_dropout.with_seed(seeds),
            out_dropout=self.out_dropout.with_seed(seeds),
        )

    def why_not_sizes(self, H: int) -> str | None:
        I = self.fc1.weight.size(0)
        if not self.fc1.fits(I, H):
            return _misfit("fc1", self.fc1, I, H)
        if not self.fc2.fits(H, I):
            return _misfit("fc2", self.fc2, H, I)
        if self.up and not self.up.fits(I, H):
            return _misfit("up", self.up, I, H)
        if any(norm and not norm.fits(H) for norm in (self.norm, self.out_norm)):
            return f"the MLP's norm does not have the width {H}"
        return None

    def parameters(self) -> list[Tensor | None]:
        norms = *_weight_and_bias(self.norm), *_weight_and_bias(self.out_norm)
        return [*self.fc1, *self.fc2, *(self.up or ()), *norms]

    def with_parameters(self, tensors: Iterator[Any]) -> "Mlp":
        return self._replace(
            fc1=_next_linear(tensors),
            fc2=_next_linear(tensors),
            up=self.up and _next_linear(tensors),
            norm=_next_norm(self.norm, tensors),
            out_norm=_next_norm(self.out_norm, tensors),
        )

    def settings(self) -> tuple[Any, ...]:
        """All of the record except parameters and dropout."""
        norms = self.norm and self.norm.settings(), self.out_norm and self.out_norm.settings()
        return (
            self.fc1.weight.shape, self.activation, self.norm_first, self.residual_scale, *norms
        )  # fmt: skip

    def to_kernel(self, rows: int, precision: int) -> Any:
        I, H = self.fc1.weight.shape
        return extension.kernels.Mlp(
            rows=rows,
            H=H,
            I=I,
            norm=self.norm and self.norm.to_kernel(),
            norm_first=self.norm_first,
            fc1=self.fc1.to_kernel(),
            fc2=self.fc2.to_kernel(),
            up=self.up and self.up.to_kernel(),
            activation=ACTIVATIONS.index(self.activation),
            hidden_dropout=self.hidden_dropout.to_kernel(),
            out_dropout=self.out_dropout.to_kernel(),
            out_norm=self.out_norm and self.out_norm.to_kernel(),
            residual_scale=self.residual_scale,
            precision=precision,
        )

    def to_kernel_grad(self) -> Any:
        """The kernels' record of gradients, for a record whose tensors are gradients."""
        return extension.kernels.MlpGrad(
            norm=self.norm and _norm_grad(self.norm),
            fc1=_linear_grad(self.fc1),
            fc2=_linear_grad(self.fc2),
            up=self.up and _linear_grad(self.up),
            out_norm=self.out_norm and _norm_grad(self.out_norm),
        )


class Layer(NamedTuple):
    """A transformer layer; both sublayers have a norm, and so a residual connection.

    Attributes:
        parallel: `x + attention(x) + mlp(x)`, as in GPT-NeoX: the MLP has the same input as the
            attention rather than its output.
    """

    attention: MultiHeadAttention
    mlp: Mlp
    parallel: bool = False


class Decoder(NamedTuple):
    """A decoder model: embedding, layers, final norm (None if Post-LN) and head [V, H].

    Attributes:
        length: positions that the embedding's and the rotary tables have.
        softcap: the logits become `softcap * tanh(logits / softcap)`.
    """

    embedding: Embedding
    layers: Sequence[Layer]
    norm: Norm | None
    head: Linear
    length: int
    softcap: float | None = None

    def why_not_sizes(self) -> str | None:
        H = self.embedding.weight.size(1)
        for attention, mlp, _ in self.layers:
            if reason := attention.why_not_sizes(self.length, H) or mlp.why_not_sizes(H):
                return reason
        positions = self.embedding.positions
        if positions is not None and positions.shape != (self.length, H):
            return f"the positions are {list(positions.shape)}, not {[self.length, H]}"
        if self.norm and not self.norm.fits(H):
            return f"the final norm does not have the width {H}"
        V = self.head.weight.size(0)
        return None if self.head.fits(V, H) else _misfit("the head", self.head, V, H)

    def dropouts(self) -> list[Dropout]:
        """Every dropout, in the order of the computation, in which the modules draw their seeds."""
        dropouts = [self.embedding.dropout]
        for attention, mlp, _ in self.layers:
            dropouts += [attention.weights_dropout, attention.out_dropout]
            dropouts += [mlp.hidden_dropout, mlp.out_dropout]
        return dropouts

    def parameters(self) -> list[Tensor | None]:
        tensors: list[Tensor | None] = [*self.embedding.parameters()]
        for attention, mlp, _ in self.layers:
            tensors += attention.parameters() + mlp.parameters()
        return [*tensors, *_weight_and_bias(self.norm), *self.head]

    def to_kernel(self) -> Any:
        """For any batch of sequences of `length` tokens."""
        V, H = self.head.weight.shape
        return extension.kernels.Decoder(
            embedding=self.embedding.to_kernel(0, self.length, None),
            layers=[
                extension.kernels.Layer(
                    attention=attention._replace(mask=None).to_kernel(0, 0, None, 0),
                    mlp=mlp.to_kernel(0, 0),
                    parallel=parallel,
                )
                for attention, mlp, parallel in self.layers
            ],
            norm=self.norm and self.norm.to_kernel(),
            head=extension.kernels.LinearCrossEntropy(
                rows=0,
                H=H,
                V=V,
                targets=0,
                ignore_index=0,
                head=self.head.to_kernel(),
                softcap=self.softcap or 0.0,
                precision=0,
            ),
            padding_idx=self.embedding.row_without_grad,
        )

    def settings(self) -> tuple[Any, ...]:
        """All of the record except the parameters' addresses and contents, and batch data."""
        layers = [(a.settings(), m.settings(), parallel) for a, m, parallel in self.layers]
        norm = self.norm and self.norm.settings()
        tables = self.embedding.weight.shape, self.head.weight.shape
        scale, padding_idx = self.embedding.scale, self.embedding.padding_idx
        return (*tables, scale, padding_idx, norm, self.length, self.softcap, *layers)

    def to_kernel_once(self, addresses: Sequence[int]) -> Any:
        """As `to_kernel`, but cached for parameters at these addresses.

        A model's parameters rarely move, and building its records takes several microseconds per
        layer.
        """
        key = (*addresses, *self.settings())
        kernel = _kernel_decoders.get(key)
        if kernel is None:
            if len(_kernel_decoders) >= MOST_KERNEL_DECODERS:
                _kernel_decoders.clear()
            kernel = _kernel_decoders[key] = self.to_kernel()
        return kernel


MOST_KERNEL_DECODERS = 64
_kernel_decoders: dict[tuple[Any, ...], Any] = {}


def mask_to_kernel(mask: Tensor | None, *sizes: int) -> Any:
    """A boolean mask broadcast to `sizes` [B, N, S, T]; None for None."""
    if mask is None:
        return None
    return extension.kernels.Mask(data=mask.data_ptr(), strides=mask.expand(*sizes).stride())


def _misfit(name: str, linear: Linear, outputs: int, inputs: int) -> str:
    bias = "none" if linear.bias is None else list(linear.bias.shape)
    return (
        f"{name} has a weight {list(linear.weight.shape)} and bias {bias}; the kernels need "
        f"{[outputs, inputs]} and {[outputs]}"
    )


# A model's records contain the same addresses at every step; building one takes half a microsecond.


@lru_cache(maxsize=2048)
def _kernel_norm(weight: int, bias: int, eps: float, kind: str, offset: float) -> Any:
    return extension.kernels.Norm(
        kind=NORM_KINDS.index(kind), weight=weight, bias=bias, eps=eps, offset=offset
    )


@lru_cache(maxsize=2048)
def _kernel_linear(weight: int, bias: int, transposed: bool) -> Any:
    return extension.kernels.Linear(weight=weight, bias=bias, transposed=transposed)


@cache
def _kernel_no_dropout() -> Any:
    return extension.kernels.Dropout(p=0.0, seed=0)


def _norm_grad(grad: Norm) -> Any:
    return extension.kernels.NormGrad(weight=address(grad.weight), bias=address(grad.bias))


def _linear_grad(grad: Linear) -> Any:
    return extension.kernels.LinearGrad(weight=address(grad.weight), bias=address(grad.bias))


def _weight_and_bias(norm: Norm | None) -> tuple[Tensor | None, Tensor | None]:
    return norm[:2] if norm else (None, None)


# A gradient may be None although the fields' types do not allow it.


def _next_linear(tensors: Iterator[Any]) -> Linear:
    return Linear(next(tensors), next(tensors))


def _next_norm(norm: Norm | None, tensors: Iterator[Any]) -> Norm | None:
    weight, bias = next(tensors), next(tensors)
    return norm and norm._replace(weight=weight, bias=bias)
