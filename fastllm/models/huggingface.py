"""The decoder architectures of Hugging Face that `DecoderModel` computes.

Each is data that is read both ways: the keys of config.json for the fields of a `DecoderConfig`,
and the names of the tensors. Names and defaults of keys are those of transformers.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn, get_args

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


AS_IT_IS = Layout(lambda tensor, _: [tensor], lambda tensors, _: tensors[0])
# Linear layers that store weights as [inputs, outputs].
TRANSPOSED = Layout(lambda tensor, _: [tensor.mT], lambda tensors, _: tensors[0].mT)


class Architecture(NamedTuple):
    """A `model_type` of transformers.

    Attributes:
        class_name: of the language model.
        prefix: of the names of all tensors but the head's; files of a model without its head lack
            it.
        build: makes the `DecoderConfig` from those fields that config.json determines.
        keys: the field for each key that stands for one.
        defaults: of transformers, for keys that a file may lack. Their types are checked.
        tensors: their name for each name of ours; {i} is the layer, {kind} is weight and bias.
        codecs: for everything else in the configuration.
        fixed: the only value of a key that can be computed, and the reason.
        aliases: other names of keys.
        layouts: of tensors whose name contains this.
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
            if (value := named.get(key)) is not None:
                check_value(key, value, self.defaults.get(key), field)
                fields[field] = value
        for codec in self.codecs:
            fields |= codec.read(named)
        H, N = fields["hidden_size"], fields["num_heads"]
        if H % N and not fields.get("head_dim"):
            width, heads = self.key_of("hidden_size"), self.key_of("num_heads")
            refuse(heads, f"{width} ({H}) must be divisible by {heads}", N)
        return self.build(**fields, padding_idx=padding_idx)

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        """The content of config.json for a configuration, as far as this architecture has it."""
        settings = {key: getattr(config, field) for key, field in self.keys.items()}
        for codec in self.codecs:
            settings |= codec.write(config)
        return settings

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


def check_value(key: str, value: Any, default: Any, field: str = "") -> None:
    """Refuses a value that is not of the default's type, or out of any range.

    A size is a whole number; one without a default is optional.
    """
    if isinstance(default, bool):
        if not isinstance(value, bool):
            refuse(key, "must be true or false", value)
    elif isinstance(default, float):
        limit = 1 if field.endswith("_p") else math.inf
        if not isinstance(value, (int, float)) or not 0 <= value <= limit or value == math.inf:
            refuse(key, f"must be a number from 0 to {limit}", value)
    elif type(value) is not int:
        refuse(key, "must be a whole number", value)
    else:
        limit = MOST_LAYERS if field == "num_layers" else LARGEST_SIZE
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
        return {key: default if default in names else names[0] if names else config.activation}

    return Codec(read, write)


ROPE_TYPES = get_args(RopeScaling.model_fields["rope_type"].annotation)


def rope(
    theta: float = 10000.0,
    fraction: float | None = None,
    types: tuple[str, ...] = ("linear", "llama3", "yarn"),
    theta_key: str = "rope_theta",
    fraction_key: str = "partial_rotary_factor",
) -> Codec:
    """Rotary positions: `rope_parameters`, or `rope_theta` and `rope_scaling` in older files.

    Args:
        theta, fraction: defaults. Without a fraction, the architecture rotates whole heads.
        types: of scaling that the architecture has.
        theta_key, fraction_key: in files without `rope_parameters`.
    """

    def read(settings: Settings) -> dict[str, Any]:
        old = settings.get("rope_scaling")
        parameters = dict(old or settings.get("rope_parameters") or {})
        base = parameters.pop("rope_theta", None) or settings.get(theta_key) or theta
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
    place: str, parameters: dict[str, Any], types: tuple[str, ...], settings: Settings
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
    given = {key: value for key, value in parameters.items() if value is not None}
    for key in given:
        if key not in RopeScaling.model_fields:
            refuse(f"{place}.{key}", "is not supported", given[key])
    try:
        return RopeScaling(rope_type=rope_type, **given)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def write_rope(base: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """The content of `rope_parameters`."""
    parameters = {"rope_type": "default"}
    if scaling is not None:
        own = {
            "llama3": ("low_freq_factor", "high_freq_factor"),
            "yarn": ("beta_fast", "beta_slow", "attention_factor"),
        }.get(scaling.rope_type, ())
        names = ("rope_type", "factor", "original_max_position_embeddings", *own)
        values = {name: getattr(scaling, name) for name in names}
        parameters = {name: value for name, value in values.items() if value is not None}
    return {**parameters, "rope_theta": base}


# The keys that Llama and its descendants share.
_LLAMA_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "mlp_intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
    "attention_dropout": "attn_dropout_p",
}
_LLAMA_DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "attention_dropout": 0.0,
}  # fmt: skip
_LLAMA_TENSORS = {
    "embedding_layer.token_embeddings.weight": "model.embed_tokens.weight",
    "final_norm.{kind}": "model.norm.{kind}",
    "lm_head.weight": "lm_head.weight",
    "transformer_blocks.{i}.norm1.{kind}": "model.layers.{i}.input_layernorm.{kind}",
    "transformer_blocks.{i}.self_attn.q_proj.{kind}": "model.layers.{i}.self_attn.q_proj.{kind}",
    "transformer_blocks.{i}.self_attn.k_proj.{kind}": "model.layers.{i}.self_attn.k_proj.{kind}",
    "transformer_blocks.{i}.self_attn.v_proj.{kind}": "model.layers.{i}.self_attn.v_proj.{kind}",
    "transformer_blocks.{i}.self_attn.out_proj.{kind}": "model.layers.{i}.self_attn.o_proj.{kind}",
    "transformer_blocks.{i}.norm2.{kind}": "model.layers.{i}.post_attention_layernorm.{kind}",
    "transformer_blocks.{i}.mlp.fc1.{kind}": "model.layers.{i}.mlp.gate_proj.{kind}",
    "transformer_blocks.{i}.mlp.up.{kind}": "model.layers.{i}.mlp.up_proj.{kind}",
    "transformer_blocks.{i}.mlp.fc2.{kind}": "model.layers.{i}.mlp.down_proj.{kind}",
}

