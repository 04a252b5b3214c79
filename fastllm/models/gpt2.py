"""GPT-2: its initial weights, and models of other settings converted to its architecture.

GPT-2 (Radford et al. 2019) is a Pre-LN decoder with learned positions, unscaled embeddings that the
head shares, and the tanh approximation of GELU.
"""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fastllm.core.fusible import is_plain
from fastllm.core.transformer_block import TransformerBlock
from fastllm.models.huggingface import (
    ACTIVATIONS,
    ARCHITECTURES,
    read_settings,
    refuse,
    tensor_names,
)
from fastllm.models.pretrained import SafeTensors, load_model, missing, write_model
from fastllm.ops.decoder import Layer, Norm
from fastllm.tokenization.base import read_json

if TYPE_CHECKING:
    from fastllm.models.decoder import DecoderModel  # which imports this module

GPT2 = ARCHITECTURES["gpt2"]


def load_gpt2(
    model_class: "type[DecoderModel]",
    source: Any,
    padding_idx: int | None = None,
    device: Any = None,
    dtype: Any = None,
) -> "DecoderModel":
    """See `DecoderModel.from_gpt2`."""
    folder, name = None, "the configuration"
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.is_dir():
            folder, path = path, path / "config.json"
        if not path.is_file():
            raise missing(path)
        name, settings = str(path), read_json(path)
    else:
        # A configuration in memory may leave out the model_type.
        given = source.to_dict() if hasattr(source, "to_dict") else source
        settings = {"model_type": "gpt2", **given}
    try:
        if isinstance(settings, Mapping) and settings.get("model_type", "gpt2") != "gpt2":
            refuse("model_type", "must be 'gpt2'", settings["model_type"])
        _, config = read_settings(settings, padding_idx)
        std = settings.get("initializer_range", 0.02)
        if not isinstance(std, (int, float)) or not 0 <= std < math.inf:
            refuse("initializer_range", "must be a positive number", std)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if folder is not None:
        with SafeTensors(folder, GPT2) as tensors:
            return load_model(model_class, tensors, GPT2, config, device, dtype)
    model = model_class.from_config(config, device, dtype)
    _initialise(model, std)
    return model


def save_gpt2(model: "DecoderModel", directory: str | os.PathLike[str]) -> None:
    """See `DecoderModel.save_gpt2`."""
    check_gpt2(model)
    write_model(model, directory, GPT2, config_json(model))


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

    The token embeddings are multiplied by their scale, and the final norm, if the head is tied to
    them, is divided by it. Sinusoidal positions become a table of positions.

    GPT-2's head has no bias. A nonzero bias becomes a column of the head's matrix, which is then
    not tied, for a channel in which the last layer norm always returns 1. This widens the model by
    whole attention heads, and the residual stream is 0 in all of the new channels. In the old
    channels the layer norms return the same as before: everything added to the residual stream
    loses its mean over the channels, which layer norms ignore, so the mean over more channels is 0
    as well; and the layer norms' weights and epsilons compensate for a variance over more channels.

    Raises:
        ValueError: GPT-2's format cannot express the model even so; the message says why.
    """
    check_gpt2(model, convertible=True)
    table, block = model.embedding_layer, cast(TransformerBlock, model.transformer_blocks[0])
    layer = cast(Layer, block.record())
    V, H = table.token_embeddings.weight.shape
    N, D = layer.attention.heads, H // layer.attention.heads
    biased = model.lm_head.bias is not None and bool(model.lm_head.bias.any())
    heads = N + (_more_heads(N, D) if biased else 0)
    result = type(model)(
        V,
        heads * D,
        len(model.transformer_blocks),
        heads,
        model.max_seq_len,
        layer.mlp.fc1.weight.size(0),
        pos_encoding_learned=True,
        embedding_dropout_p=table.positional_encoding.dropout.p,
        attn_dropout_p=block.self_attn.p,
        mlp_dropout_p=block.mlp.dropout.p,
        mlp_activation=layer.mlp.activation,
        norm_eps=cast(Norm, layer.mlp.norm).eps * N / heads,
        padding_idx=model.padding_idx,
        lm_head_bias=False,
        dtype=table.token_embeddings.weight.dtype,
        tie_word_embeddings=model.tie_word_embeddings and not biased,
        scale_embeddings=False,
    )
    result.load_state_dict(_converted_weights(model, result.hidden_size - H))
    return result.train(model.training)


def _more_heads(heads: int, head_dim: int) -> int:
    """The least number of more heads that keeps a width in blocks of 32, as formats of 4 and 8 bits
    need it, in such blocks."""
    return 1 if heads * head_dim % 32 else 32 // math.gcd(32, head_dim)


def _converted_weights(model: "DecoderModel", extra: int) -> dict[str, Tensor]:
    """The state dict of `convert_to_gpt2`'s result, in float64.

    Args:
        extra: new channels, for the head's bias if there are any.
    """
    table, H = model.embedding_layer, model.hidden_size

    def channels(tensor: Tensor, dim: int = -1, parts: int = 1) -> Tensor:
        return _padded(tensor, dim, parts, extra)

    def residual(tensor: Tensor, dim: int = -1) -> Tensor:
        """For parameters whose output is added to the residual stream."""
        return channels(tensor - tensor.mean(dim, keepdim=True) if extra else tensor, dim)

    old = {name: tensor.double().cpu() for name, tensor in model.state_dict().items()}
    new = {name: channels(old[name]) for name in old if "norm" in name}
    for name in new:
        if name.endswith("weight"):
            new[name] *= math.sqrt(H / (H + extra))
    for i in range(len(model.transformer_blocks)):
        attention, mlp = f"transformer_blocks.{i}.self_attn.", f"transformer_blocks.{i}.mlp."
        new |= {
            f"{attention}qkv_proj.weight": channels(
                channels(old[f"{attention}qkv_proj.weight"]), 0, parts=3
            ),
            f"{attention}qkv_proj.bias": channels(old[f"{attention}qkv_proj.bias"], parts=3),
            f"{attention}out_proj.weight": residual(
                channels(old[f"{attention}out_proj.weight"]), 0
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
    if model.tie_word_embeddings and not extra:
        for kind in ("weight", "bias"):
            new[f"final_norm.{kind}"] /= table.scale
        return new
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
    unnamed = set(model.state_dict()).difference(tensor_names(GPT2.tensors, len(layers)))
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
    settings = {
        "model_type": "gpt2",
        "vocab_size": V,
        "n_positions": positions.size(0),
        "n_embd": H,
        "n_layer": len(model.transformer_blocks),
        "n_head": layer.attention.heads,
        "n_inner": layer.mlp.fc1.weight.size(0),
        "activation_function": written[layer.mlp.activation],
        "embd_pdrop": table.positional_encoding.dropout.p,
        "attn_pdrop": block.self_attn.p,
        "resid_pdrop": block.mlp.dropout.p,
        "layer_norm_epsilon": cast(Norm, layer.mlp.norm).eps,
        "tie_word_embeddings": model.tie_word_embeddings,
    }
    # GPT-2's own vocabulary ends with <|endoftext|>; the tokens of others are not known here.
    end = 50256 if V == 50257 else None
    return {**settings, "bos_token_id": end, "eos_token_id": end}
