"""fastllm's kernels under the models of transformers, in place: `accelerate(model)`.

A module gets one of the classes below, which inherits from the one that it had and differs in
`forward` alone: parameters, names, checkpoints and `isinstance` stay as they were. The operations
take the parameters of several modules and call none of them, so a layer looks first whether
anything was attached to these, and goes through its modules when it finds something; peft's LoRA it
knows. Attention that is not part of a fused layer comes by transformers' own hook for it.

All of this is for CPUs. Generation with a cache goes through the modules.
"""

import functools
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, activations
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import (
    CausalLMOutputWithCrossAttentions,
    CausalLMOutputWithPast,
    MaskedLMOutput,
)
from transformers.models.bert import modeling_bert as bert
from transformers.models.distilbert import modeling_distilbert as distilbert
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.models.llama import modeling_llama as llama
from transformers.models.mobilebert import modeling_mobilebert as mobilebert
from transformers.pytorch_utils import Conv1D

from fastllm.core.attachments import FORWARDS, plain
from fastllm.core.dropout import Dropout
from fastllm.ops import dispatch
from fastllm.ops.attention import attention
from fastllm.ops.dropout import draw_seed
from fastllm.ops.linear_cross_entropy import linear_cross_entropy
from fastllm.ops.mlp import mlp
from fastllm.ops.multi_head_attention import Settings, multi_head_attention
from fastllm.ops.parameters import Linear, Norm, check_first_derivative

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model, enable: bool = True, skip_logits: bool | None = None) -> Model:
    """Puts the kernels under a transformers model, in place; `enable=False` takes them away again.

    Whole layers and the loss are fused in GPT-2, BERT and DistilBERT, the feed-forward networks and
    the loss in MobileBERT, the loss in Llama; also where peft has wrapped the model. Attention and
    dropout are run by kernels in every model that has transformers' attention interface.

    Where a loss alone is computed, and no padding is scored, fused layers leave out the padding.

    Args:
        model: a `PreTrainedModel`, or a module that contains one.
        enable: whether the kernels are to run.
        skip_logits: whether a call with labels leaves the logits out of its output, so that they
            never exist as a whole; None for in training mode alone.

    Returns:
        The same model.

    Raises:
        ValueError: there is no transformers model in it.
    """
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not models:
        raise ValueError(
            f"accelerate() takes a model of transformers, got a {type(model).__name__}; fastllm's "
            "own modules need none of it"
        )
    replacements = FUSED if enable else {fused: original for original, fused in FUSED.items()}
    for module in model.modules():
        module.__class__ = replacements.get(type(module), type(module))
    for each in models:
        if isinstance(each, LanguageModel):
            each.skip_logits = skip_logits
    if enable and dispatch.kernels is None:
        warnings.warn(f"nothing is accelerated: {dispatch.extension_problem}", stacklevel=2)
    inner = {id(module) for each in models for module in each.modules() if module is not each}
    for outer in (each for each in models if id(each) not in inner):
        # It sets the attention of all that it contains.
        before = outer.__dict__.pop("attention_before", None)
        if enable and outer._supports_sdpa:
            outer.attention_before = before or outer.config._attn_implementation
            outer.set_attn_implementation("fastllm")
        elif before is not None:
            outer.set_attn_implementation(before)
    return model


def accelerated(model: nn.Module) -> str:
    """What the kernels run of an accelerated model, and why not the rest: a line for each kind."""
    lines: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, Layer | LanguageModel):
            lines[f"{type(module).__name__}: {module.why_not() or module.FUSED_PARTS}"] += 1
    return "\n".join(f"{count} {line}" for line, count in lines.items())


# What a fused operation may take the place of.


def why_not_kernels(*tensors: Tensor | None) -> str | None:
    """Why the C++ kernels are not to run on these tensors here and now, or None."""
    if dispatch.requested() not in ("auto", "cpu"):
        return f"'{dispatch.requested()}' was asked for"
    return dispatch.why_not_fused(*tensors)


