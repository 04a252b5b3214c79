"""GPT-2 in Hugging Face's format: a folder with config.json and model.safetensors.

GPT-2 (Radford et al. 2019) is a Pre-LN decoder with learned positions, unscaled embeddings that the
head shares, and the tanh approximation of GELU. The linear layers in its blocks store weights as
[inputs, outputs], and c_attn returns q, k and v side by side, each by head, as `qkv_proj` does.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import torch
from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastllm.command import describe_error
from fastllm.core.fusible import is_plain
from fastllm.core.transformer_block import TransformerBlock
from fastllm.files import replace_file
from fastllm.ops.decoder import Layer, Norm

if TYPE_CHECKING:
    from fastllm.models.decoder import DecoderModel  # which imports this module

Size = Annotated[int, Field(ge=1, le=2**24)]
Probability = Annotated[float, Field(ge=0, le=1)]

# fastllm's activation for each of GPT-2's names. The first three compute the same up to rounding.
# Files are written with the first name of an activation.
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

# Settings that transformers can vary and `DecoderModel` cannot: the only value, and why.
FIXED = {
    "scale_attn_weights": (True, "attention scores are always divided by sqrt(D)"),
    "scale_attn_by_inverse_layer_idx": (False, "attention scores are scaled alike in all layers"),
    "add_cross_attention": (False, "there is no encoder to attend to"),
}

# GPT-2's name for each of fastllm's tensors; {i} is the layer, {kind} is weight and bias.
TENSORS = {
    "embedding_layer.token_embeddings.weight": "wte.weight",
    "embedding_layer.positional_encoding.pos_embedding.weight": "wpe.weight",
    "lm_head.weight": "lm_head.weight",
    "final_norm.{kind}": "ln_f.{kind}",
    "transformer_blocks.{i}.norm1.{kind}": "h.{i}.ln_1.{kind}",
    "transformer_blocks.{i}.self_attn.qkv_proj.{kind}": "h.{i}.attn.c_attn.{kind}",
    "transformer_blocks.{i}.self_attn.out_proj.{kind}": "h.{i}.attn.c_proj.{kind}",
    "transformer_blocks.{i}.norm2.{kind}": "h.{i}.ln_2.{kind}",
    "transformer_blocks.{i}.mlp.fc1.{kind}": "h.{i}.mlp.c_fc.{kind}",
    "transformer_blocks.{i}.mlp.fc2.{kind}": "h.{i}.mlp.c_proj.{kind}",
}
# Causal masks that older versions of transformers saved among the weights.
MASKS = re.compile(r"h\.\d+\.attn\.(masked_)?bias")


def either_name(name: str, alias: str) -> Any:
    """A field with two names in transformers."""
    return Field(validation_alias=AliasChoices(name, alias))


class GPT2Config(BaseModel):
    """The relevant part of config.json, with names and defaults of transformers' `GPT2Config`."""

    model_config = ConfigDict(strict=True, validate_default=True)

    model_type: Literal["gpt2"]
    vocab_size: Size = 50257
    n_positions: Annotated[Size, either_name("n_positions", "max_position_embeddings")] = 1024
    n_embd: Annotated[Size, either_name("n_embd", "hidden_size")] = 768
    n_layer: Annotated[int, either_name("n_layer", "num_hidden_layers"), Field(ge=1, le=2**10)] = 12
    n_head: Annotated[Size, either_name("n_head", "num_attention_heads")] = 12
    n_inner: Size | None = None
    activation_function: str = "gelu_new"
    embd_pdrop: Probability = 0.1
    attn_pdrop: Probability = 0.1
    resid_pdrop: Probability = 0.1
    layer_norm_epsilon: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-5
    initializer_range: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True

    @field_validator(*FIXED)
    @classmethod
    def _check_fixed(cls, value: bool, info: ValidationInfo) -> bool:
        only, reason = FIXED[info.field_name or ""]
        if value is not only:
            raise ValueError(f"must be {only}, because {reason} in fastllm")
        return value

    @field_validator("activation_function")
    @classmethod
    def _check_activation(cls, name: str) -> str:
        if name not in ACTIVATIONS:
            raise ValueError(f"fastllm supports {', '.join(ACTIVATIONS)}")
        return name

    @field_validator("n_head")
    @classmethod
    def _check_heads(cls, n_head: int, info: ValidationInfo) -> int:
        n_embd = info.data.get("n_embd", n_head)  # missing if it was invalid itself
        if n_embd % n_head:
            raise ValueError(f"n_embd ({n_embd}) must be divisible by n_head")
        return n_head

    def decoder_arguments(self) -> dict[str, Any]:
        """The arguments of `DecoderModel`."""
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.n_embd,
            "num_layers": self.n_layer,
            "num_heads": self.n_head,
            "max_seq_len": self.n_positions,
            "mlp_intermediate_size": self.n_inner,
            "pos_encoding_learned": True,
            "embedding_dropout_p": self.embd_pdrop,
            "attn_dropout_p": self.attn_pdrop,
            "mlp_dropout_p": self.resid_pdrop,
            "mlp_activation": ACTIVATIONS[self.activation_function],
            "norm_eps": self.layer_norm_epsilon,
            "lm_head_bias": False,
            "tie_word_embeddings": self.tie_word_embeddings,
            "scale_embeddings": False,
        }


