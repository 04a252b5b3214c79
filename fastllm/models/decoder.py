"""The decoder-only language model."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastllm.core.attn.mha import KeyValueCache
from fastllm.core.embedding import EmbeddingLayer
from fastllm.core.fusible import FORWARDS, all_are, is_plain, plain_norm
from fastllm.core.norm import AllHeadsRMSNorm, OffsetRMSNorm
from fastllm.core.rotary import RotaryEncoding
from fastllm.core.transformer_block import TransformerBlock
from fastllm.ops.decode import forget_packed
from fastllm.ops.decoder import Decoder, Linear
from fastllm.ops.decoder_loss import decoder_loss, why_not
from fastllm.ops.dispatch import requested, use
from fastllm.ops.embedding import check_token_ids
from fastllm.ops.linear_cross_entropy import linear_cross_entropy
from fastllm.ops.norm import norm
from fastllm.ops.torch_private import children, submodules, weight_and_bias

if TYPE_CHECKING:
    from fastllm.models.config import DecoderConfig, Rotation


class DecoderModel(nn.Module):
    """Embedding, transformer blocks, final norm (unless Post-LN) and a linear head.

    The arguments are a short form of the most common settings of a `DecoderConfig`; `from_config`
    takes all of them.

    Args:
        vocab_size: V.
        hidden_size: H.
        num_layers: L.
        num_heads: N.
        max_seq_len: the longest sequence, in tokens.
        mlp_intermediate_size: I; 4 H unless given.
        pos_encoding_learned: learned positions instead of sinusoidal ones.
        embedding_dropout_p, attn_dropout_p, mlp_dropout_p: dropout probabilities.
        mlp_activation: a name known to `MLP`, or a module.
        norm_eps: of every layer norm.
        norm_first: Pre-LN rather than Post-LN.
        is_causal: every position sees only itself and earlier ones.
        padding_idx: a token that is embedded as zero and ignored as a target. With tied weights
            only its initial value is zero: the head trains that row, as in PyTorch.
        qkv_bias, mlp_bias, lm_head_bias: biases in those linear layers.
        tie_word_embeddings: `lm_head.weight` is the embedding's parameter.
        scale_embeddings: token embeddings are multiplied by sqrt(H).

    Attributes:
        config: everything that the model was made from.
        settings: the arguments of the constructor, without device and dtype; or for `from_config`,
            the fields of the configuration.
        gradient_checkpointing: save only each block's input and rerun its forward in the backward:
            less memory, a third more time. Off by default.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        max_seq_len: int = 512,
        mlp_intermediate_size: int | None = None,
        pos_encoding_learned: bool = False,
        embedding_dropout_p: float = 0.1,
        attn_dropout_p: float = 0.1,
        mlp_dropout_p: float = 0.1,
        mlp_activation: str | nn.Module = "gelu",
        norm_eps: float = 1e-5,
        norm_first: bool = True,
        is_causal: bool = True,
        padding_idx: int | None = None,
        qkv_bias: bool = True,
        mlp_bias: bool = True,
        lm_head_bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        tie_word_embeddings: bool = False,
        scale_embeddings: bool = True,
    ) -> None:
        settings = {
            name: argument
            for name, argument in locals().items()
            if name not in ("self", "__class__", "device", "dtype")
        }
        from fastllm.models.config import DecoderConfig  # which takes a tenth of a second

        config = DecoderConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            max_seq_len=max_seq_len,
            mlp_intermediate_size=mlp_intermediate_size or 0,
            pos_encoding="learned" if pos_encoding_learned else "sinusoidal",
            embedding_dropout_p=embedding_dropout_p,
            attn_dropout_p=attn_dropout_p,
            mlp_dropout_p=mlp_dropout_p,
            mlp=cast(Any, mlp_activation),  # checked by the configuration
            norm_eps=norm_eps,
            norm_order="pre" if norm_first else "post",
            causal=is_causal,
            padding_idx=padding_idx,
            qkv_bias=qkv_bias,
            mlp_bias=mlp_bias,
            lm_head_bias=lm_head_bias,
            tie_word_embeddings=tie_word_embeddings,
            embedding_scale=math.sqrt(hidden_size) if scale_embeddings else 1.0,
        )
        self._build(config, settings, device, dtype)

    @classmethod
    def from_config(
        cls, config: DecoderConfig, device: Any = None, dtype: Any = None
    ) -> DecoderModel:
        """An untrained model with all settings of a configuration, in training mode."""
        model = cls.__new__(cls)
        model._build(config, config.model_dump(), device, dtype)
        return model

    @classmethod
    def from_settings(
        cls, settings: dict[str, Any], device: Any = None, dtype: Any = None
    ) -> DecoderModel:
        """An untrained model with the `settings` of another."""
        if "norm_order" in settings:
            from fastllm.models.config import DecoderConfig

            return cls.from_config(DecoderConfig(**settings), device, dtype)
        return cls(**settings, device=device, dtype=dtype)

    def _build(
        self, config: DecoderConfig, settings: dict[str, Any], device: Any, dtype: Any
    ) -> None:
        super().__init__()
        self.config = config
        self.settings = settings
        self.vocab_size = config.vocab_size
        self.hidden_size = config.hidden_size
        self.max_seq_len = config.max_seq_len
        self.norm_first = config.norm_order != "post"
        self.gradient_checkpointing = False
        self.embedding_layer = EmbeddingLayer(
            config.vocab_size,
            config.hidden_size,
            config.max_seq_len,
            config.pos_encoding == "learned",
            config.embedding_dropout_p,
            config.padding_idx,
            device=device,
            dtype=dtype,
            scale=config.embedding_scale,
            positions=config.pos_encoding in ("sinusoidal", "learned"),
        )
        self.padding_idx = self.embedding_layer.padding_idx
        rotaries: dict[Rotation, RotaryEncoding] = {}
        self.transformer_blocks = nn.ModuleList(
            make_block(config, i, rotaries, device, dtype) for i in range(config.num_layers)
        )
        self.final_norm = (
            norm_type(config)(config.hidden_size, eps=config.norm_eps, device=device, dtype=dtype)
            if self.norm_first
            else None
        )
        self.lm_head = nn.Linear(
            config.hidden_size,
            config.vocab_size,
            bias=config.lm_head_bias,
            device=device,
            dtype=dtype,
        )
        if config.tie_word_embeddings:
            self._tie()

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        padding_idx: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> DecoderModel:
        """A model in Hugging Face's format or llama.cpp's, in training mode.

        Its dropout of attention weights is also that of the attention's output here, and its
        dropout of an MLP's output that of the activations.

        Args:
            source: a folder with config.json and model.safetensors (or its shards and their index),
                a run of `fastllm finetune`, the name of a model on the hub, or a GGUF file, whose
                weights are unpacked.
            padding_idx: as in the constructor. `pad_token_id` is not used for it, because it is
                often the end-of-text token, which is also to be learnt.
            dtype: the weights' type; PyTorch's default unless given.

        Raises:
            FileNotFoundError: a file is missing; the message names it.
            ValueError: this class does not have the architecture or one of its settings, or weights
                and configuration do not match; the message names the key or the tensor.
        """
        from fastllm.models.gguf import load_gguf
        from fastllm.models.pretrained import load_pretrained

        if Path(source).suffix == ".gguf":
            return load_gguf(cls, Path(source), padding_idx, device, dtype)
        return load_pretrained(cls, source, padding_idx, device, dtype)

    def save_pretrained(
        self, folder: str | os.PathLike[str], **token_ids: int | list[int] | None
    ) -> None:
        """Writes config.json and model.safetensors for transformers.

        The architecture is the first that computes the same as this model. `padding_idx` is written
        as `pad_token_id`.

        Args:
            token_ids: `bos_token_id`, `eos_token_id` and the like, for config.json.

        Raises:
            ValueError: no architecture computes the same, or modules were replaced; the message
                says why, and nothing is written.
        """
        from fastllm.models.pretrained import save_pretrained

        check_as_built(self)
        save_pretrained(self, folder, **token_ids)

    @classmethod
    def from_gpt2(
        cls, source: Any, padding_idx: int | None = None, device: Any = None, dtype: Any = None
    ) -> DecoderModel:
        """A GPT-2 in Hugging Face's format, or a new model of its architecture; in training mode.

        A folder provides weights. For a configuration alone, they are random as in GPT-2: normal
        with a standard deviation of 0.02, divided by sqrt(2 L) for layers that add to the residual
        stream.

        GPT-2's `embd_pdrop` becomes the embedding's dropout, `attn_pdrop` that of the attention's
        weights and output, and `resid_pdrop` the MLP's, which lies between activation and fc2 here.

        Args:
            source: a folder with config.json and model.safetensors (or its shards and their index);
                or a configuration: the path of a config.json, a dict, a `GPT2Config`.
            padding_idx: as in the constructor. `pad_token_id` is not used for it, because it is
                often the end-of-text token, which is also to be learnt.
            dtype: the weights' type; PyTorch's default unless given.

        Raises:
            FileNotFoundError: a file is missing; the message names it.
            ValueError: it is not a GPT-2, this model cannot compute it, or weights and
                configuration do not match; the message names the key or the tensor.
        """
        from fastllm.models.gpt2 import load_gpt2

        return load_gpt2(cls, source, padding_idx, device, dtype)

    def save_gpt2(self, directory: str | os.PathLike[str]) -> None:
        """Writes config.json and model.safetensors for transformers' `GPT2LMHeadModel`.

        The dropout probabilities are those of the first block. `padding_idx` is written as
        `pad_token_id`.

        Raises:
            ValueError: GPT-2's format cannot express this model; the message says why, and nothing
                is written.
        """
        from fastllm.models.gpt2 import save_gpt2

        save_gpt2(self, directory)

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether `lm_head.weight` is the embedding's parameter."""
        tokens = getattr(self.embedding_layer, "token_embeddings", None)
        weight = getattr(self.lm_head, "weight", None)
        return weight is not None and weight is getattr(tokens, "weight", None)

    def new_caches(self) -> list[KeyValueCache]:
        """Empty caches for `forward`, one per block, for sequences of up to `max_seq_len`."""
        return [KeyValueCache(self.max_seq_len) for _ in self.transformer_blocks]

    def forward(
        self,
        input_ids: Tensor,
        attn_mask: Tensor | None = None,
        caches: Sequence[KeyValueCache] | None = None,
    ) -> Tensor:
        """Logits [B, S, V] for the token after each of `input_ids` [B, S].

        Args:
            input_ids: integers in [0, V).
            attn_mask: boolean, broadcastable to [B, N, S, S]; **True means masked**.
            caches: the positions before `input_ids`, from `new_caches`; the new positions are
                appended.

        Raises:
            IndexError: an id is outside the vocabulary.
            ValueError: the sequence is longer than `max_seq_len`.
        """
        return self.capped(self.lm_head(self.hidden_states(input_ids, attn_mask, caches)))

    def capped(self, logits: Tensor) -> Tensor:
        """The head's output with the configuration's `head_softcap`."""
        softcap = self.config.head_softcap
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def hidden_states(
        self,
        input_ids: Tensor,
        attn_mask: Tensor | None = None,
        caches: Sequence[KeyValueCache] | None = None,
    ) -> Tensor:
        """The head's input, [B, S, H]; arguments as for `forward`."""
        if caches is None:
            x = self.embedding_layer(input_ids)
            for block in self.transformer_blocks:
                if self.gradient_checkpointing and torch.is_grad_enabled():
                    x = checkpoint(
                        block, x, attn_mask, use_reentrant=False, context_fn=same_implementation
                    )
                else:
                    x = block(x, attn_mask)
        else:
            x = self.embedding_layer(input_ids, caches[0].length if caches else 0)
            for block, cache in zip(self.transformer_blocks, caches, strict=True):
                x = block(x, attn_mask, cache=cache)
        if self.final_norm is None:
            return x
        record = plain_norm(self.final_norm, self.hidden_size)
        return self.final_norm(x) if record is None else norm(x, record)

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attn_mask: Tensor | None = None,
        ignore_index: int = -100,
    ) -> Tensor:
        """Mean cross-entropy of the **next** token: position t is scored against `labels[:, t+1]`.

        Args:
            input_ids: [B, S], integers in [0, V).
            labels: [B, S], usually `input_ids` itself; the caller does not shift them.
            attn_mask: as in `forward`.
            ignore_index: a label that is not scored; neither is `padding_idx`.

        Returns:
            A scalar in nats per token; NaN if there is nothing to score.

        Raises:
            IndexError: an id or a label is outside the vocabulary.
            ValueError: labels and inputs differ in shape.
        """
        if labels.shape != input_ids.shape:
            raise ValueError(
                f"labels {tuple(labels.shape)} and input_ids {tuple(input_ids.shape)} must have "
                "the same shape: the caller does not shift the labels"
            )
        decoder = self.record(input_ids.size(1), attn_mask)
        if isinstance(decoder, Decoder) and why_not(decoder, input_ids, labels) is None:
            return decoder_loss(decoder, input_ids, labels, ignore_index)
        targets = self.targets(labels, ignore_index)
        if all_are(nn.Linear, self.lm_head) and is_plain(self, self.lm_head):
            # The last position is not scored; padding the targets avoids copying x.
            unscored = labels.size(1) - targets.size(1)
            targets = F.pad(targets, (0, unscored), value=ignore_index)
            x = self.hidden_states(input_ids, attn_mask)
            head = Linear(self.lm_head.weight, self.lm_head.bias)
            softcap = self.config.head_softcap
            return linear_cross_entropy(x, head, targets, ignore_index, softcap)
        logits = self(input_ids, attn_mask)[:, :-1]
        check_token_ids(targets[targets != ignore_index], logits.size(-1))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=ignore_index)

    def why_not_fused_loss(self, input_ids: Tensor, attn_mask: Tensor | None = None) -> str | None:
        """Why `loss` computes layer by layer rather than the whole model at once, or None."""
        decoder = self.record(input_ids.size(1), attn_mask)
        return decoder if isinstance(decoder, str) else why_not(decoder, input_ids, input_ids)

    def record(self, length: int, attn_mask: Tensor | None = None) -> Decoder | str:
        """Parameters and settings of the whole model for sequences of `length` tokens, seeds not
        drawn yet; or the reason why the model's modules must run.

        Raises:
            ValueError: `length` exceeds `max_seq_len`.
        """
        table, container, head = submodules(
            self, "embedding_layer", "transformer_blocks", "lm_head"
        )
        final_norm = self.final_norm  # None in a Post-LN model
        blocks = children(container)
        if not all_are(nn.ModuleList, container) or not all_are(TransformerBlock, *blocks):
            return "transformer_blocks holds something other than plain transformer blocks"
        if not all_are(EmbeddingLayer, table) or not is_plain(table):
            return "embedding_layer is replaced, or something is attached to it"
        if not all_are(nn.Linear, head) or not is_plain(self, head):
            return "lm_head is replaced, or something is attached to it or to the model"
        if not is_plain(*blocks):
            return "something is attached to a transformer block"
        norm = None if final_norm is None else plain_norm(final_norm, self.hidden_size)
        if norm is None and final_norm is not None:
            return "final_norm is replaced, or something is attached to it"
        embedding = table.record(0, length)
        if embedding is None:
            return (
                "embedding_layer has a part unknown to the operations, or something is attached "
                "to it"
            )
        if embedding.padding_idx != self.padding_idx:
            return "the model's padding_idx differs from that of its embeddings"
        layers = [block.record(attn_mask) for block in blocks]
        if None in layers:
            return (
                f"transformer_blocks.{layers.index(None)} has a part unknown to the operations, "
                "or something is attached to it"
            )
        head_record = Linear(*weight_and_bias(head))
        return Decoder(embedding, layers, norm, head_record, length, self.config.head_softcap)

    def train(self, mode: bool = True) -> DecoderModel:
        """As for every module; training mode also frees the packed weights kept for generation."""
        if mode:
            forget_packed(self)
        return super().train(mode)

    def targets(self, labels: Tensor, ignore_index: int = -100) -> Tensor:
        """The targets of `loss`, [B, S - 1]: the next labels, `ignore_index` for padding."""
        targets = labels[:, 1:]
        if self.padding_idx is not None:
            targets = targets.masked_fill(targets == self.padding_idx, ignore_index)
        return targets

    def _tie(self) -> None:
        self.lm_head.weight = self.embedding_layer.token_embeddings.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DecoderModel:
        # Functions such as `to_empty` make a new parameter for each name of a tied weight.
        tied = self.tie_word_embeddings
        super()._apply(fn, recurse)
        if tied:
            self._tie()
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, *others: Any
    ) -> None:
        # A tied weight may be stored once, under either name, or twice with equal values.
        names = [f"{prefix}embedding_layer.token_embeddings.weight", f"{prefix}lm_head.weight"]
        found = [state_dict[name] for name in names if name in state_dict]
        if self.tie_word_embeddings and found:
            first, last = found[0], found[-1]
            if not (first.is_set_to(last) or torch.equal(first, last)):
                errors = others[-1]
                errors.append(
                    f"'{names[0]}' and '{names[1]}' differ, but the model ties them; load them "
                    "into one with tie_word_embeddings=False"
                )
            if local_metadata.get("assign_to_params_buffers"):
                first = nn.Parameter(first)  # otherwise each name gets its own
            state_dict.update(dict.fromkeys(names, first))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)


