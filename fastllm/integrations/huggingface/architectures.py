"""The architectures that are fused: for each class of transformers, one that keeps its name.

An entry says where the modules are; what is done with them is in `layers` and `loss`.
"""

import torch
from torch import nn
from transformers.modeling_outputs import (
    CausalLMOutputWithCrossAttentions,
    CausalLMOutputWithPast,
    MaskedLMOutput,
)
from transformers.models.bert import modeling_bert as bert
from transformers.models.distilbert import modeling_distilbert as distilbert
from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.gemma3 import modeling_gemma3 as gemma3
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.mobilebert import modeling_mobilebert as mobilebert
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from fastllm.integrations.huggingface.attention import FusedDropout
from fastllm.integrations.huggingface.fusible import CannotFuse, forwards_of, linear_parameters
from fastllm.integrations.huggingface.generation import DecoderPaths
from fastllm.integrations.huggingface.layers import (
    FeedForward,
    FeedForwardPaths,
    LayerPaths,
    TransformerLayer,
)
from fastllm.integrations.huggingface.loss import HeadPaths, LanguageModel, with_fused_loss
from fastllm.ops.decoder import Linear


class GPT2Block(TransformerLayer, gpt2.GPT2Block):
    paths = LayerPaths(
        norm_first=True,
        containers=("mlp",),
        norm1="ln_1",
        attention="attn",
        num_heads="attn.num_heads",
        qkv=("attn.c_attn",),
        out="attn.c_proj",
        weights_dropout="attn.attn_dropout",
        out_dropout="attn.resid_dropout",
        norm2="ln_2",
        fc1="mlp.c_fc",
        activation="mlp.act",
        fc2="mlp.c_proj",
        mlp_dropout="mlp.dropout",
    )
    bypassed = forwards_of(gpt2.GPT2Attention, gpt2.GPT2MLP)


class GPT2LMHeadModel(LanguageModel, gpt2.GPT2LMHeadModel):
    forward = with_fused_loss(gpt2.GPT2LMHeadModel.forward)
    paths = HeadPaths(
        CausalLMOutputWithCrossAttentions,
        causal=True,
        linear="lm_head",
        decoder=DecoderPaths(
            base="transformer",
            embedding="transformer.wte",
            positions="transformer.wpe",
            dropout="transformer.drop",
            layers="transformer.h",
            norm="transformer.ln_f",
        ),
    )
    bypassed = forwards_of(gpt2.GPT2Model, GPT2Block)


LLAMA_LAYER = LayerPaths(
    norm_first=True,
    containers=("mlp",),
    norm1="input_layernorm",
    attention="self_attn",
    num_heads="self_attn.config.num_attention_heads",
    num_kv_heads="self_attn.config.num_key_value_heads",
    rotary=True,
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.o_proj",
    weights_dropout="self_attn.attention_dropout",
    norm2="post_attention_layernorm",
    fc1="mlp.gate_proj",
    up="mlp.up_proj",
    activation="mlp.act_fn",
    fc2="mlp.down_proj",
)
LLAMA_HEAD = HeadPaths(
    CausalLMOutputWithPast,
    causal=True,
    linear="lm_head",
    decoder=DecoderPaths(
        base="model",
        embedding="model.embed_tokens",
        rotary="model.rotary_emb",
        layers="model.layers",
        norm="model.norm",
    ),
)


class LlamaDecoderLayer(TransformerLayer, llama.LlamaDecoderLayer):
    paths = LLAMA_LAYER
    bypassed = forwards_of(llama.LlamaAttention, llama.LlamaMLP)


class LlamaForCausalLM(LanguageModel, llama.LlamaForCausalLM):
    forward = with_fused_loss(llama.LlamaForCausalLM.forward)
    paths = LLAMA_HEAD
    bypassed = forwards_of(llama.LlamaModel, llama.LlamaRotaryEmbedding, LlamaDecoderLayer)


class MistralDecoderLayer(TransformerLayer, mistral.MistralDecoderLayer):
    paths = LLAMA_LAYER._replace(window="self_attn.config.sliding_window")
    bypassed = forwards_of(mistral.MistralAttention, mistral.MistralMLP)


class MistralForCausalLM(LanguageModel, mistral.MistralForCausalLM):
    forward = with_fused_loss(mistral.MistralForCausalLM.forward)
    paths = LLAMA_HEAD
    bypassed = forwards_of(
        mistral.MistralModel, mistral.MistralRotaryEmbedding, MistralDecoderLayer
    )