def load_gpt2(
    model_class: "type[DecoderModel]",
    source: Any,
    padding_idx: int | None = None,
    device: Any = None,
    dtype: Any = None,
) -> "DecoderModel":
    """See `DecoderModel.from_gpt2`."""
    folder, config = _read_config(source)
    arguments = {**config.decoder_arguments(), "padding_idx": padding_idx, "dtype": dtype}
    if folder is None:
        model = model_class(**arguments, device=device)
        _initialise(model, config.initializer_range)
        return model
    # Compare shapes before allocating: a config.json of other weights may ask for terabytes.
    model = model_class(**arguments, device="meta")
    weights = _to_state_dict(_read_tensors(folder), model, folder)
    model.to_empty(device=torch.get_default_device() if device is None else device)
    model.load_state_dict(weights)
    return model


def save_gpt2(model: "DecoderModel", directory: str | os.PathLike[str]) -> None:
    """See `DecoderModel.save_gpt2`."""
    check_gpt2(model)
    weights = model.state_dict()
    if model.tie_word_embeddings:
        del weights["lm_head.weight"]
    names = tensor_names(TENSORS, len(model.transformer_blocks))
    tensors = {}
    for ours, tensor in weights.items():
        name = names[ours]
        prefix = "" if name.startswith("lm_head") else "transformer."
        tensors[prefix + name] = _transposed(name, tensor.detach().cpu()).contiguous()
    text = json.dumps(config_json(model), indent=2, sort_keys=True) + "\n"
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    # Both files are complete before either replaces its predecessor.
    with (
        replace_file(folder / "config.json") as config_file,
        replace_file(folder / "model.safetensors") as weights_file,
    ):
        config_file.write(text.encode())
        mode = os.fstat(weights_file.fileno()).st_mode
        save_file(tensors, weights_file.name, metadata={"format": "pt"})
        os.chmod(weights_file.name, mode)  # safetensors writes files that only the owner can read


def check_gpt2(model: "DecoderModel", convertible: bool = False) -> None:
    """Raises a `ValueError` with the reason if GPT-2's format cannot express the model.

    Args:
        convertible: accept obstacles that `convert_to_gpt2` removes.
    """
    reason = next(_obstacles(model, convertible), None)
    if reason is not None:
        raise ValueError(f"GPT-2's format cannot express this model: {reason}")