# Modules whose work an operation may do, with their forwards as they were written.
KNOWN: dict[type[nn.Module], Callable[..., Any]] = FORWARDS | {
    cls: cls.forward
    for cls in (
        nn.Dropout,
        Conv1D,
        activations.GELUActivation,
        activations.NewGELUActivation,
        activations.GELUTanh,
        gpt2.GPT2Attention,
        gpt2.GPT2MLP,
        bert.BertAttention,
        bert.BertSelfAttention,
        bert.BertSelfOutput,
        bert.BertIntermediate,
        bert.BertOutput,
        bert.BertOnlyMLMHead,
        bert.BertLMPredictionHead,
        distilbert.DistilBertSelfAttention,
        distilbert.FFN,
        mobilebert.MobileBertIntermediate,
        mobilebert.MobileBertOnlyMLMHead,
        mobilebert.MobileBertLMPredictionHead,
        mobilebert.FFNOutput,
    )
}


class NotFused(Exception):
    """Why a module cannot be part of a fused operation."""


def understood(settings: dict[str, Any]) -> bool:
    """Whether nothing that a model hands to its attention changes what is computed there.

    A cache has been added to by then, and a window is in the mask.
    """
    return all(
        name in UNDERSTOOD or (name == "output_attentions" and not value)
        for name, value in settings.items()
    )


UNDERSTOOD = {
    *("position_ids", "use_cache", "cache", "output_hidden_states", "num_items_in_batch"),
    *("encoder_attention_mask", "sliding_window"),
}


def untouched(*modules: nn.Module) -> None:
    """Raises `NotFused` where one of these is of another class, or something is attached to it."""
    for module in modules:
        if not plain(module, known=KNOWN):
            raise NotFused(f"a {type(module).__name__} is of a class of its own, or has hooks")


def activation_of(module: nn.Module) -> str:
    """The operation's name for an activation."""
    untouched(module)
    match module:
        case activations.GELUActivation(act=act) if act is F.gelu:
            return "gelu"
        case activations.NewGELUActivation():
            return "gelu_tanh"
        case activations.GELUTanh(act=functools.partial()):
            return "gelu_tanh"
        case nn.ReLU():
            return "relu"
        case nn.SiLU():
            return "silu"
    raise NotFused(f"the kernels know no {type(module).__name__}")


def norm_of(module: Any) -> Norm:
    """The parameters of a layer norm."""
    untouched(module)
    if type(module) is not nn.LayerNorm or module.weight is None or module.bias is None:
        raise NotFused(f"a {type(module).__name__} is no layer norm with weight and bias")
    return Norm(module.weight, module.bias, module.eps)


def linear_of(module: Any) -> Linear:
    """Weight [outputs, inputs] and bias of a linear layer, with what LoRA adds to it."""
    if type(module) is nn.Linear:
        untouched(module)
        return Linear(module.weight, module.bias)
    if type(module) is Conv1D:
        untouched(module)
        return Linear(module.weight.t(), module.bias)
    peft = sys.modules.get("peft.tuners.lora.layer")
    if peft is None or type(module) is not peft.Linear:
        raise NotFused(f"a {type(module).__name__} stands where a linear layer was")
    if module.disable_adapters or module.merged or module.lora_variant:
        raise NotFused("LoRA is merged, switched off, or a variant such as DoRA")
    if not plain(module, known={peft.Linear: peft.Linear.forward}):
        raise NotFused("LoRA has hooks")
    weight, bias = linear_of(module.base_layer)
    for name in (name for name in module.active_adapters if name in module.lora_A):
        down, up, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
        if getattr(dropout, "p", 0.0) or up.bias is not None:
            raise NotFused("LoRA has dropout or a bias")
        untouched(down, up)
        # Instead of two thin products with a batch: the sum is as small as the weight.
        weight = weight + module.scaling[name] * (up.weight @ down.weight)
    return Linear(weight, bias)


