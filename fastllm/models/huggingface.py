"""The decoder architectures of Hugging Face that `DecoderModel` computes.

Each is data that is read both ways: the keys of config.json for the fields of a `DecoderConfig`,
and the names of the tensors. Names and defaults of keys are those of transformers.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from fastllm.models import architectures
from fastllm.models.config import GATED, DecoderConfig, RopeScaling

Settings = Mapping[str, Any]
LARGEST_SIZE, MOST_LAYERS = 2**24, 2**10

# fastllm's activation for each name in transformers. The first three compute the same up to
# rounding. Files are written with the first name of an activation, or the architecture's own.
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


class Codec(NamedTuple):
    """A part of the configuration that is more than a key for a field.

    Attributes:
        read: fields from the content of config.json, completed by the architecture's defaults.
        write: the inverse, as far as there is one: `Architecture.write` checks the result.
    """

    read: Callable[[Settings], dict[str, Any]]
    write: Callable[[DecoderConfig], dict[str, Any]]


class Layout(NamedTuple):
    """How a tensor of theirs holds one or more of ours.

    Attributes:
        to_ours: from theirs.
        to_theirs: the inverse; it also makes the expected shape, from tensors on the meta device.
    """

    to_ours: Callable[[Tensor, DecoderConfig], list[Tensor]]
    to_theirs: Callable[[list[Tensor], DecoderConfig], Tensor]


def _heads_together(tensor: Tensor, config: DecoderConfig) -> list[Tensor]:
    """From rows ordered by head and then q, k, v, to q, k and v each by head."""
    return [tensor.unflatten(0, (config.num_heads, 3, -1)).transpose(0, 1).flatten(0, 2)]


def _heads_apart(tensors: list[Tensor], config: DecoderConfig) -> Tensor:
    return tensors[0].unflatten(0, (3, config.num_heads, -1)).transpose(0, 1).flatten(0, 2)


def _all_equal(tensors: list[Tensor], _: DecoderConfig) -> Tensor:
    first, *others = tensors
    if not first.is_meta and not all(torch.equal(first, other) for other in others):
        raise ValueError(
            "the two norms of a layer have become different, and this architecture has one"
        )
    return first


AS_IT_IS = Layout(lambda tensor, _: [tensor], lambda tensors, _: tensors[0])
# Linear layers that store weights as [inputs, outputs].
TRANSPOSED = Layout(lambda tensor, _: [tensor.mT], lambda tensors, _: tensors[0].mT)
# One linear layer for the gate and what it multiplies.
HALVES = Layout(lambda tensor, _: list(tensor.chunk(2)), lambda tensors, _: torch.cat(tensors))
# One linear layer for queries, keys and values, whose outputs are ordered by head.
BY_HEAD = Layout(_heads_together, _heads_apart)
# One norm for the attention and the MLP.
SHARED = Layout(
    lambda tensor, config: [tensor] * (2 if config.norm_order == "parallel" else 1), _all_equal
)


class Architecture(NamedTuple):
    """A `model_type` of transformers.

    Attributes:
        class_name: of the language model.
        prefix: of the names of all tensors but the head's; files of a model without its head lack
            it.
        build: makes the `DecoderConfig` from those fields that config.json determines.
        keys: the field for each key that stands for one.
        defaults: of transformers, for keys that a file may lack.
        tensors: their name for each name of ours; {i} is the layer, {kind} is weight and bias.
        codecs: for everything else in the configuration.
        fixed: the only value of a key that can be computed, and the reason.
        aliases: other names of keys.
        layouts: of tensors whose name contains this.
        parallel_tensors: names that replace those in `tensors` if the sublayers are parallel.
    """

    class_name: str
    prefix: str
    build: Callable[..., DecoderConfig]
    keys: dict[str, str]
    defaults: dict[str, Any]
    tensors: dict[str, str]
    codecs: tuple[Codec, ...] = ()
    fixed: Mapping[str, tuple[Any, str]] = {}
    aliases: Mapping[str, str] = {}
    layouts: Mapping[str, Layout] = {}
    parallel_tensors: Mapping[str, str] = {}

    def read(self, settings: Settings, padding_idx: int | None = None) -> DecoderConfig:
        """The configuration in the content of a config.json.

        Raises:
            ValueError: it is impossible or cannot be computed; the message begins with the key.
        """
        named = {self.aliases.get(key, key): value for key, value in settings.items()}
        for key, (only, reason) in self.fixed.items():
            if named.get(key, only) not in (only, None):
                refuse(key, f"must be {only}, because {reason}", named[key])
        if named.get("quantization_config"):
            refuse("quantization_config", "quantized weights are not supported; save them in bf16")
        named = {**self.defaults, **named}
        fields: dict[str, Any] = {}
        for key, field in self.keys.items():
            value, about = named.get(key), DecoderConfig.model_fields[field]
            if value is not None and about.annotation is int:
                check_size(key, value, MOST_LAYERS if field == "num_layers" else LARGEST_SIZE)
            if value is not None or about.default is None:
                fields[field] = value
            elif about.default != 0:  # 0 stands for a default that follows from other sizes
                refuse(key, "must not be null")
        H, N = fields["hidden_size"], fields["num_heads"]
        if H % N:
            width, heads = self.key_of("hidden_size"), self.key_of("num_heads")
            refuse(heads, f"{width} ({H}) must be divisible by {heads}", N)
        try:
            for codec in self.codecs:
                fields |= codec.read(named)
        except (TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"a value is of the wrong kind: {error}") from None
        try:
            return self.build(**fields, padding_idx=padding_idx)
        except ValueError as error:
            problem = str(error)
            for key, field in self.keys.items():
                problem = problem.replace(f"{field}: ", f"{key}: ")
            raise ValueError(problem) from None

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        """The content of config.json for a configuration, as far as this architecture has it."""
        settings = {key: getattr(config, field) for key, field in self.keys.items()}
        for codec in self.codecs:
            settings |= codec.write(config)
        return settings

    def tensors_of(self, config: DecoderConfig) -> dict[str, str]:
        """`tensors` for a model of this configuration, with {i} and {kind} filled in."""
        table = self.tensors
        if config.norm_order == "parallel":
            table = {**table, **self.parallel_tensors}
        return tensor_names(table, config.num_layers)

    def key_of(self, field: str) -> str:
        """The key that stands for a field."""
        return next(key for key, each in self.keys.items() if each == field)

    def layout_of(self, name: str) -> Layout:
        """The layout of a tensor of theirs."""
        found = (layout for part, layout in self.layouts.items() if part in name)
        return next(found, AS_IT_IS)


def tensor_names(table: Mapping[str, str], num_layers: int) -> dict[str, str]:
    """A table such as `Architecture.tensors` with {i} and {kind} filled in."""
    return {
        ours.format(i=i, kind=kind): theirs.format(i=i, kind=kind)
        for ours, theirs in table.items()
        for i in range(num_layers)
        for kind in ("weight", "bias")
    }


def refuse(key: str, problem: str, *given: Any) -> NoReturn:
    """Raises a `ValueError` about a key and the value that was given."""
    raise ValueError(f"{key}: {problem}" + "".join(f" (got {value!r})" for value in given))


def check_size(key: str, value: Any, limit: int = LARGEST_SIZE) -> None:
    """Refuses a value that is not a whole number from 1 to the limit."""
    if type(value) is not int:
        refuse(key, "must be a whole number", value)
    if not 1 <= value <= limit:
        refuse(key, f"must be from 1 to {limit}", value)


def activation(key: str, default: str, gated: bool = False) -> Codec:
    """The MLP's activation; in a gated MLP, that of the gate."""
    gates = {activation: mlp for mlp, activation in GATED.items()}

    def read(settings: Settings) -> dict[str, Any]:
        name = settings.get(key) or default
        if name not in ACTIVATIONS:
            refuse(key, f"fastllm supports {', '.join(ACTIVATIONS)}", name)
        return {"mlp": gates[ACTIVATIONS[name]] if gated else ACTIVATIONS[name]}

    def write(config: DecoderConfig) -> dict[str, Any]:
        names = [name for name, ours in ACTIVATIONS.items() if ours == config.activation]
        return {key: names[0] if names and default not in names else default}

    return Codec(read, write)