@torch.no_grad()
def convert_to_gpt2(model: "DecoderModel") -> "DecoderModel":
    """Returns a new model of GPT-2's architecture with the same logits up to rounding.

    The token embeddings are multiplied by their scale; a head tied to them gets a matrix of its
    own. Sinusoidal positions become a table of positions.

    GPT-2's head has no bias. A nonzero bias becomes a column of the head's matrix, for a channel in
    which the last layer norm always returns 1. This widens the model by one channel for each
    attention head, and the residual stream is 0 in all of the new channels. In the old channels the
    layer norms return the same as before: everything added to the residual stream loses its mean
    over the channels, which layer norms ignore, so the mean over more channels is 0 as well; and
    the layer norms' weights and epsilons compensate for a variance over more channels.

    Raises:
        ValueError: GPT-2's format cannot express the model even so; the message says why.
    """
    check_gpt2(model, convertible=True)
    table, block = model.embedding_layer, cast(TransformerBlock, model.transformer_blocks[0])
    layer = cast(Layer, block.record())
    V, H = table.token_embeddings.weight.shape
    N = layer.attention.heads
    extra = 0 if model.lm_head.bias is None or not model.lm_head.bias.any() else 1
    wide = H + N * extra
    result = type(model)(
        V,
        wide,
        len(model.transformer_blocks),
        N,
        model.max_seq_len,
        layer.mlp.fc1.weight.size(0),
        pos_encoding_learned=True,
        embedding_dropout_p=table.positional_encoding.dropout.p,
        attn_dropout_p=block.self_attn.p,
        mlp_dropout_p=block.mlp.dropout.p,
        mlp_activation=layer.mlp.activation,
        norm_eps=cast(Norm, layer.mlp.norm).eps * H / wide,
        padding_idx=model.padding_idx,
        lm_head_bias=False,
        dtype=table.token_embeddings.weight.dtype,
        scale_embeddings=False,
    )
    result.load_state_dict(_converted_weights(model, layer, wide, extra))
    return result.train(model.training)


def _converted_weights(
    model: "DecoderModel", layer: Layer, wide: int, extra: int
) -> dict[str, Tensor]:
    """The state dict of `convert_to_gpt2`'s result, in float64.

    Args:
        wide: its hidden size.
        extra: new channels for each attention head, 0 or 1.
    """
    table, H = model.embedding_layer, model.hidden_size
    N = layer.attention.heads
    D = H // N

    def channels(tensor: Tensor, dim: int = -1) -> Tensor:
        return _padded(tensor, dim, 1, wide - H)

    def residual(tensor: Tensor, dim: int = -1) -> Tensor:
        """For parameters whose output is added to the residual stream."""
        return channels(tensor - tensor.mean(dim, keepdim=True) if extra else tensor, dim)

    def projections(tensor: Tensor) -> Tensor:
        """For q, k and v; q makes up for scores divided by the root of a larger head_dim."""
        factors = torch.tensor([math.sqrt((D + extra) / D), 1, 1], dtype=tensor.dtype)
        scaled = tensor.unflatten(0, (3, H)) * factors.view(3, *[1] * tensor.ndim)
        return _padded(scaled.flatten(0, 1), 0, 3 * N, extra)

    old = {name: tensor.double().cpu() for name, tensor in model.state_dict().items()}
    new = {name: channels(old[name]) for name in old if "norm" in name}
    for name in new:
        if name.endswith("weight"):
            new[name] *= math.sqrt(H / wide)
    for i in range(len(model.transformer_blocks)):
        attention, mlp = f"transformer_blocks.{i}.self_attn.", f"transformer_blocks.{i}.mlp."
        new |= {
            f"{attention}qkv_proj.weight": projections(
                channels(old[f"{attention}qkv_proj.weight"])
            ),
            f"{attention}qkv_proj.bias": projections(old[f"{attention}qkv_proj.bias"]),
            f"{attention}out_proj.weight": residual(
                _padded(old[f"{attention}out_proj.weight"], 1, N, extra), 0
            ),
            f"{attention}out_proj.bias": residual(old[f"{attention}out_proj.bias"]),
            f"{mlp}fc1.weight": channels(old[f"{mlp}fc1.weight"]),
            f"{mlp}fc1.bias": old[f"{mlp}fc1.bias"],
            f"{mlp}fc2.weight": residual(old[f"{mlp}fc2.weight"], 0),
            f"{mlp}fc2.bias": residual(old[f"{mlp}fc2.bias"]),
        }
    tokens, positions = "embedding_layer.token_embeddings", "embedding_layer.positional_encoding"
    new[f"{tokens}.weight"] = residual(old[f"{tokens}.weight"] * table.scale)
    table_of_positions = cast(Tensor, table.position_table())
    new[f"{positions}.pos_embedding.weight"] = residual(table_of_positions.double().cpu())
    new["lm_head.weight"] = channels(old["lm_head.weight"])
    if extra:
        new["final_norm.bias"][H] = 1
        new["lm_head.weight"][:, H] = old["lm_head.bias"]
    return new


