"""The loss of a language model straight from its hidden states, without logits."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.generation.configuration_utils import GenerationMode
from transformers.loss.loss_utils import ForCausalLMLoss

from fastllm.core.fusible import is_plain
from fastllm.integrations.huggingface.fusible import (
    PLAIN_FORWARDS,
    CannotFuse,
    FusedModule,
    linear_parameters,
    why_not_kernels,
)
from fastllm.integrations.huggingface.generation import (
    DecoderPaths,
    DecodingCache,
    decoder_record,
)
from fastllm.integrations.huggingface.layers import TransformerLayer
from fastllm.integrations.huggingface.padding import skip_padding
from fastllm.ops.autograd import check_first_derivative
from fastllm.ops.decode import forget_packed
from fastllm.ops.decoder import Decoder, Linear
from fastllm.ops.linear_cross_entropy import linear_cross_entropy

ROWS_MULTIPLE = 64
"""Scored rows are filled up to a multiple of this: with many different sizes, memory fragments."""


class HeadPaths(NamedTuple):
    """Where the language model of an architecture keeps its head, as paths of submodules.

    Attributes:
        output: the class of what `forward` returns.
        causal: whether position t predicts token t + 1 rather than its own.
        linear: the linear layer over the vocabulary.
        transform: what is called, in turn, between the last hidden states and `linear`.
        containers: modules whose forwards are bypassed.
        softcap: the cap of the logits, see `linear_cross_entropy`.
        decoder: the rest of a model that generates.
    """

    output: type[Any]
    causal: bool
    linear: str
    transform: tuple[str, ...] = ()
    containers: tuple[str, ...] = ()
    softcap: str | None = None
    decoder: DecoderPaths | None = None


class LanguageModel(FusedModule):
    """A model with a head over the vocabulary.

    Attributes:
        skip_logits: see `accelerate`.
    """

    FUSED_PARTS = "loss fused"
    UNFUSED = "loss from the logits"

    skip_logits: bool | None = None
    paths: ClassVar[HeadPaths]

    # Of `PreTrainedModel`, which subclasses inherit from as well.
    config: Any
    base_model: Any
    get_input_embeddings: Any
    loss_function: Any

    def record(self) -> Linear:
        """The head."""
        if self.paths.causal and self.loss_function is not ForCausalLMLoss:
            raise CannotFuse("the model has a loss function of its own")
        self.assert_bypassable(*self.paths.containers)
        return linear_parameters(self.at(self.paths.linear))

    def why_not(self) -> str | None:
        """Why the loss is computed from logits, or None."""
        try:
            reason = why_not_kernels(*self.record())
        except CannotFuse as error:
            reason = str(error)
        return reason and f"{self.UNFUSED}: {reason}"

    def summary(self) -> str:
        loss = super().summary()
        if self.paths.decoder is None:
            return loss
        try:
            self.decoder(length=1)
        except CannotFuse as error:
            return f"{loss}; generation {FusedModule.UNFUSED}: {error}"
        return f"{loss}; generation fused"

    @property
    def softcap(self) -> float | None:
        """The cap of the logits, if they have one."""
        return self.at(self.paths.softcap) if self.paths.softcap else None

    def decoder(self, length: int) -> Decoder:
        """The whole model for sequences of up to `length` tokens.

        Raises:
            CannotFuse: its modules must generate.
        """
        if self.paths.decoder is None:
            raise CannotFuse("it is no decoder")
        head = linear_parameters(self.at(self.paths.linear))
        return decoder_record(self, self.paths.decoder, head, self.softcap, length)

    def _prepare_cache_for_generation(
        self: Any,
        generation_config: Any,
        model_kwargs: Any,
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """transformers' own, with the kernel's cache in place of its default one."""
        super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        cache = model_kwargs.get("cache")
        if (
            self.paths.decoder is not None
            and type(cache) is DynamicCache
            and not (cache.offloading or hasattr(cache, "_is_user_defined"))
            and generation_mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        ):
            model_kwargs["cache"] = DecodingCache(self, max_cache_length)

    def skips_logits(
        self,
        labels: Tensor | None = None,
        logits_to_keep: Any = 0,
        return_dict: bool | None = None,
        **others: Any,
    ) -> bool:
        """Whether a call with these arguments returns no logits."""
        skip = self.training if self.skip_logits is None else self.skip_logits
        as_dict = self.config.return_dict if return_dict is None else return_dict
        keeps_none = isinstance(logits_to_keep, int) and logits_to_keep == 0
        return bool(labels is not None and skip and as_dict and keeps_none)

    def forward_without_logits(
        self,
        head: Linear,
        *args: Any,
        labels: Tensor,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Any = None,
        ignore_index: int = -100,
        logits_to_keep: int = 0,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """`forward`, with the loss of transformers' `ForCausalLMLoss` or `ForMaskedLMLoss`.

        Unlike its own `BertForMaskedLM` and the like, this honours `num_items_in_batch`.
        """
        if not self.paths.causal:
            targets = labels
        else:
            kwargs.setdefault("use_cache", False)
            if shift_labels is not None:
                targets = shift_labels
            else:
                targets = F.pad(labels[:, 1:], (0, 1), value=ignore_index)
        if torch.is_grad_enabled():
            forget_packed(self)  # what `generate` packed: the weights are about to change
        padding_is_unread = self._padding_is_unread(targets != ignore_index, **kwargs)
        head = self._tie_embeddings(head, kwargs)
        with skip_padding(padding_is_unread):
            outputs = self.base_model(*args, **kwargs, return_dict=True)
        hidden_states = outputs.last_hidden_state.flatten(0, 1)
        loss = self._loss(hidden_states, head, targets.flatten(), ignore_index, num_items_in_batch)
        fields = self.paths.output.__dataclass_fields__
        return self.paths.output(loss=loss, **{k: v for k, v in outputs.items() if k in fields})

    def _padding_is_unread(
        self,
        scored: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **others: Any,
    ) -> bool:
        """Whether nothing reads the hidden states of padding: no loss, no caller, no backward."""
        return (
            attention_mask is not None
            and attention_mask.shape == scored.shape
            and not (output_hidden_states or self.config.output_hidden_states)
            and checkpoints_keep_masks(self)
            and not (scored & (attention_mask == 0)).any()
        )

    def _tie_embeddings(self, head: Linear, kwargs: dict[str, Any]) -> Linear:
        """The head; with tied weights, `kwargs` get the embeddings in place of the token ids."""
        embeddings, ids = self.get_input_embeddings(), kwargs.get("input_ids")
        if ids is None or head.weight is not embeddings.weight or not head.weight.requires_grad:
            return head
        if not is_plain(embeddings, known=PLAIN_FORWARDS):
            return head
        if embeddings.max_norm or embeddings.scale_grad_by_freq:
            return head
        del kwargs["input_ids"]
        rows, weight = TiedEmbeddingFunction.apply(
            head.weight, head.weight, ids, embeddings.padding_idx
        )
        scale = getattr(embeddings, "embed_scale", None)
        kwargs["inputs_embeds"] = rows if scale is None else rows * scale
        return Linear(weight, head.bias)

    def _loss(
        self,
        hidden_states: Tensor,
        head: Linear,
        targets: Tensor,
        ignore_index: int,
        num_items_in_batch: Any,
    ) -> Tensor:
        """The mean over the scored rows of [rows, H], or their sum over `num_items_in_batch`."""
        scored = (targets != ignore_index).nonzero().flatten()
        fill = -len(scored) % ROWS_MULTIPLE
        targets = F.pad(targets[scored], (0, fill), value=ignore_index)
        rows = hidden_states.index_select(0, F.pad(scored, (0, fill)))
        for path in self.paths.transform:
            rows = self.at(path)(rows)
        softcap = self.softcap
        if num_items_in_batch is None:
            return linear_cross_entropy(rows, head, targets, ignore_index, softcap)
        if len(scored) == 0:
            return F.linear(rows, *head).sum()  # 0; the mean over no tokens would be NaN
        loss = linear_cross_entropy(rows, head, targets, ignore_index, softcap)
        return loss * (len(scored) / num_items_in_batch)


def with_fused_loss(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` of a `LanguageModel`, without logits if it can and may do without."""

    @functools.wraps(forward)  # Trainer and generate() read its signature
    def fused_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # The Trainer keeps the bound method that it found, beyond accelerate(enable=False).
        if not issubclass(type(self), LanguageModel):
            return forward(self, *args, **kwargs)
        cache = kwargs.get("cache")
        if type(cache) is DecodingCache and not args:
            others = {name: value for name, value in kwargs.items() if name != "cache"}
            if (logits := cache.extend(**others)) is not None:
                return self.paths.output(logits=logits, cache=cache)
        if self.skips_logits(**kwargs):
            try:
                head = self.record()
            except CannotFuse:
                return forward(self, *args, **kwargs)
            if why_not_kernels(*head) is None:
                return self.forward_without_logits(head, *args, **kwargs)
        return forward(self, *args, **kwargs)

    return fused_forward


