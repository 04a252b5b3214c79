"""Putting the kernels under a model, and saying which of them run."""

import warnings
from collections import Counter
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.gemma2.modeling_gemma2 import Gemma2PreTrainedModel

from fastllm.integrations.huggingface.architectures import FUSED_CLASSES
from fastllm.integrations.huggingface.attention import ATTENTION
from fastllm.integrations.huggingface.fusible import FusedModule
from fastllm.integrations.huggingface.loss import LanguageModel
from fastllm.ops import extension
from fastllm.ops.decode import forget_packed

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model, enable: bool = True, skip_logits: bool | None = None) -> Model:
    """Puts the kernels under a transformers model, in place; `enable=False` removes them.

    Whole layers and the loss are fused in GPT-2, Llama, Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3
    (text), BERT and DistilBERT, the feed-forward networks and the loss in MobileBERT; also in a
    model that peft has wrapped. In every model that supports transformers' attention interface,
    kernels compute attention and dropout.

    If only a loss is computed and no padding is scored, fused layers skip the padding. Greedy
    `generate` and sampling with at least 4 new tokens run by one operation a token; their copy of
    the weights stays in memory until the next training step or `enable=False`.

    Args:
        model: a `PreTrainedModel`, or a module that contains one.
        enable: whether the kernels run.
        skip_logits: whether a call with labels leaves the logits out of its output, so that they
            are never all in memory; None for only in training mode.

    Returns:
        The same model.

    Raises:
        ValueError: the module contains no transformers model.
    """
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not models:
        raise ValueError(
            f"accelerate() takes a model of transformers, got a {type(model).__name__}; fastllm's "
            "own modules are fast without it"
        )
    classes = FUSED_CLASSES
    if not enable:
        classes = {fused: stock for stock, fused in FUSED_CLASSES.items()}
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))
        if isinstance(module, LanguageModel):
            module.skip_logits = skip_logits
        forget_packed(module)
    if enable and extension.kernels is None:
        warnings.warn(f"nothing is accelerated: {extension.problem}", stacklevel=2)
    inner = {id(module) for each in models for module in each.modules() if module is not each}
    for outermost in (each for each in models if id(each) not in inner):
        _switch_attention(outermost, enable)
    return model


def _switch_attention(model: PreTrainedModel, enable: bool) -> None:
    """Selects our attention for a model and all that it contains, or the one it had before."""
    previous = model.__dict__.pop("attention_before", None)
    # Gemma 2 lacks transformers' "sdpa" for its softcap alone, which our attention has.
    if enable and (model._supports_sdpa or isinstance(model, Gemma2PreTrainedModel)):
        model.attention_before = previous or model.config._attn_implementation
        model.set_attn_implementation(ATTENTION)
    elif previous is not None:
        model.set_attn_implementation(previous)


def accelerated(model: nn.Module) -> str:
    """What is fused in an accelerated model, and why the rest is not: a line for each kind."""
    lines = Counter(
        f"{type(module).__name__}: {_summary(module, model)}"
        for module in model.modules()
        if isinstance(module, FusedModule) or _has_no_fused_part(module)
    )
    return "\n".join(f"{count} {line}" for line, count in lines.items())


def _has_no_fused_part(module: nn.Module) -> bool:
    """Whether this is a layer of a transformer none of whose modules has a class of ours."""
    parts = module.modules()
    is_layer = isinstance(module, GradientCheckpointingLayer)
    return is_layer and not any(isinstance(part, FusedModule) for part in parts)


def _summary(module: nn.Module, model: nn.Module) -> str:
    if isinstance(module, FusedModule):
        return module.summary()
    if type(module) in FUSED_CLASSES:
        return "through the modules: accelerate(model) was not called"
    models = (each for each in model.modules() if isinstance(each, PreTrainedModel))
    if any(each.config._attn_implementation == ATTENTION for each in models):
        return "attention fused if it is plain (the layer is none of those fused as a whole)"
    return "through the modules: neither the layer nor its attention is known"