def _padded(tensor: Tensor, dim: int, parts: int, extra: int) -> Tensor:
    """Appends `extra` zeros to each of `parts` equal parts along a dimension."""
    dim %= tensor.ndim
    split = tensor.unflatten(dim, (parts, -1))
    shape = list(split.shape)
    shape[dim + 1] = extra
    return torch.cat((split, split.new_zeros(shape)), dim + 1).flatten(dim, dim + 1)


def _read_config(source: Any) -> tuple[Path | None, GPT2Config]:
    """The folder of the weights, if there is one, and the configuration."""
    folder, name = None, "the configuration"
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.is_dir():
            folder, path = path, path / "config.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist; give a folder with config.json and model.safetensors, "
                "such as `hf download distilbert/distilgpt2 --local-dir distilgpt2` creates"
            )
        name, settings = str(path), _read_json(path)
    else:
        # A configuration in memory may leave out the model_type.
        given = source.to_dict() if hasattr(source, "to_dict") else source
        settings = {"model_type": "gpt2", **given}
    try:
        return folder, GPT2Config.model_validate(settings)
    except ValidationError as error:
        raise ValueError(f"{name}: {describe_error(error)}") from None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor but the masks, by its name without the prefix `transformer.`."""
    files, index = [folder / "model.safetensors"], folder / "model.safetensors.index.json"
    if not files[0].exists():
        if not index.exists():
            raise FileNotFoundError(
                f"{folder} has neither model.safetensors nor {index.name}; transformers' "
                "save_pretrained converts a pytorch_model.bin"
            )
        try:
            shards = set(_read_json(index)["weight_map"].values())
            files = [folder / shard for shard in sorted(shards)]
        except (LookupError, TypeError, AttributeError):
            raise ValueError(f"{index} has no weight_map from names to files") from None
    tensors = {}
    for file in files:
        if not file.exists():
            raise FileNotFoundError(
                f"{file} does not exist, but {index.name} lists it; download it"
            )
        try:
            tensors.update(load_file(file))
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(f"{file} cannot be read as safetensors: {error}") from error
    # The original upload was saved without the head, and therefore without the prefix.
    named = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in named.items() if not MASKS.fullmatch(name)}


def _to_state_dict(
    tensors: dict[str, Tensor], model: "DecoderModel", folder: Path
) -> dict[str, Tensor]:
    """The tensors as a state dict for the model, which may be on the meta device."""
    names = tensor_names(TENSORS, len(model.transformer_blocks))
    if model.tie_word_embeddings:
        del names["lm_head.weight"]
        head = tensors.pop("lm_head.weight", None)
        if head is not None and not torch.equal(head, tensors.get("wte.weight", head)):
            raise ValueError(
                f"{folder}: 'lm_head.weight' differs from 'wte.weight', but config.json says "
                "tie_word_embeddings; set it to false there to keep both"
            )
    state = model.state_dict()
    expected = {
        theirs: list(_transposed(theirs, state[ours]).shape) for ours, theirs in names.items()
    }
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    for name in [*expected, *sorted(found)]:
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"{folder}: the weights do not fit config.json: '{name}' is "
                f"{found.get(name, 'missing')}, expected {expected.get(name, 'nothing')}"
            )
    return {ours: _transposed(theirs, tensors[theirs]) for ours, theirs in names.items()}


def tensor_names(table: dict[str, str], num_layers: int) -> dict[str, str]:
    """A table such as `TENSORS` with {i} and {kind} filled in, for a model with layers."""
    return {
        ours.format(i=i, kind=kind): theirs.format(i=i, kind=kind)
        for ours, theirs in table.items()
        for i in range(num_layers)
        for kind in ("weight", "bias")
    }


def _transposed(name: str, tensor: Tensor) -> Tensor:
    """Transposes weights of linear layers in blocks: GPT-2 stores them as [inputs, outputs]."""
    return tensor.mT if name.startswith("h.") and tensor.ndim == 2 else tensor


@torch.no_grad()
def _initialise(model: "DecoderModel", std: float) -> None:
    """GPT-2's initial weights (Radford et al. 2019, section 2.3), as in transformers."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for name, weight in model.named_parameters():
        if name.endswith(("out_proj.weight", "fc2.weight")):  # added to the residual stream
            nn.init.normal_(weight, std=std / math.sqrt(2 * len(model.transformer_blocks)))
    if model.padding_idx is not None:
        model.embedding_layer.token_embeddings.weight[model.padding_idx].zero_()