def check_as_built(model: DecoderModel) -> None:
    """Raises a `ValueError` unless the model's settings make a model of the same modules."""
    if not isinstance(model.config.mlp, str):
        raise ValueError("only activations with a name can be saved; give mlp_activation its name")
    with torch.device("meta"):
        again = DecoderModel.from_settings(model.settings)
    own, expected = ({n: type(m) for n, m in each.named_modules()} for each in (model, again))
    for name in {**expected, **own}:
        if own.get(name) is not expected.get(name):
            found = own[name].__name__ if name in own else "nothing"
            place = f"'{name}'" if name else "the model"
            raise ValueError(
                f"{place} is {found}, not what DecoderModel was built with; put the original "
                "module back before saving, or save its state_dict with torch.save"
            )
    shapes, wanted = ({n: p.shape for n, p in each.state_dict().items()} for each in (model, again))
    if shapes != wanted:
        name = min(n for n in {*shapes, *wanted} if shapes.get(n) != wanted.get(n))
        raise ValueError(f"'{name}' does not have the shape that DecoderModel gives it")


def norm_type(config: DecoderConfig) -> Callable[..., nn.Module]:
    """Builds a norm of the configuration from `(hidden_size, eps=, device=, dtype=)`."""
    if config.norm == "layer":
        affine, bias = config.norm_weight, config.norm_bias
        return partial(nn.LayerNorm, elementwise_affine=affine, bias=bias)
    if config.norm_offset:
        return partial(OffsetRMSNorm, offset=config.norm_offset)
    return partial(nn.RMSNorm, elementwise_affine=config.norm_weight)


