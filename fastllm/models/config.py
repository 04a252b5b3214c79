"""The configuration of a decoder model, from which its modules and records follow."""

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fastllm.command import describe_error

Size = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Base = Annotated[float, Field(gt=1, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]
NormName = Literal["layer", "rms"]
NormOrder = Literal["pre", "post", "sandwich", "output", "parallel"]
PosEncoding = Literal["sinusoidal", "learned", "rope", "none"]
MlpName = Literal[
    "gelu", "gelu_tanh", "relu", "silu", "relu_squared",
    "swiglu", "geglu", "geglu_tanh", "reglu",
]  # fmt: skip

MoreActivations = Literal["swish", "leaky_relu"]

# The activations of gated MLPs (Shazeer 2020).
GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:  # whose own text takes several lines and a link
            raise ValueError(describe_error(error)) from None


class RopeScaling(_Record):
    """How rotary positions reach beyond the length of pretraining.

    The names are those of Hugging Face's `rope_scaling`. linear divides all angles by the factor,
    ntk raises the base instead, and yarn (Peng et al. 2023) and llama3 slow only those rotations
    that make few turns in `original_max_position_embeddings`, which they need.
    """

    rope_type: Literal["linear", "ntk", "yarn", "llama3"]
    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    original_max_position_embeddings: Size | None = None
    low_freq_factor: Positive = 1.0
    """llama3: rotations with fewer turns in the original length are slowed by the factor."""
    high_freq_factor: Positive = 4.0
    """llama3: rotations with more turns stay as they are."""
    beta_fast: Positive = 32.0
    """yarn: rotations with more turns in the original length stay as they are."""
    beta_slow: Positive = 1.0
    """yarn: rotations with fewer turns are slowed by the factor."""
    attention_factor: Positive | None = None
    """yarn: factor of the rotated queries and keys; 0.1 ln(factor) + 1 by default."""

    @model_validator(mode="after")
    def _check_together(self) -> "RopeScaling":
        if self.rope_type in ("yarn", "llama3") and not self.original_max_position_embeddings:
            raise ValueError(f"{self.rope_type} needs original_max_position_embeddings")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError("low_freq_factor must be less than high_freq_factor")
        if self.beta_slow >= self.beta_fast:
            raise ValueError("beta_slow must be less than beta_fast")
        return self


class DecoderConfig(_Record):
    """Everything that makes a `DecoderModel`, checked when the record is made.

    Sizes given as 0 are replaced by their defaults.

    Raises:
        ValueError: a value or a combination is impossible; the message says why.
    """

    # Sizes
    vocab_size: Size
    """V."""
    hidden_size: Size
    """H."""
    num_layers: Annotated[int, Field(ge=0)]
    """L."""
    num_heads: Size
    """N."""
    num_kv_heads: Annotated[int, Field(ge=0)] = 0
    """K, a divisor of N: heads of keys and values, which N / K heads of queries share; by default
    N."""
    head_dim: Annotated[int, Field(ge=0)] = 0
    """D; by default H / N."""
    max_seq_len: Size = 512
    """The longest sequence, in tokens."""
    mlp_intermediate_size: Annotated[int, Field(ge=0)] = 0
    """I; by default 4 H, and for a gated MLP 8 / 3 H, which has as many parameters, rounded up to a
    multiple of 64."""

    # Norms
    norm: NormName = "layer"
    """Layer norms or RMS norms."""
    norm_eps: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-5
    norm_weight: bool = True
    """Norms have a weight."""
    norm_bias: bool = True
    """Layer norms have a bias."""
    norm_offset: float = 0.0
    """Added to the weight of an RMS norm; with 1, its weight starts at 0 (Gemma)."""
    norm_order: NormOrder = "pre"
    """pre: `x + f(norm(x))`. post: `norm(x + f(x))`, without a final norm. sandwich: `x +
    norm(f(norm(x)))`. output: `x + norm(f(x))`. parallel: `x + attention(norm1(x)) +
    mlp(norm2(x))`."""
    residual_scale: float = 1.0
    """Factor of what each sublayer adds to x."""

    # MLP
    mlp: MlpName | MoreActivations | Callable[..., Any] = "gelu"
    """An activation, or a gated MLP: swiglu (with silu), geglu (gelu), geglu_tanh (gelu_tanh) or
    reglu (relu). A module of your own is an activation."""
    mlp_bias: bool = True

    # Positions
    pos_encoding: PosEncoding = "sinusoidal"
    rope_base: Base = 10000.0
    rope_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Rotated part of each head, from its first element on."""
    rope_interleaved: bool = False
    """Rotate elements 2 i and 2 i + 1, as GPT-J does, rather than i and i + R / 2."""
    rope_scaling: RopeScaling | None = None

    # Attention
    causal: bool = True
    """Every position sees only itself and earlier ones."""
    qkv_bias: bool = True
    out_bias: bool | None = None
    """Of the attention's output; by default as `qkv_bias`."""
    separate_qkv: bool = False
    """Three projections for queries, keys and values rather than one."""
    qk_norm: Literal["weight", "no_weight", "all_heads"] | None = None
    """An RMS norm of each head of the queries and keys, before the rotation; or one, with a weight,
    of all heads together."""
    window: Size | None = None
    """A query sees this many keys at most, its own included."""
    window_pattern: Annotated[tuple[bool, ...], Field(min_length=1)] = (True,)
    """Which layers have the window, repeated over all layers. Gemma 3 has five with it and one
    without."""
    local_rope_base: Base | None = None
    """The base of layers with a window, which then have no `rope_scaling`."""
    attn_scale: Positive | None = None
    """Factor of the scores; by default 1 / sqrt(D)."""
    attn_softcap: Positive | None = None
    """Scores become `softcap * tanh(scores / softcap)`."""

    # Embedding and head
    embedding_scale: float = 1.0
    """Factor of the token embeddings."""
    padding_idx: int | None = None
    """A token that is embedded as zero and ignored as a target."""
    tie_word_embeddings: bool = False
    """The head's weight is the embedding's parameter."""
    lm_head_bias: bool = True
    head_softcap: Positive | None = None
    """Logits become `softcap * tanh(logits / softcap)`."""

    # Dropout
    embedding_dropout_p: Probability = 0.0
    attn_dropout_p: Probability = 0.0
    """Of the attention's weights and of its output."""
    mlp_dropout_p: Probability = 0.0
    """Of the MLP's activations."""

    @field_validator("mlp", mode="before")
    @classmethod
    def _check_mlp(cls, value: Any) -> Any:
        names = get_args(MlpName) + get_args(MoreActivations)
        if value not in names and not callable(value):
            raise ValueError(f"choose from {', '.join(names)}, or pass a torch.nn.Module")
        return value

    @model_validator(mode="after")
    def _fill_in_and_check(self) -> "DecoderConfig":
        H, N, K = self.hidden_size, self.num_heads, self.num_kv_heads or self.num_heads
        if N % K:
            raise ValueError(f"num_kv_heads ({K}) must divide num_heads ({N})")
        if not self.head_dim and H % N:
            raise ValueError(
                f"hidden_size ({H}) must be divisible by num_heads ({N}) unless head_dim is given"
            )
        I = self.mlp_intermediate_size or (-(-8 * H // 192) * 64 if self.gated else 4 * H)
        D = self.head_dim or H // N
        for name, size in (("num_kv_heads", K), ("head_dim", D), ("mlp_intermediate_size", I)):
            object.__setattr__(self, name, size)
        for problem, exists in self._problems().items():
            if exists:
                raise ValueError(problem)
        return self

    def _problems(self) -> dict[str, bool]:
        rope, V, R = self.pos_encoding == "rope", self.vocab_size, self.rotary_size
        padding = self.padding_idx
        return {
            "norm_offset needs norm rms with norm_weight": self.norm_offset != 0
            and (self.norm != "rms" or not self.norm_weight),
            "qk_norm all_heads has no norm_offset": self.qk_norm == "all_heads"
            and self.norm_offset != 0,
            f"padding_idx ({padding}) is outside the vocabulary of {V}": padding is not None
            and not -V <= padding < V,
            "a window needs a causal attention": self.window is not None and not self.causal,
            "local_rope_base needs pos_encoding rope and a window": self.local_rope_base is not None
            and (not rope or self.window is None),
            f"pos_encoding rope rotates pairs: rope_fraction ({self.rope_fraction}) of head_dim "
            f"({self.head_dim}) makes {R} elements, not an even number": rope
            and (R < 2 or R % 2 != 0),
            "rope_scaling needs pos_encoding rope": self.rope_scaling is not None and not rope,
            "rope_scaling ntk needs more than 2 rotated elements": R == 2
            and self.rope_scaling is not None
            and self.rope_scaling.rope_type == "ntk",
        }

    @property
    def gated(self) -> bool:
        """Whether the MLP is gated."""
        return self.mlp in GATED

    @property
    def activation(self) -> Any:
        """The MLP's activation: a name, or a module."""
        return GATED[self.mlp] if isinstance(self.mlp, str) and self.gated else self.mlp

    @property
    def rotary_size(self) -> int:
        """R, the number of rotated elements of each head."""
        return int(self.head_dim * self.rope_fraction)

    def window_of(self, layer: int) -> int | None:
        """The window of a layer, if any."""
        return self.window if self.window_pattern[layer % len(self.window_pattern)] else None

    def rotation_of(self, layer: int) -> "Rotation | None":
        """The rotary positions of a layer, if any."""
        if self.pos_encoding != "rope":
            return None
        if self.local_rope_base is not None and self.window_of(layer) is not None:
            return rotation(self.rotary_size, self.local_rope_base, None)
        return rotation(self.rotary_size, self.rope_base, self.rope_scaling)


# The R / 2 angles per position, in radians, and the factor of the rotated elements.
Rotation = tuple[tuple[float, ...], float]


def rotation(R: int, base: float, scaling: RopeScaling | None) -> Rotation:
    """The rotary positions of R elements; see `RopeScaling`."""
    if scaling is not None and scaling.rope_type == "ntk":
        base *= scaling.factor ** (R / (R - 2))
    angles = [base ** (-i / R) for i in range(0, R, 2)]
    if scaling is None or scaling.rope_type == "ntk":
        return tuple(angles), 1.0
    if scaling.rope_type == "linear":
        return tuple(angle / scaling.factor for angle in angles), 1.0
    original = scaling.original_max_position_embeddings or 0
    factor = 1.0
    if scaling.rope_type == "llama3":
        slow, fast = scaling.low_freq_factor, scaling.high_freq_factor
        turns = [original * angle / (2 * math.pi) for angle in angles]
        kept = [(each - slow) / (fast - slow) for each in turns]
    else:
        # The pair that turns this many times in the original length.
        low, high = (
            R * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))
            for turns in (scaling.beta_fast, scaling.beta_slow)
        )
        first, last = max(math.floor(low), 0), min(math.ceil(high), R - 1)
        kept = [1 - (i - first) / (last - first or 0.001) for i in range(R // 2)]
        factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1
    kept = [min(max(each, 0.0), 1.0) for each in kept]
    mixed = (a * k + a / scaling.factor * (1 - k) for a, k in zip(angles, kept, strict=True))
    return tuple(mixed), factor