def _obstacles(model: "DecoderModel", convertible: bool = False) -> Iterator[str]:
    """Reasons why GPT-2's format cannot express the model.

    Take only the first: the code after a reason relies on its absence.

    Args:
        convertible: leave out the reasons that `convert_to_gpt2` removes.
    """
    if not is_plain(model):
        yield (
            f"the model, a {type(model).__name__}, is not a plain DecoderModel: it is a subclass, "
            "or a hook, a patched forward or the like is attached to it"
        )
    sketch = type(model)(
        1, 1, len(model.transformer_blocks), 1, 1, pos_encoding_learned=True, device="meta"
    )
    kinds = {name: type(module) for name, module in sketch.named_modules()}
    for name, module in model.named_modules():
        if module is model:
            continue
        kind = type(module) if name.endswith("mlp.activation") else kinds.get(name, type(module))
        if type(module) is not kind:
            yield f"{name} is a {type(module).__name__}, not a {kind.__name__}"
        if not is_plain(module) and type(module) is not nn.ModuleList:
            yield (
                f"{name}, a {type(module).__name__}, has no counterpart in GPT-2, or a hook, "
                "a patched forward or the like is attached to it"
            )
    if not model.embedding_layer.positional_encoding.positions:
        yield "its embeddings have no positions, which are rotary or missing"
    if not convertible and not model.embedding_layer.positional_encoding.learned:
        yield "its positions are sinusoidal, not learned (pos_encoding_learned=True)"
    decoder = model.record(model.max_seq_len)
    if isinstance(decoder, str):
        yield decoder
        return
    if not decoder.layers:
        yield "it has no blocks"
        return
    layers, norm, head = decoder.layers, decoder.norm, decoder.head
    attentions, mlps, _ = zip(*layers, strict=True)
    if norm is None or not all(mlp.norm_first for mlp in mlps):
        yield "it is Post-LN, not Pre-LN (norm_first=True)"
        return
    unknown = {
        "shares heads of keys and values": any(a.kv_heads_or_heads != a.heads for a in attentions),
        "has heads of another width than H / N": any(
            a.widths[0] != model.hidden_size for a in attentions
        ),
        "has separate projections for queries, keys and values": any(
            len(a.projections) > 1 for a in attentions
        ),
        "has rotary positions": any(a.rope for a in attentions),
        "normalizes queries and keys": any(a.q_norm or a.k_norm for a in attentions),
        "has a window": any(a.window for a in attentions),
        "has a scale of attention": any(a.scale is not None for a in attentions),
        "caps its scores or logits": decoder.softcap is not None
        or any(a.softcap is not None for a in attentions),
        "has gated MLPs": any(m.up for m in mlps),
        "normalizes its sublayers' outputs": any(s.out_norm for a, m, _ in layers for s in (a, m)),
        "scales its sublayers' outputs": any(
            s.residual_scale != 1 for a, m, _ in layers for s in (a, m)
        ),
        "has parallel sublayers": any(layer.parallel for layer in layers),
    }
    for feature, found in unknown.items():
        if found:
            yield f"it {feature}"
    if not convertible and decoder.embedding.scale != 1:
        yield "its token embeddings are multiplied by sqrt(H) (scale_embeddings=False prevents it)"
    if not all(attention.causal for attention in attentions):
        yield "it is not causal"
    if not convertible and head.bias is not None:
        yield "its head has a bias (lm_head_bias=False leaves it out)"
    linears = [linear for a, m, _ in layers for linear in (*a.projections, a.out, m.fc1, m.fc2)]
    if any(linear.bias is None for linear in linears):
        yield "a linear layer in its blocks lacks a bias (qkv_bias=True, mlp_bias=True)"
    for activation in {mlp.activation for mlp in mlps}.difference(ACTIVATIONS.values()):
        yield f"its activation is {activation}"
    norms = [norm, *(cast(Norm, sublayer.norm) for a, m, _ in layers for sublayer in (a, m))]
    if any(each.weight is None or each.bias is None for each in norms):
        yield "a norm lacks its weight or bias"
    if len({each.eps for each in norms}) > 1:
        yield "its layer norms differ in epsilon"
    if len({(a.heads, m.fc1.weight.size(0), m.activation) for a, m, _ in layers}) > 1:
        yield "its blocks differ in heads, MLP width or activation"
    if reason := decoder.why_not_sizes():
        yield reason
    if head.weight.shape != decoder.embedding.weight.shape:
        yield "its head does not have the size of its embeddings"
    if len(dtypes := {str(tensor.dtype) for tensor in model.state_dict().values()}) > 1:
        yield f"its parameters differ in type: {', '.join(sorted(dtypes))}"
    unnamed = set(model.state_dict()).difference(tensor_names(TENSORS, len(layers)))
    if convertible:
        unnamed -= {"lm_head.bias", "embedding_layer.positional_encoding.pe"}
    for name in unnamed:
        yield f"the format has no name for '{name}'"