class Qwen2DecoderLayer(TransformerLayer, qwen2.Qwen2DecoderLayer):
    paths = LLAMA_LAYER._replace(window="self_attn.sliding_window")
    bypassed = forwards_of(qwen2.Qwen2Attention, qwen2.Qwen2MLP)


class Qwen2ForCausalLM(LanguageModel, qwen2.Qwen2ForCausalLM):
    forward = with_fused_loss(qwen2.Qwen2ForCausalLM.forward)
    paths = LLAMA_HEAD
    bypassed = forwards_of(qwen2.Qwen2Model, qwen2.Qwen2RotaryEmbedding, Qwen2DecoderLayer)


class Qwen3DecoderLayer(TransformerLayer, qwen3.Qwen3DecoderLayer):
    paths = LLAMA_LAYER._replace(
        window="self_attn.sliding_window", q_norm="self_attn.q_norm", k_norm="self_attn.k_norm"
    )
    bypassed = forwards_of(qwen3.Qwen3Attention, qwen3.Qwen3MLP)


class Qwen3ForCausalLM(LanguageModel, qwen3.Qwen3ForCausalLM):
    forward = with_fused_loss(qwen3.Qwen3ForCausalLM.forward)
    paths = LLAMA_HEAD
    bypassed = forwards_of(qwen3.Qwen3Model, qwen3.Qwen3RotaryEmbedding, Qwen3DecoderLayer)


GEMMA2_LAYER = LLAMA_LAYER._replace(
    out_norm1="post_attention_layernorm",
    norm2="pre_feedforward_layernorm",
    out_norm2="post_feedforward_layernorm",
    window="self_attn.sliding_window",
    softcap="self_attn.attn_logit_softcapping",
)
GEMMA_HEAD = LLAMA_HEAD._replace(softcap="config.final_logit_softcapping")


class Gemma2DecoderLayer(TransformerLayer, gemma2.Gemma2DecoderLayer):
    paths = GEMMA2_LAYER
    bypassed = forwards_of(gemma2.Gemma2Attention, gemma2.Gemma2MLP)


class Gemma2ForCausalLM(LanguageModel, gemma2.Gemma2ForCausalLM):
    forward = with_fused_loss(gemma2.Gemma2ForCausalLM.forward)
    paths = GEMMA_HEAD
    bypassed = forwards_of(gemma2.Gemma2Model, gemma2.Gemma2RotaryEmbedding, Gemma2DecoderLayer)


class Gemma3DecoderLayer(TransformerLayer, gemma3.Gemma3DecoderLayer):
    paths = GEMMA2_LAYER._replace(
        softcap=None, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm"
    )
    bypassed = forwards_of(gemma3.Gemma3Attention, gemma3.Gemma3MLP)


class Gemma3ForCausalLM(LanguageModel, gemma3.Gemma3ForCausalLM):
    forward = with_fused_loss(gemma3.Gemma3ForCausalLM.forward)
    paths = GEMMA_HEAD
    bypassed = forwards_of(gemma3.Gemma3TextModel, gemma3.Gemma3RotaryEmbedding, Gemma3DecoderLayer)


class BertLayer(TransformerLayer, bert.BertLayer):
    paths = LayerPaths(
        norm_first=False,
        containers=("attention", "attention.output", "intermediate", "output"),
        norm1="attention.output.LayerNorm",
        attention="attention.self",
        num_heads="attention.self.num_attention_heads",
        qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
        out="attention.output.dense",
        weights_dropout="attention.self.dropout",
        out_dropout="attention.output.dropout",
        norm2="output.LayerNorm",
        fc1="intermediate.dense",
        activation="intermediate.intermediate_act_fn",
        fc2="output.dense",
        mlp_dropout="output.dropout",
    )
    bypassed = forwards_of(
        bert.BertAttention,
        bert.BertSelfAttention,
        bert.BertSelfOutput,
        bert.BertIntermediate,
        bert.BertOutput,
    )


class BertForMaskedLM(LanguageModel, bert.BertForMaskedLM):
    forward = with_fused_loss(bert.BertForMaskedLM.forward)
    paths = HeadPaths(
        MaskedLMOutput,
        causal=False,
        linear="cls.predictions.decoder",
        transform=("cls.predictions.transform",),
        containers=("cls", "cls.predictions"),
    )
    bypassed = forwards_of(bert.BertOnlyMLMHead, bert.BertLMPredictionHead)