def checkpoints_keep_masks(model: nn.Module) -> bool:
    """Whether the backward of a checkpointed layer sees the mask that its forward saw."""
    layers = [module for module in model.modules() if isinstance(module, TransformerLayer)]
    functions = [getattr(layer, "_gradient_checkpointing_func", None) for layer in layers]
    keywords = [getattr(function, "keywords", {}) for function in functions]
    return bool(layers) and not any(each.get("use_reentrant") for each in keywords)


class TiedEmbeddingFunction(torch.autograd.Function):
    """The embeddings of tokens, and the same weight for the head.

    Left to itself, autograd adds to the head's gradient another one of the whole vocabulary, zero
    except for a batch's tokens. Here it adds only the rows of these tokens. The weight is passed
    twice and gets two gradients: autograd adds a sparse one that came first to the dense one in
    place, unless something else, such as a hook, holds that as well.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, head_weight: Tensor, ids: Tensor, padding_idx: int | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ids)
        ctx.padding_idx, ctx.size = padding_idx, weight.shape
        return F.embedding(ids, weight), head_weight.view_as(head_weight)

    @staticmethod
    def backward(
        ctx: Any, grad_embeddings: Tensor, grad_head: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        check_first_derivative()
        (ids,) = ctx.saved_tensors
        if ctx.padding_idx is not None:
            is_padding = (ids == ctx.padding_idx)[..., None]
            grad_embeddings = grad_embeddings.masked_fill(is_padding, 0)
        grad_rows = torch.sparse_coo_tensor(
            ids.view(1, -1), grad_embeddings.flatten(0, -2), ctx.size, check_invariants=False
        )
        return grad_rows, grad_head, None, None