def active(dropout: Any, owner: Any = None) -> float:
    """The probability that holds now; attention goes by its own mode, not by its dropout's."""
    return dropout.p if (owner or dropout).training else 0.0


def joined(*modules: Any) -> Linear:
    """Linear layers of one input as one."""
    weights, biases = zip(*map(linear_of, modules), strict=True)
    if any(bias is None for bias in biases):
        raise NotFused("a projection has no bias")
    return Linear(torch.cat(weights), torch.cat(biases))


# Layers.


class Parts(NamedTuple):
    """What a transformer layer consists of, with the dropout that holds now.

    Attributes:
        weights_p, out_p, mlp_p: of the attention's weights and output, and of what fc2 gives.
    """

    norm_first: bool
    norm1: Norm
    qkv: Linear
    out: Linear
    num_heads: int
    is_causal: bool
    weights_p: float
    out_p: float
    norm2: Norm
    fc1: Linear
    fc2: Linear
    activation: str
    mlp_p: float


class Layer(nn.Module):
    """A module of transformers that operations may stand for."""

    FUSED_PARTS = "whole layers fused"

    def parts(self) -> Any:
        """Parameters and settings; raises `NotFused` where an operation cannot take them."""
        raise NotImplementedError

    def why_not(self) -> str | None:
        """Why it goes through its modules, or None."""
        try:
            self.parts()
        except NotFused as error:
            return f"through the modules: {error}"
        reason = why_not_kernels(next(self.parameters()))
        return reason and f"through the modules: {reason}"


class TransformerLayer(Layer):
    """Attention and feed-forward network, each with layer norm and residual connection."""

    def fused(
        self, hidden_states: Tensor, attention_mask: Tensor | None, settings: dict[str, Any]
    ) -> Tensor | None:
        """What `forward` gives, by two operations; None where the modules have to do it."""
        if not understood(settings):
            return None
        if attention_mask is not None and attention_mask.dtype is not torch.bool:
            return None  # a mask for another attention than ours
        try:
            parts = self.parts()
        except NotFused:
            return None
        x = dispatch.autocast_input(hidden_states, parts.qkv.weight)
        if why_not_kernels(x, *parts.qkv, *parts.out, *parts.fc1, *parts.fc2) is not None:
            return None
        padding = getattr(attention_mask, "padding", None)
        if padding is None or padding.is_causal != parts.is_causal:
            hidden = None if attention_mask is None else ~attention_mask
            is_causal = parts.is_causal and hidden is None  # else the mask says it
            return run(parts, x, hidden, is_causal, None)
        flat = x.flatten(0, 1)
        rows = flat.index_select(0, padding.rows)
        rows = run(parts, rows, None, parts.is_causal, padding.starts)
        return torch.zeros_like(flat).index_copy(0, padding.rows, rows).view_as(x)


def run(
    parts: Parts,
    x: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    starts: tuple[int, ...] | None,
) -> Tensor:
    """One layer of x: [B, S, H], or [rows, H] with `starts`."""

    def draw(p: float) -> tuple[float, int]:
        return p, draw_seed() if p else 0

    norm_first = parts.norm_first
    dropouts = *draw(parts.weights_p), *draw(parts.out_p)
    settings = Settings(parts.num_heads, attn_mask, is_causal, *dropouts, norm_first, starts)
    x = multi_head_attention(x, parts.qkv, parts.out, settings, parts.norm1)
    feed_forward = (parts.fc1, parts.fc2, parts.activation, 0.0, 0)
    return mlp(x, *feed_forward, parts.norm2, norm_first, *draw(parts.mlp_p))