# By their `model_type`; a model is saved as the first that computes it.
ARCHITECTURES = {
    "gpt2": Architecture(
        class_name="GPT2LMHeadModel",
        prefix="transformer.",
        build=architectures.gpt2,
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
        tensors={
            "embedding_layer.token_embeddings.weight": "transformer.wte.weight",
            "embedding_layer.positional_encoding.pos_embedding.weight": "transformer.wpe.weight",
            "lm_head.weight": "lm_head.weight",
            "final_norm.{kind}": "transformer.ln_f.{kind}",
            "transformer_blocks.{i}.norm1.{kind}": "transformer.h.{i}.ln_1.{kind}",
            "transformer_blocks.{i}.self_attn.qkv_proj.{kind}":
                "transformer.h.{i}.attn.c_attn.{kind}",
            "transformer_blocks.{i}.self_attn.out_proj.{kind}":
                "transformer.h.{i}.attn.c_proj.{kind}",
            "transformer_blocks.{i}.norm2.{kind}": "transformer.h.{i}.ln_2.{kind}",
            "transformer_blocks.{i}.mlp.fc1.{kind}": "transformer.h.{i}.mlp.c_fc.{kind}",
            "transformer_blocks.{i}.mlp.fc2.{kind}": "transformer.h.{i}.mlp.c_proj.{kind}",
        },
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
        # Weights in its blocks are [inputs, outputs]; c_attn returns q, k and v side by side, each
        # by head, as `qkv_proj` does.
        layouts=dict.fromkeys(("c_attn.weight", "c_proj.weight", "c_fc.weight"), TRANSPOSED),
    ),
    "llama": Architecture(
        class_name="LlamaForCausalLM",
        prefix="model.",
        build=architectures.llama,
        keys={
            **_LLAMA_KEYS, "head_dim": "head_dim", "attention_bias": "qkv_bias",
            "mlp_bias": "mlp_bias",
        },
        defaults={**_LLAMA_DEFAULTS, "attention_bias": False, "mlp_bias": False},
        tensors=_LLAMA_TENSORS,
        codecs=(rope(), activation("hidden_act", "silu", gated=True)),
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
    if model_type not in ARCHITECTURES:
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
    computed, differences = _computed(config), {}
    for model_type, architecture in ARCHITECTURES.items():
        settings = architecture.write(config)
        try:
            again = _computed(architecture.read(settings))
        except ValueError as error:
            differences[model_type] = [str(error)]
            continue
        differing = [name for name, value in computed.items() if again[name] != value]
        if not differing:
            return architecture, {"model_type": model_type, **settings}
        differences[model_type] = differing
    nearest = min(differences, key=lambda model_type: len(differences[model_type]))
    raise ValueError(
        f"no architecture of Hugging Face that fastllm knows computes this model; {nearest} "
        f"differs in {', '.join(differences[nearest])}"
    )


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