# What transformers keeps for each type of scaling.
SCALINGS = {
    "linear": ("factor",),
    "llama3": (
        "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor",
    ),
    "yarn": (
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor",
    ),
}  # fmt: skip


def rope(
    fraction: float | None = None,
    types: Collection[str] = SCALINGS,
    theta_key: str = "rope_theta",
    fraction_key: str = "partial_rotary_factor",
) -> Codec:
    """Rotary positions: `rope_parameters`, or `rope_theta` and `rope_scaling` in older files.

    Args:
        fraction: the default; without one, the architecture rotates whole heads.
        types: of scaling that the architecture has.
        theta_key, fraction_key: in files without `rope_parameters`.
    """

    def read(settings: Settings) -> dict[str, Any]:
        old = settings.get("rope_scaling")
        parameters = {**(old or settings.get("rope_parameters") or {})}
        base = parameters.pop("rope_theta", None) or settings.get(theta_key) or 1e4
        part = parameters.pop("partial_rotary_factor", None)
        part = part or settings.get(fraction_key) or fraction or 1.0
        if fraction is None and part != 1:
            refuse(fraction_key, "this architecture rotates whole heads", part)
        place = "rope_scaling" if old else "rope_parameters"
        scaling = read_scaling(place, parameters, types, settings)
        return {"rope_base": base, "rope_fraction": part, "rope_scaling": scaling}

    def write(config: DecoderConfig) -> dict[str, Any]:
        parameters = write_rope(config.rope_base, config.rope_scaling)
        if fraction is not None:
            parameters["partial_rotary_factor"] = config.rope_fraction
        return {"rope_parameters": parameters}

    return Codec(read, write)


