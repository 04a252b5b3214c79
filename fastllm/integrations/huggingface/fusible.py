"""Whether an operation may stand for a module of transformers, and the parameters it then takes."""

import functools
import sys
from collections.abc import Callable
from operator import attrgetter
from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import activations
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm, Gemma2TextScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm, Gemma3TextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.pytorch_utils import Conv1D

from fastllm.core.fusible import FORWARDS, is_plain
from fastllm.ops import dispatch, extension
from fastllm.ops.decoder import Linear, Norm

Forwards = dict[type[nn.Module], Callable[..., Any]]


def forwards_of(*classes: type[nn.Module]) -> Forwards:
    """The forwards of these classes as they are written, to notice later patches of them."""
    return {cls: cls.forward for cls in classes}


# Their eps is the attribute `variance_epsilon`.
RMS_NORMS = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)
# Their weight is the difference from 1.
OFFSET_RMS_NORMS = (Gemma2RMSNorm, Gemma3RMSNorm)

PLAIN_FORWARDS: Forwards = FORWARDS | forwards_of(
    Conv1D,
    activations.GELUActivation,
    activations.NewGELUActivation,
    activations.GELUTanh,
    activations.SiLUActivation,
    *RMS_NORMS,
    *OFFSET_RMS_NORMS,
    Gemma2TextScaledWordEmbedding,
    Gemma3TextScaledWordEmbedding,
)


class CannotFuse(Exception):
    """Why a module cannot be part of a fused operation."""


class FusedModule(nn.Module):
    """Base of the classes that `accelerate` gives to modules.

    Attributes:
        FUSED_PARTS: what is fused, for a person to read.
        UNFUSED: what runs otherwise.
        bypassed: classes of submodules that are never called when this module is fused.
    """

    FUSED_PARTS: str
    UNFUSED = "through the modules"
    bypassed: ClassVar[Forwards] = {}

    def record(self) -> Any:
        """What the fused operation takes: parameters, and the dropout that applies now.

        Raises:
            CannotFuse: the operation cannot stand for this module.
        """
        raise NotImplementedError

    def why_not(self) -> str | None:
        """Why this module is not fused, or None."""
        try:
            self.record()
            reason = why_not_kernels(next(self.parameters()))
        except CannotFuse as error:
            reason = str(error)
        return reason and f"{self.UNFUSED}: {reason}"

    def summary(self) -> str:
        """What is fused, and why the rest is not."""
        return self.why_not() or self.FUSED_PARTS

    def at(self, path: str) -> Any:
        """The submodule or attribute at a dotted path."""
        return attrgetter(path)(self)

    def assert_bypassable(self, *paths: str) -> None:
        """Raises `CannotFuse` unless the modules there are plain instances of `bypassed`."""
        assert_plain(*map(self.at, paths), known=self.bypassed)


def why_not_kernels(*tensors: Tensor | None) -> str | None:
    """Why the C++ kernels cannot run on these tensors here, or None."""
    return (
        dispatch.why_not_requested("cpu")
        or extension.why_not_here()
        or dispatch.why_not_cpu_fused(*tensors)
    )


FEWEST_ROWS = 16
"""With fewer, and no backward, packing the weights takes longer than the kernels save."""


def are_too_few_rows(x: Tensor) -> bool:
    """Whether the modules take less time for x [..., H]."""
    return not torch.is_grad_enabled() and x.numel() < FEWEST_ROWS * x.size(-1)


# Arguments that transformers hands down to every layer, and that change nothing there: a cache was
# extended before, and a sliding window is part of the mask.
IGNORABLE_KWARGS = {
    *("position_ids", "use_cache", "cache", "output_hidden_states", "num_items_in_batch"),
    *("encoder_attention_mask", "sliding_window"),
}


def are_ignorable(kwargs: dict[str, Any]) -> bool:
    """Whether none of these arguments changes the result of attention."""
    return all(
        name in IGNORABLE_KWARGS or (name == "output_attentions" and not value)
        for name, value in kwargs.items()
    )


def assert_plain(*modules: nn.Module, known: Forwards = PLAIN_FORWARDS) -> None:
    """Raises `CannotFuse` unless these are plain instances of known classes, without hooks."""
    for module in modules:
        if not is_plain(module, known=known):
            raise CannotFuse(f"{type(module).__name__} is subclassed, patched or has hooks")


def activation_name(module: nn.Module) -> str:
    """The operations' name for an activation."""
    assert_plain(module)
    match module:
        case activations.GELUActivation(act=act) if act is F.gelu:
            return "gelu"
        case activations.NewGELUActivation():
            return "gelu_tanh"
        case activations.GELUTanh(act=functools.partial()):
            return "gelu_tanh"
        case nn.ReLU():
            return "relu"
        case nn.SiLU() | activations.SiLUActivation():
            return "silu"
    raise CannotFuse(f"the kernels have no {type(module).__name__}")


def norm_parameters(module: Any) -> Norm:
    """The parameters of a layer norm or an RMS norm."""
    assert_plain(module)
    if isinstance(module, RMS_NORMS):
        return Norm(module.weight, None, module.variance_epsilon, "rms")
    if isinstance(module, OFFSET_RMS_NORMS):
        return Norm(module.weight, None, module.eps, "rms", 1.0)
    if type(module) is not nn.LayerNorm:
        expected("a norm", module)
    return Norm(module.weight, module.bias, module.eps)


def linear_parameters(module: Any) -> Linear:
    """Weight [outputs, inputs] and bias of a linear layer, LoRA's update included."""
    if type(module) is nn.Linear:
        assert_plain(module)
        return Linear(module.weight, module.bias)
    if type(module) is Conv1D:
        assert_plain(module)
        return Linear(module.weight.t(), module.bias)
    lora = sys.modules.get("peft.tuners.lora.layer")
    if lora is None or type(module) is not lora.Linear:
        expected("nn.Linear", module)
    if module.disable_adapters or module.merged or module.lora_variant:
        raise CannotFuse("LoRA is merged, switched off, or a variant such as DoRA")
    if not is_plain(module, known={lora.Linear: lora.Linear.forward}):
        raise CannotFuse("LoRA has hooks")
    weight, bias = linear_parameters(module.base_layer)
    for name in (name for name in module.active_adapters if name in module.lora_A):
        down, up, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
        if getattr(dropout, "p", 0.0) or up.bias is not None:
            raise CannotFuse("LoRA has dropout or a bias")
        assert_plain(down, up)
        # Instead of two thin products with a batch: the sum is as small as the weight.
        with torch.autocast("cpu", enabled=False):
            weight = torch.addmm(weight, up.weight, down.weight, alpha=module.scaling[name])
    return Linear(weight, bias)


def expected(what: str, module: nn.Module) -> NoReturn:
    raise CannotFuse(f"expected {what}, found {type(module).__name__}")