class GPT2Block(TransformerLayer, gpt2.GPT2Block):
    def forward(
        self,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        *others: Any,
        **settings: Any,
    ) -> Any:
        if cache is None and encoder_hidden_states is None:
            out = self.fused(hidden_states, attention_mask, settings)
            if out is not None:
                return out
        return super().forward(
            hidden_states, cache, attention_mask, encoder_hidden_states, *others, **settings
        )

    def parts(self) -> Parts:
        attn, feed_forward = self.attn, self.mlp
        untouched(attn, feed_forward, attn.attn_dropout, attn.resid_dropout, feed_forward.dropout)
        if abs(attn.scaling * attn.head_dim**0.5 - 1) > 1e-6:
            raise NotFused("the scores are not divided by the square root of the heads' width")
        return Parts(
            True,
            norm_of(self.ln_1),
            linear_of(attn.c_attn),
            linear_of(attn.c_proj),
            attn.num_heads,
            attn.is_causal,
            active(attn.attn_dropout, attn),
            active(attn.resid_dropout),
            norm_of(self.ln_2),
            linear_of(feed_forward.c_fc),
            linear_of(feed_forward.c_proj),
            activation_of(feed_forward.act),
            active(feed_forward.dropout),
        )


class BertLayer(TransformerLayer, bert.BertLayer):
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cache: Any = None,
        **settings: Any,
    ) -> Any:
        if cache is None and encoder_hidden_states is None:
            out = self.fused(hidden_states, attention_mask, settings)
            if out is not None:
                return out
        return super().forward(
            hidden_states,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            cache,
            **settings,
        )

    def parts(self) -> Parts:
        inner, behind = self.attention.self, self.attention.output
        untouched(self.attention, inner, inner.dropout, behind, behind.dropout)
        untouched(self.intermediate, self.output, self.output.dropout)
        return Parts(
            False,
            norm_of(behind.LayerNorm),
            joined(inner.query, inner.key, inner.value),
            linear_of(behind.dense),
            inner.num_attention_heads,
            inner.is_causal,
            active(inner.dropout, inner),
            active(behind.dropout),
            norm_of(self.output.LayerNorm),
            linear_of(self.intermediate.dense),
            linear_of(self.output.dense),
            activation_of(self.intermediate.intermediate_act_fn),
            active(self.output.dropout),
        )


class TransformerBlock(TransformerLayer, distilbert.TransformerBlock):
    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **settings: Any
    ) -> Any:
        out = self.fused(hidden_states, attention_mask, settings)
        if out is not None:
            return out
        return super().forward(hidden_states, attention_mask, **settings)

    def parts(self) -> Parts:
        attn, ffn = self.attention, self.ffn
        untouched(attn, attn.dropout, ffn, ffn.dropout)
        return Parts(
            False,
            norm_of(self.sa_layer_norm),
            joined(attn.q_lin, attn.k_lin, attn.v_lin),
            linear_of(attn.out_lin),
            attn.n_heads,
            attn.is_causal,
            active(attn.dropout, attn),
            0.0,
            norm_of(self.output_layer_norm),
            linear_of(ffn.lin1),
            linear_of(ffn.lin2),
            activation_of(ffn.activation),
            active(ffn.dropout),
        )


class FFNLayer(Layer, mobilebert.FFNLayer):
    """Three of the four feed-forward networks in a layer of MobileBERT."""

    FUSED_PARTS = (
        "feed-forward networks fused (not the whole layer: q and k have another input than v, and "
        "NoNorm is no layer norm)"
    )

    def forward(self, hidden_states: Tensor) -> Tensor:
        try:
            fc1, fc2, activation = self.parts()
        except NotFused:
            return super().forward(hidden_states)
        x = dispatch.autocast_input(hidden_states, fc1.weight)
        if why_not_kernels(x, *fc1, *fc2) is not None:
            return super().forward(hidden_states)
        return self.output.LayerNorm(mlp(x, fc1, fc2, activation) + x)

    def parts(self) -> tuple[Linear, Linear, str]:
        untouched(self.intermediate, self.output)
        return (
            linear_of(self.intermediate.dense),
            linear_of(self.output.dense),
            activation_of(self.intermediate.intermediate_act_fn),
        )


# Padding.


class Padding(NamedTuple):
    """What is left of a padded batch, as an attribute of the mask that its layers share."""

    rows: Tensor  # where what is no padding stands among all B S positions
    starts: tuple[int, ...]  # of each sequence among these
    is_causal: bool