class TransformerBlock(TransformerLayer, distilbert.TransformerBlock):
    paths = LayerPaths(
        norm_first=False,
        containers=("ffn",),
        norm1="sa_layer_norm",
        attention="attention",
        num_heads="attention.n_heads",
        qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        out="attention.out_lin",
        weights_dropout="attention.dropout",
        out_dropout=None,
        norm2="output_layer_norm",
        fc1="ffn.lin1",
        activation="ffn.activation",
        fc2="ffn.lin2",
        mlp_dropout="ffn.dropout",
    )
    bypassed = forwards_of(distilbert.DistilBertSelfAttention, distilbert.FFN)


class DistilBertForMaskedLM(LanguageModel, distilbert.DistilBertForMaskedLM):
    forward = with_fused_loss(distilbert.DistilBertForMaskedLM.forward)
    paths = HeadPaths(
        MaskedLMOutput,
        causal=False,
        linear="vocab_projector",
        transform=("vocab_transform", "activation", "vocab_layer_norm"),
    )

    def record(self) -> Linear:
        loss = self.mlm_loss_fct
        if (
            type(loss) is not nn.CrossEntropyLoss
            or loss.weight is not None
            or (loss.ignore_index, loss.label_smoothing, loss.reduction) != (-100, 0, "mean")
        ):
            raise CannotFuse("the model has a loss function of its own")
        return super().record()


class FFNLayer(FeedForward, mobilebert.FFNLayer):
    """Three of the four feed-forward networks in a layer of MobileBERT."""

    FUSED_PARTS = (
        "feed-forward networks fused (not the whole layer: q and k have another input than v, and "
        "NoNorm is not a layer norm)"
    )
    paths = FeedForwardPaths(
        containers=("intermediate", "output"),
        fc1="intermediate.dense",
        activation="intermediate.intermediate_act_fn",
        fc2="output.dense",
        norm="output.LayerNorm",
    )
    bypassed = forwards_of(mobilebert.MobileBertIntermediate, mobilebert.FFNOutput)


class MobileBertForMaskedLM(LanguageModel, mobilebert.MobileBertForMaskedLM):
    forward = with_fused_loss(mobilebert.MobileBertForMaskedLM.forward)
    paths = HeadPaths(
        MaskedLMOutput,
        causal=False,
        linear="cls.predictions.decoder",
        transform=("cls.predictions.transform",),
        containers=("cls", "cls.predictions"),
    )
    bypassed = forwards_of(mobilebert.MobileBertOnlyMLMHead, mobilebert.MobileBertLMPredictionHead)

    def record(self) -> Linear:
        """The columns of the embeddings, tied, then `dense`: hidden states are wider than these."""
        weight, bias = super().record()
        more_columns = linear_parameters(self.cls.predictions.dense).weight.t()
        return Linear(torch.cat((weight, more_columns), 1), bias)


FUSED_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    gpt2.GPT2Block: GPT2Block,
    gpt2.GPT2LMHeadModel: GPT2LMHeadModel,
    llama.LlamaDecoderLayer: LlamaDecoderLayer,
    llama.LlamaForCausalLM: LlamaForCausalLM,
    mistral.MistralDecoderLayer: MistralDecoderLayer,
    mistral.MistralForCausalLM: MistralForCausalLM,
    qwen2.Qwen2DecoderLayer: Qwen2DecoderLayer,
    qwen2.Qwen2ForCausalLM: Qwen2ForCausalLM,
    qwen3.Qwen3DecoderLayer: Qwen3DecoderLayer,
    qwen3.Qwen3ForCausalLM: Qwen3ForCausalLM,
    gemma2.Gemma2DecoderLayer: Gemma2DecoderLayer,
    gemma2.Gemma2ForCausalLM: Gemma2ForCausalLM,
    gemma3.Gemma3DecoderLayer: Gemma3DecoderLayer,
    gemma3.Gemma3ForCausalLM: Gemma3ForCausalLM,
    bert.BertLayer: BertLayer,
    bert.BertForMaskedLM: BertForMaskedLM,
    distilbert.TransformerBlock: TransformerBlock,
    distilbert.DistilBertForMaskedLM: DistilBertForMaskedLM,
    mobilebert.FFNLayer: FFNLayer,
    mobilebert.MobileBertForMaskedLM: MobileBertForMaskedLM,
    nn.Dropout: FusedDropout,
}
"""A module of exactly the class on the left gets the one on the right."""