def config_json(model: "DecoderModel") -> dict[str, Any]:
    """The content of config.json for a model that `check_gpt2` accepts."""
    table, block = model.embedding_layer, cast(TransformerBlock, model.transformer_blocks[0])
    V, H = table.token_embeddings.weight.shape
    positions = cast(Tensor, table.position_table())
    layer = cast(Layer, block.record())
    written = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    config = GPT2Config(
        model_type="gpt2",
        vocab_size=V,
        n_positions=positions.size(0),
        n_embd=H,
        n_layer=len(model.transformer_blocks),
        n_head=layer.attention.heads,
        n_inner=layer.mlp.fc1.weight.size(0),
        activation_function=written[layer.mlp.activation],
        embd_pdrop=table.positional_encoding.dropout.p,
        attn_pdrop=block.self_attn.p,
        resid_pdrop=block.mlp.dropout.p,
        layer_norm_epsilon=cast(Norm, layer.mlp.norm).eps,
        tie_word_embeddings=model.tie_word_embeddings,
    )
    # GPT-2's own vocabulary ends with <|endoftext|>; the tokens of others are not known here.
    end = 50256 if V == 50257 else None
    return {
        **config.model_dump(),
        "architectures": ["GPT2LMHeadModel"],
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": model.padding_idx,
        "dtype": str(table.token_embeddings.weight.dtype).removeprefix("torch."),
    }