def padding_of(mask: Tensor) -> Padding | None:
    """What a mask [B, 1, S, S], True where a query sees a key, hides, if that is padding alone."""
    B, _, S, T = mask.shape
    seen = mask[:, 0].any(1)
    for is_causal in (False, True):
        simple = seen[:, None].expand(B, S, T)
        if S == T and torch.equal(mask[:, 0], simple.tril() if is_causal else simple):
            starts = tuple(accumulate(seen.sum(1).tolist(), initial=0))
            return Padding(seen.flatten().nonzero().flatten(), starts, is_causal)
    return None


# Whether nobody will look at what the layers give for padding.
_padding_is_unread: ContextVar[bool] = ContextVar("padding_is_unread", default=False)


@contextmanager
def padding_unread(unread: bool) -> Iterator[None]:
    token = _padding_is_unread.set(unread)
    try:
        yield
    finally:
        _padding_is_unread.reset(token)


def attention_mask(*arguments: Any, **settings: Any) -> Tensor | None:
    """For transformers' `AttentionMaskInterface`: the mask of its "sdpa", with its `padding`."""
    mask = sdpa_mask(*arguments, **settings)
    if mask is not None and _padding_is_unread.get():
        mask.padding = padding_of(mask)  # type: ignore[attr-defined]
    return mask


# Language models: the loss from the hidden states.


class LanguageModel(nn.Module):
    """A model with a head over the vocabulary."""

    FUSED_PARTS = "loss fused"

    skip_logits: bool | None = None

    def head(self) -> Linear:
        """The last layer; raises `NotFused` where the loss is not the usual one of it."""
        if self.loss_function is not ForCausalLMLoss:
            raise NotFused("it has a loss function of its own")
        return linear_of(self.lm_head)

    def head_input(self, hidden_states: Tensor) -> Tensor:
        """What it takes for hidden states [rows, H]."""
        return hidden_states

    def why_not(self) -> str | None:
        """Why the loss is computed from logits, or None."""
        try:
            reason = why_not_kernels(*self.head())
        except NotFused as error:
            reason = str(error)
        return reason and f"loss from the logits: {reason}"


ROWS_AT_ONCE = 64


def loss_from_hidden_states(
    forward: Callable[..., Any], output: type[Any], causal: bool
) -> Callable[..., Any]:
    """`forward` of a language model that makes no logits where they are skipped.

    The loss is that of transformers' `ForCausalLMLoss` and `ForMaskedLMLoss`, `num_items_in_batch`
    included, which its own `BertForMaskedLM` and the like do not look at.
    """

    @functools.wraps(forward)  # Trainer and generate() read its signature
    def fused(self: Any, *arguments: Any, **settings: Any) -> Any:
        if not issubclass(type(self), LanguageModel):  # the Trainer keeps the forward that it found
            return forward(self, *arguments, **settings)
        labels, logits = settings.get("labels"), settings.get("logits_to_keep", 0)
        skipped = self.training if self.skip_logits is None else self.skip_logits
        as_dict = settings.get("return_dict")
        as_dict = self.config.return_dict if as_dict is None else as_dict
        if labels is None or not skipped or not as_dict or not isinstance(logits, int) or logits:
            return forward(self, *arguments, **settings)
        try:
            head = self.head()
        except NotFused:
            return forward(self, *arguments, **settings)
        if why_not_kernels(*head) is not None:
            return forward(self, *arguments, **settings)
        for name in ("labels", "logits_to_keep", "return_dict"):
            settings.pop(name, None)
        items, targets = (
            settings.pop("num_items_in_batch", None),
            settings.pop("shift_labels", None),
        )
        ignore_index = settings.pop("ignore_index", -100)
        if causal:
            settings.setdefault("use_cache", False)
            if targets is None:
                targets = F.pad(labels[:, 1:], (0, 1), value=ignore_index)
        else:
            targets = labels
        present = settings.get("attention_mask")
        unread = (
            present is not None
            and present.shape == targets.shape
            and not (settings.get("output_hidden_states") or self.config.output_hidden_states)
            and keeps_masks(self)
            and not ((targets != ignore_index) & (present == 0)).any()
        )
        head = tied(self, settings, head)
        with padding_unread(unread):
            outputs = self.base_model(*arguments, **settings, return_dict=True)
        targets = targets.flatten()
        scored = (targets != ignore_index).nonzero().flatten()
        # Filled up, so that steps differ little in sizes: many sizes leave gaps in memory.
        fill = -len(scored) % ROWS_AT_ONCE
        chosen = F.pad(scored, (0, fill))
        targets = F.pad(targets[scored], (0, fill), value=ignore_index)
        rows = self.head_input(outputs.last_hidden_state.flatten(0, 1).index_select(0, chosen))
        if items is not None and len(scored) == 0:
            loss = F.linear(rows, *head).sum()  # nothing, where a mean would be no number
        else:
            loss = linear_cross_entropy(rows, head, targets, ignore_index)
            if items is not None:
                loss = loss * (len(scored) / items)
        fields = set(output.__dataclass_fields__)
        return output(loss=loss, **{k: v for k, v in outputs.items() if k in fields})

    return fused