def head_norm_type(
    config: DecoderConfig, device: Any, dtype: Any
) -> Callable[[int], nn.Module] | None:
    """Builds the norm of queries or keys from its width; None if they have none."""
    if config.qk_norm is None:
        return None
    make: Callable[..., nn.Module] = partial(nn.RMSNorm, elementwise_affine=False)
    if config.qk_norm == "all_heads":
        make = AllHeadsRMSNorm
    if config.qk_norm == "weight":
        offset = config.norm_offset
        make = partial(OffsetRMSNorm, offset=offset) if offset else nn.RMSNorm
    return partial(make, eps=config.norm_eps, device=device, dtype=dtype)


def make_block(
    config: DecoderConfig,
    layer: int,
    rotaries: dict[Rotation, RotaryEncoding],
    device: Any,
    dtype: Any,
) -> TransformerBlock:
    """An untrained block for this layer.

    Args:
        rotaries: of the layers before; one that is missing is added.
    """
    rotation = config.rotation_of(layer)
    if rotation is not None and rotation not in rotaries:
        angles, factor = rotation
        rotaries[rotation] = RotaryEncoding(
            angles, config.max_seq_len, factor, config.rope_interleaved, device
        )
    return TransformerBlock(
        config.hidden_size,
        config.num_heads,
        config.mlp_intermediate_size,
        config.attn_dropout_p,
        config.mlp_dropout_p,
        config.activation,
        config.norm_eps,
        config.norm_order != "post",
        config.causal,
        config.qkv_bias,
        config.mlp_bias,
        device=device,
        dtype=dtype,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        separate_qkv=config.separate_qkv,
        out_bias=config.out_bias,
        rotary=None if rotation is None else rotaries[rotation],
        qk_norm=head_norm_type(config, device, dtype),
        window=config.window_of(layer),
        scale=config.attn_scale,
        softcap=config.attn_softcap,
        gated=config.gated,
        norm_type=norm_type(config),
        out_norms=config.norm_order in ("sandwich", "output"),
        parallel=config.norm_order == "parallel",
        residual_scale=config.residual_scale,
        in_norms=config.norm_order != "output",
        qk_norm_of_all_heads=config.qk_norm == "all_heads",
    )


def same_implementation() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For `checkpoint`: a rerun uses the implementation requested in the forward."""
    return nullcontext(), use(requested())


FORWARDS[DecoderModel] = DecoderModel.forward