def read_scaling(
    place: str, parameters: dict[str, Any], types: Collection[str], settings: Settings
) -> RopeScaling | None:
    """The scaling among rotary parameters.

    Args:
        place: the key of the parameters.
        parameters: without base and fraction.
        types: the known ones, besides `default`.
    """
    old_type = parameters.pop("type", "default")
    rope_type = parameters.pop("rope_type", old_type)
    if rope_type == "default":
        return None
    if rope_type not in types:
        known = ", ".join(("default", *types))
        refuse(f"{place}.rope_type", f"{rope_type} is not supported, only {known}")
    if rope_type != "linear":
        length = settings["max_position_embeddings"]
        parameters.setdefault("original_max_position_embeddings", length)
    if parameters.get("truncate") is True:  # as without it
        del parameters["truncate"]
    given = {key: value for key, value in parameters.items() if value is not None}
    for key in given:
        if key not in SCALINGS[rope_type]:
            refuse(f"{place}.{key}", f"is not supported for {rope_type}", given[key])
    try:
        return RopeScaling(rope_type=rope_type, **given)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def write_rope(base: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """The content of `rope_parameters`."""
    if scaling is None or scaling.rope_type not in SCALINGS:
        return {"rope_type": "default", "rope_theta": base}
    values = {key: getattr(scaling, key) for key in SCALINGS[scaling.rope_type]}
    given = {key: value for key, value in values.items() if value is not None}
    return {"rope_type": scaling.rope_type, "rope_theta": base, **given}


def gemma3_rope() -> Codec:
    """Rotary positions that differ between layers with a window and without."""

    def read(settings: Settings) -> dict[str, Any]:
        given = settings.get("rope_parameters") or {}
        if given and "full_attention" not in given:
            refuse("rope_parameters", "needs full_attention and sliding_attention", given)
        full, local = ({**given.get(f"{kind}_attention", {})} for kind in ("full", "sliding"))
        base = full.pop("rope_theta", None) or settings.get("rope_theta") or 1e6
        local_base = local.pop("rope_theta", None) or settings.get("rope_local_base_freq") or 1e4
        full |= settings.get("rope_scaling") or {}
        place = "rope_parameters"
        read_scaling(f"{place}.sliding_attention", local, (), settings)
        scaling = read_scaling(f"{place}.full_attention", full, SCALINGS, settings)
        return {"rope_base": base, "local_rope_base": local_base, "rope_scaling": scaling}

    def write(config: DecoderConfig) -> dict[str, Any]:
        local = write_rope(config.local_rope_base or config.rope_base, None)
        full = write_rope(config.rope_base, config.rope_scaling)
        return {"rope_parameters": {"full_attention": full, "sliding_attention": local}}

    return Codec(read, write)


def window_of_all_layers(default: int | None) -> Codec:
    """`sliding_window` in every layer."""

    def read(settings: Settings) -> dict[str, Any]:
        return {"window": settings.get("sliding_window", default)}

    return Codec(read, lambda config: {"sliding_window": config.window})


def window_by_layer(kinds: Callable[[Settings, int], bool], switch: str | None = None) -> Codec:
    """`sliding_window` in the layers that `layer_types` names.

    Args:
        kinds: whether a layer has the window, in files without `layer_types`.
        switch: the key that says whether any layer has it, if there is one.
    """
    window, full = "sliding_attention", "full_attention"

    def read(settings: Settings) -> dict[str, Any]:
        if switch and not settings.get(switch):
            return {"window": None}
        L, types = settings["num_hidden_layers"], settings.get("layer_types")
        if types is None:
            types = [window if kinds(settings, layer) else full for layer in range(L)]
        if len(types) != L or not {*types} <= {window, full}:
            refuse("layer_types", f"must be {full} or {window} for each of {L} layers", types)
        size, pattern = settings.get("sliding_window", 4096), tuple(t == window for t in types)
        if size is None and any(pattern):
            refuse("sliding_window", f"is required by layer_types, which has {window}")
        return {"window": size, "window_pattern": pattern}

    def write(config: DecoderConfig) -> dict[str, Any]:
        layers = range(config.num_layers)
        types = [full if config.window_of(layer) is None else window for layer in layers]
        # transformers asks for a size even if no layer has the window.
        settings = {"layer_types": types, "sliding_window": config.window or 4096}
        return {**settings, switch: window in types} if switch else settings

    return Codec(read, write)


def gpt_neo_window() -> Codec:
    """`window_size` in the layers that `attention_types` calls local."""

    def read(settings: Settings) -> dict[str, Any]:
        L = settings["num_layers"]
        kinds = [
            kind
            for pattern, repeats in settings.get("attention_types") or [(["global", "local"], 12)]
            for kind in pattern * repeats
        ]
        if len(kinds) != L or not {*kinds} <= {"global", "local"}:
            refuse("attention_types", f"must be global or local for each of {L} layers", kinds)
        pattern = tuple(kind == "local" for kind in kinds)
        return {"window": settings.get("window_size", 256), "window_pattern": pattern}

    def write(config: DecoderConfig) -> dict[str, Any]:
        layers = range(config.num_layers)
        kinds = ["global" if config.window_of(layer) is None else "local" for layer in layers]
        return {"attention_types": [[kinds, 1]], "window_size": config.window or 256}

    return Codec(read, write)


def parallel(default: bool) -> Codec:
    """`use_parallel_residual`."""

    def read(settings: Settings) -> dict[str, Any]:
        is_parallel = settings.get("use_parallel_residual", default)
        return {"norm_order": "parallel" if is_parallel else "pre"}

    return Codec(read, lambda c: {"use_parallel_residual": c.norm_order == "parallel"})


def query_scale() -> Codec:
    """`query_pre_attn_scalar`, whose root divides the scores."""

    def read(settings: Settings) -> dict[str, Any]:
        key = "query_pre_attn_scalar"
        check_size(key, scalar := settings.get(key, 256))
        return {"attn_scale": scalar**-0.5}

    def write(config: DecoderConfig) -> dict[str, Any]:
        scale = config.attn_scale
        return {"query_pre_attn_scalar": round(scale**-2) if scale else config.head_dim}

    return Codec(read, write)


def _tensors(outer: dict[str, str], block: str, inner: dict[str, str]) -> dict[str, str]:
    """The table of tensors from names of modules.

    Args:
        outer: their module for each of ours outside the blocks.
        block: their name of a block.
        inner: their module for each of ours in a block.
    """
    names = {
        **outer,
        **{f"transformer_blocks.{{i}}.{ours}": f"{block}.{inner[ours]}" for ours in inner},
    }
    return {f"{ours}.{{kind}}": f"{theirs}.{{kind}}" for ours, theirs in names.items()}


# What Llama and its descendants share.
_KEYS = {
    "vocab_size": "vocab_size", "hidden_size": "hidden_size",
    "intermediate_size": "mlp_intermediate_size", "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads", "max_position_embeddings": "max_seq_len",
    "tie_word_embeddings": "tie_word_embeddings", "attention_dropout": "attn_dropout_p",
}  # fmt: skip
_LLAMA_KEYS = {**_KEYS, "num_key_value_heads": "num_kv_heads", "rms_norm_eps": "norm_eps"}
_LLAMA_DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "attention_dropout": 0.0,
}  # fmt: skip
_BIAS_AND_HEAD_DIM = {"attention_bias": "qkv_bias", "head_dim": "head_dim"}
_LLAMA_OUTER = {
    "embedding_layer.token_embeddings": "model.embed_tokens", "final_norm": "model.norm",
    "lm_head": "lm_head",
}  # fmt: skip
_LLAMA_BLOCK = "model.layers.{i}"
_LLAMA_INNER = {
    "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
    "self_attn.q_proj": "self_attn.q_proj", "self_attn.k_proj": "self_attn.k_proj",
    "self_attn.v_proj": "self_attn.v_proj", "self_attn.out_proj": "self_attn.o_proj",
    "mlp.fc1": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.fc2": "mlp.down_proj",
}  # fmt: skip
_QK_NORMS = {"self_attn.q_norm": "self_attn.q_norm", "self_attn.k_norm": "self_attn.k_norm"}
_QWEN_WINDOW = window_by_layer(
    lambda c, layer: layer >= c.get("max_window_layers", 28), switch="use_sliding_window"
)
_QWEN_DEFAULTS = {
    **_LLAMA_DEFAULTS, "vocab_size": 151936, "intermediate_size": 22016,
    "num_key_value_heads": 32, "max_position_embeddings": 32768,
}  # fmt: skip
_GEMMA_KEYS = {
    **_LLAMA_KEYS, **_BIAS_AND_HEAD_DIM, "final_logit_softcapping": "head_softcap",
}  # fmt: skip
_GEMMA_DEFAULTS = {
    **_LLAMA_DEFAULTS, "attention_bias": False, "hidden_size": 2304, "intermediate_size": 9216,
    "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "tie_word_embeddings": True,
}  # fmt: skip
_GEMMA_TENSORS = _tensors(
    _LLAMA_OUTER,
    _LLAMA_BLOCK,
    {
        **_LLAMA_INNER,
        **_QK_NORMS,
        "self_attn.out_norm": "post_attention_layernorm",
        "norm2": "pre_feedforward_layernorm",
        "mlp.out_norm": "post_feedforward_layernorm",
    },
)
_CAUSAL_ONLY = {
    "use_bidirectional_attention": (False, "every position sees only earlier ones")
}  # fmt: skip
# What GPT-2 and GPT-Neo share.
_GPT_OUTER = {
    "embedding_layer.token_embeddings": "transformer.wte",
    "embedding_layer.positional_encoding.pos_embedding": "transformer.wpe",
    "final_norm": "transformer.ln_f", "lm_head": "lm_head",
}  # fmt: skip
_GPT_BLOCK = "transformer.h.{i}"
_GPT_INNER = {"norm1": "ln_1", "norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}

# By their `model_type`; a model is saved as the first that computes it.
ARCHITECTURES = {
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        "transformer.",
        architectures.gpt2,
        keys={
            "vocab_size": "vocab_size", "n_positions": "max_seq_len", "n_embd": "hidden_size",
            "n_layer": "num_layers", "n_head": "num_heads", "n_inner": "mlp_intermediate_size",
            "embd_pdrop": "embedding_dropout_p", "attn_pdrop": "attn_dropout_p",
            "resid_pdrop": "mlp_dropout_p", "layer_norm_epsilon": "norm_eps",
            "tie_word_embeddings": "tie_word_embeddings",
        },
        defaults={
            "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12,
            "embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1, "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
        },
        tensors=_tensors(_GPT_OUTER, _GPT_BLOCK, {
            **_GPT_INNER, "self_attn.qkv_proj": "attn.c_attn", "self_attn.out_proj": "attn.c_proj",
        }),
        codecs=(activation("activation_function", "gelu_new"),),
        fixed={
            "scale_attn_weights": (True, "attention scores are always divided by sqrt(D)"),
            "scale_attn_by_inverse_layer_idx":
                (False, "attention scores are scaled alike in all layers"),
            "add_cross_attention": (False, "there is no encoder to attend to"),
        },
        aliases={
            "max_position_embeddings": "n_positions", "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
        },
        # c_attn returns q, k and v side by side, each by head, as `qkv_proj` does.
        layouts=dict.fromkeys(("c_attn.weight", "c_proj.weight", "c_fc.weight"), TRANSPOSED),
    ),
    "llama": Architecture(
        "LlamaForCausalLM",
        "model.",
        architectures.llama,
        keys={**_LLAMA_KEYS, **_BIAS_AND_HEAD_DIM, "mlp_bias": "mlp_bias"},
        defaults={**_LLAMA_DEFAULTS, "attention_bias": False, "mlp_bias": False},
        tensors=_tensors(_LLAMA_OUTER, _LLAMA_BLOCK, _LLAMA_INNER),
        codecs=(rope(), activation("hidden_act", "silu", gated=True)),
    ),
    "mistral": Architecture(
        "MistralForCausalLM",
        "model.",
        architectures.llama,
        keys={**_LLAMA_KEYS, "head_dim": "head_dim"},
        defaults={
            **_LLAMA_DEFAULTS, "intermediate_size": 14336, "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
        },
        tensors=_tensors(_LLAMA_OUTER, _LLAMA_BLOCK, _LLAMA_INNER),
        codecs=(
            rope(), activation("hidden_act", "silu", gated=True), window_of_all_layers(4096),
        ),
    ),
    "qwen2": Architecture(
        "Qwen2ForCausalLM",
        "model.",
        architectures.qwen2,
        keys=_LLAMA_KEYS,
        defaults=_QWEN_DEFAULTS,
        tensors=_tensors(_LLAMA_OUTER, _LLAMA_BLOCK, _LLAMA_INNER),
        codecs=(rope(), activation("hidden_act", "silu", gated=True), _QWEN_WINDOW),
    ),
    "qwen3": Architecture(
        "Qwen3ForCausalLM",
        "model.",
        architectures.qwen3,
        keys={**_LLAMA_KEYS, **_BIAS_AND_HEAD_DIM},
        defaults={**_QWEN_DEFAULTS, "attention_bias": False, "head_dim": 128},
        tensors=_tensors(_LLAMA_OUTER, _LLAMA_BLOCK, {**_LLAMA_INNER, **_QK_NORMS}),
        codecs=(rope(), activation("hidden_act", "silu", gated=True), _QWEN_WINDOW),
    ),
    "gemma2": Architecture(
        "Gemma2ForCausalLM",
        "model.",
        architectures.gemma2,
        keys={**_GEMMA_KEYS, "attn_logit_softcapping": "attn_softcap"},
        defaults={
            **_GEMMA_DEFAULTS, "vocab_size": 256000, "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        },
        tensors=_GEMMA_TENSORS,
        codecs=(
            rope(), activation("hidden_activation", "gelu_pytorch_tanh", gated=True),
            window_by_layer(lambda c, layer: layer % 2 == 0), query_scale(),
        ),
        fixed=_CAUSAL_ONLY,
    ),
    "gemma3_text": Architecture(
        "Gemma3ForCausalLM",
        "model.",
        architectures.gemma3,
        keys=_GEMMA_KEYS,
        defaults={
            **_GEMMA_DEFAULTS, "vocab_size": 262208, "max_position_embeddings": 131072,
            "final_logit_softcapping": None,
        },
        tensors=_GEMMA_TENSORS,
        codecs=(
            gemma3_rope(), activation("hidden_activation", "gelu_pytorch_tanh", gated=True),
            window_by_layer(lambda c, layer: (layer + 1) % c.get("sliding_window_pattern", 6) > 0),
            query_scale(),
        ),
        fixed={
            **_CAUSAL_ONLY,
            "attn_logit_softcapping": (None, "transformers does not cap the scores of Gemma 3"),
        },
    ),
    "phi3": Architecture(
        "Phi3ForCausalLM",
        "model.",
        partial(architectures.llama, separate_qkv=False),
        keys={**_LLAMA_KEYS, "embd_pdrop": "embedding_dropout_p", "resid_pdrop": "mlp_dropout_p"},
        defaults={
            **_LLAMA_DEFAULTS, "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192,
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        },
        tensors=_tensors(_LLAMA_OUTER, _LLAMA_BLOCK, {
            **_LLAMA_INNER, "self_attn.qkv_proj": "self_attn.qkv_proj",
            "mlp.fc1": "mlp.gate_up_proj", "mlp.up": "mlp.gate_up_proj",
        }),
        codecs=(
            rope(fraction=1.0, types=()), activation("hidden_act", "silu", gated=True),
            window_of_all_layers(None),
        ),
        layouts={"gate_up_proj": HALVES},
    ),
    "olmo2": Architecture(
        "Olmo2ForCausalLM",
        "model.",
        architectures.olmo2,
        keys={**_LLAMA_KEYS, "attention_bias": "qkv_bias"},
        defaults={
            **_LLAMA_DEFAULTS, "vocab_size": 50304, "rms_norm_eps": 1e-5, "attention_bias": False,
        },
        tensors=_tensors(_LLAMA_OUTER, _LLAMA_BLOCK, {
            **_LLAMA_INNER, **_QK_NORMS, "self_attn.out_norm": "post_attention_layernorm",
            "mlp.out_norm": "post_feedforward_layernorm",
        }),
        codecs=(rope(), activation("hidden_act", "silu", gated=True)),
    ),
    "stablelm": Architecture(
        "StableLmForCausalLM",
        "model.",
        architectures.stablelm,
        keys={
            **_KEYS, "num_key_value_heads": "num_kv_heads", "layer_norm_eps": "norm_eps",
            "use_qkv_bias": "qkv_bias", "hidden_dropout": "mlp_dropout_p",
        },
        defaults={
            **_LLAMA_DEFAULTS, "vocab_size": 50304, "hidden_size": 2560, "intermediate_size": 6912,
            "num_key_value_heads": 32, "max_position_embeddings": 4096, "layer_norm_eps": 1e-5,
            "use_qkv_bias": False, "hidden_dropout": 0.0,
        },
        tensors=_tensors(_LLAMA_OUTER, _LLAMA_BLOCK, _LLAMA_INNER),
        codecs=(
            rope(fraction=0.25), activation("hidden_act", "silu", gated=True), parallel(False),
        ),
        fixed={"qk_layernorm": (False, "all heads share one norm of queries")},
        parallel_tensors={
            f"transformer_blocks.{{i}}.{norm}.{{kind}}": "model.layers.{i}.input_layernorm.{kind}"
            for norm in ("norm1", "norm2")
        },
        layouts={"input_layernorm": SHARED},
    ),
    "gpt_neox": Architecture(
        "GPTNeoXForCausalLM",
        "gpt_neox.",
        architectures.gpt_neox,
        keys={
            **_KEYS, "layer_norm_eps": "norm_eps", "attention_bias": "qkv_bias",
            "hidden_dropout": "mlp_dropout_p",
        },
        defaults={
            **_LLAMA_DEFAULTS, "vocab_size": 50432, "hidden_size": 6144, "num_hidden_layers": 44,
            "num_attention_heads": 64, "intermediate_size": 24576, "layer_norm_eps": 1e-5,
            "attention_bias": True, "hidden_dropout": 0.0,
        },
        tensors=_tensors({
            "embedding_layer.token_embeddings": "gpt_neox.embed_in",
            "final_norm": "gpt_neox.final_layer_norm", "lm_head": "embed_out",
        }, "gpt_neox.layers.{i}", {
            "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
            "self_attn.qkv_proj": "attention.query_key_value",
            "self_attn.out_proj": "attention.dense", "mlp.fc1": "mlp.dense_h_to_4h",
            "mlp.fc2": "mlp.dense_4h_to_h",
        }),
        codecs=(
            rope(fraction=0.25, theta_key="rotary_emb_base", fraction_key="rotary_pct"),
            activation("hidden_act", "gelu"), parallel(True),
        ),
        layouts={"query_key_value": BY_HEAD},
    ),
    "gpt_neo": Architecture(
        "GPTNeoForCausalLM",
        "transformer.",
        architectures.gpt_neo,
        keys={
            "vocab_size": "vocab_size", "max_position_embeddings": "max_seq_len",
            "hidden_size": "hidden_size", "num_layers": "num_layers", "num_heads": "num_heads",
            "intermediate_size": "mlp_intermediate_size", "layer_norm_epsilon": "norm_eps",
            "embed_dropout": "embedding_dropout_p", "attention_dropout": "attn_dropout_p",
            "resid_dropout": "mlp_dropout_p", "tie_word_embeddings": "tie_word_embeddings",
        },
        defaults={
            "vocab_size": 50257, "max_position_embeddings": 2048, "hidden_size": 2048,
            "num_layers": 24, "num_heads": 16, "layer_norm_epsilon": 1e-5, "embed_dropout": 0.0,
            "attention_dropout": 0.0, "resid_dropout": 0.0, "tie_word_embeddings": True,
        },
        tensors=_tensors(_GPT_OUTER, _GPT_BLOCK, {
            **_GPT_INNER, "self_attn.q_proj": "attn.attention.q_proj",
            "self_attn.k_proj": "attn.attention.k_proj",
            "self_attn.v_proj": "attn.attention.v_proj",
            "self_attn.out_proj": "attn.attention.out_proj",
        }),
        codecs=(activation("activation_function", "gelu_new"), gpt_neo_window()),
        aliases={"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"},
    ),
}  # fmt: skip


def read_settings(
    settings: Any, padding_idx: int | None = None
) -> tuple[Architecture, DecoderConfig]:
    """The architecture and the configuration in the content of a config.json.

    Raises:
        ValueError: it is not one of these architectures, or cannot be computed; the message begins
            with the key.
    """
    if not isinstance(settings, Mapping):
        refuse("the configuration", "must be a dictionary", settings)
    model_type = settings.get("model_type")
    if model_type == "gemma3" and isinstance(settings.get("text_config"), Mapping):
        model_type, settings = "gemma3_text", settings["text_config"]
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        if model_type is None:
            refuse("model_type", f"is required; it is one of {known}")
        refuse("model_type", f"fastllm supports {known}", model_type)
    architecture = ARCHITECTURES[model_type]
    return architecture, architecture.read(settings, padding_idx)


# Fields that do not change what a trained model computes.
_NEUTRAL = {"padding_idx", "embedding_dropout_p", "attn_dropout_p", "mlp_dropout_p"}


def write_settings(config: DecoderConfig) -> tuple[Architecture, dict[str, Any]]:
    """The architecture that computes the same, and the content of its config.json.

    Raises:
        ValueError: there is none; the message says in what the most similar one differs.
    """
    computed, differences, errors = _computed(config), {}, []
    for model_type, architecture in ARCHITECTURES.items():
        settings = architecture.write(config)
        try:
            again = _computed(architecture.read(settings))
        except ValueError as error:
            errors.append(f"{model_type} cannot have {error}")
            continue
        differing = [name for name, value in computed.items() if again[name] != value]
        if not differing:
            return architecture, {"model_type": model_type, **settings}
        differences[model_type] = differing
    reason = next(iter(errors), "")
    if differences:
        nearest = min(differences, key=lambda model_type: len(differences[model_type]))
        reason = f"{nearest} differs in {', '.join(differences[nearest])}"
    raise ValueError(f"Hugging Face's format cannot express this model: {reason}")


def _computed(config: DecoderConfig) -> dict[str, Any]:
    """What a model of the configuration computes, equal for equal models."""
    layers = range(config.num_layers)
    rotations = [config.rotation_of(layer) for layer in layers]
    names = {"rope_base", "rope_fraction", "rope_scaling", "rope_interleaved", "local_rope_base"}
    return {
        **config.model_dump(exclude={*_NEUTRAL, *names, "window_pattern"}),
        "rotary positions": any(rotations) and (rotations, config.rope_interleaved),
        "window": [config.window_of(layer) for layer in layers],
        "out_bias": config.qkv_bias if config.out_bias is None else config.out_bias,
        "attn_scale": config.attn_scale or config.head_dim**-0.5,
        "norm_bias": config.norm_bias and config.norm == "layer",
    }