def keeps_masks(model: nn.Module) -> bool:
    """Whether the backward of a checkpointed layer sees the mask that its forward saw."""
    layers = [module for module in model.modules() if isinstance(module, TransformerLayer)]
    functions = [getattr(layer, "_gradient_checkpointing_func", None) for layer in layers]
    keywords = [getattr(function, "keywords", {}) for function in functions]
    return bool(layers) and not any(each.get("use_reentrant") for each in keywords)


def tied(model: Any, settings: dict[str, Any], head: Linear) -> Linear:
    """The head; where it shares the embeddings, `settings` get these in the place of token ids."""
    embeddings, ids = model.get_input_embeddings(), settings.get("input_ids")
    if ids is None or head.weight is not embeddings.weight or not head.weight.requires_grad:
        return head
    if not plain(embeddings) or embeddings.max_norm or embeddings.scale_grad_by_freq:
        return head
    del settings["input_ids"]
    settings["inputs_embeds"], weight = Tied.apply(head.weight, ids, embeddings.padding_idx)
    return Linear(weight, head.bias)


class Tied(torch.autograd.Function):
    """A weight as embeddings of tokens and as a head.

    Autograd by itself makes a gradient of the embeddings for the whole vocabulary, zero but for a
    batch's tokens, and adds it to the head's. Here these few rows are added.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, ids: Tensor, padding_idx: int | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ids)
        ctx.padding_idx = padding_idx
        return F.embedding(ids, weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor, grad_head: Tensor) -> tuple[Tensor, None, None]:
        check_first_derivative()
        (ids,) = ctx.saved_tensors
        if ctx.padding_idx is not None:
            grad_rows = grad_rows.masked_fill((ids == ctx.padding_idx)[..., None], 0)
        # Into the head's, which was made for this backward: nothing but the loss has the head.
        return grad_head.index_add_(0, ids.flatten(), grad_rows.flatten(0, -2)), None, None


class GPT2LMHeadModel(LanguageModel, gpt2.GPT2LMHeadModel):
    forward = loss_from_hidden_states(
        gpt2.GPT2LMHeadModel.forward, CausalLMOutputWithCrossAttentions, True
    )


class LlamaForCausalLM(LanguageModel, llama.LlamaForCausalLM):
    forward = loss_from_hidden_states(llama.LlamaForCausalLM.forward, CausalLMOutputWithPast, True)


class BertForMaskedLM(LanguageModel, bert.BertForMaskedLM):
    forward = loss_from_hidden_states(bert.BertForMaskedLM.forward, MaskedLMOutput, False)

    def head(self) -> Linear:
        untouched(self.cls, self.cls.predictions)
        return linear_of(self.cls.predictions.decoder)

    def head_input(self, hidden_states: Tensor) -> Tensor:
        return self.cls.predictions.transform(hidden_states)


class DistilBertForMaskedLM(LanguageModel, distilbert.DistilBertForMaskedLM):
    forward = loss_from_hidden_states(
        distilbert.DistilBertForMaskedLM.forward, MaskedLMOutput, False
    )

    def head(self) -> Linear:
        loss = self.mlm_loss_fct
        usual = type(loss) is nn.CrossEntropyLoss and loss.weight is None
        if not usual or (loss.ignore_index, loss.label_smoothing, loss.reduction) != (
            -100,
            0,
            "mean",
        ):
            raise NotFused("it has a loss function of its own")
        return linear_of(self.vocab_projector)

    def head_input(self, hidden_states: Tensor) -> Tensor:
        return self.vocab_layer_norm(self.activation(self.vocab_transform(hidden_states)))


class MobileBertForMaskedLM(LanguageModel, mobilebert.MobileBertForMaskedLM):
    forward = loss_from_hidden_states(
        mobilebert.MobileBertForMaskedLM.forward, MaskedLMOutput, False
    )

    def head(self) -> Linear:
        predictions = self.cls.predictions
        untouched(self.cls, predictions, predictions.dense)
        weight, bias = linear_of(predictions.decoder)
        # The embeddings' columns, tied, and as many more as the hidden states are wider.
        return Linear(torch.cat((weight, predictions.dense.weight.t()), 1), bias)

    def head_input(self, hidden_states: Tensor) -> Tensor:
        return self.cls.predictions.transform(hidden_states)


# Attention and dropout of any model.


class FusedDropout(Dropout):
    """`nn.Dropout` by the kernel, where it can serve."""

    def forward(self, input: Tensor) -> Tensor:
        if why_not_kernels(input) is not None:
            return nn.Dropout.forward(self, input)
        return super().forward(input)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """For transformers' `AttentionInterface`: q [B, N, S, D], k and v [B, N, T, D] to [B, S, N, D].

    What the kernel does not know is left to transformers' "sdpa", whose masks it shares.
    """
    S, D = query.shape[-2:]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    is_causal = is_causal and attention_mask is None and S > 1
    q, k, v = query, key, value
    if torch.is_autocast_enabled("cpu"):
        q, k, v = q.float(), k.float(), v.float()
    if (
        why_not_kernels(q, k, v) is not None
        or (attention_mask is not None and attention_mask.dtype is not torch.bool)
        or (is_causal and k.size(2) != S)  # transformers aligns them at the beginning
        or k.size(-1) != v.size(-1)
        or not understood(settings)
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **settings
        )
    groups = q.size(1) // k.size(1)
    k, v = repeat_kv(k, groups), repeat_kv(v, groups)
    if scaling is not None:
        q = q * (scaling * D**0.5)  # the operation divides by the root
    hidden = None if attention_mask is None else ~attention_mask
    seed = draw_seed() if dropout else 0
    return attention(q, k, v, hidden, is_causal, dropout, seed).transpose(1, 2), None


AttentionInterface.register("fastllm", attention_forward)
AttentionMaskInterface.register("fastllm", attention_mask)

# A module of just the class on the left gets the one on the right.
FUSED: dict[type[nn.Module], type[nn.Module]] = {
    gpt2.GPT2Block: GPT2Block,
    gpt2.GPT2LMHeadModel: GPT2LMHeadModel,
    bert.BertLayer: BertLayer,
    bert.BertForMaskedLM: BertForMaskedLM,
    distilbert.TransformerBlock: TransformerBlock,
    distilbert.DistilBertForMaskedLM: DistilBertForMaskedLM,
    mobilebert.FFNLayer: FFNLayer,
    mobilebert.MobileBertForMaskedLM: MobileBertForMaskedLM,
    llama.LlamaForCausalLM: LlamaForCausalLM,
    nn.Dropout: FusedDropout,
}
KNOWN[FusedDropout] = FusedDropout.forward
