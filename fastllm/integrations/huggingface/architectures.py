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
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.models.llama import modeling_llama as llama
from transformers.models.mobilebert import modeling_mobilebert as mobilebert

from fastllm.integrations.huggingface.attention import FusedDropout
from fastllm.integrations.huggingface.fusible import CannotFuse, forwards_of, linear_parameters
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
    paths = HeadPaths(CausalLMOutputWithCrossAttentions, causal=True, linear="lm_head")


class LlamaForCausalLM(LanguageModel, llama.LlamaForCausalLM):
    forward = with_fused_loss(llama.LlamaForCausalLM.forward)
    paths = HeadPaths(CausalLMOutputWithPast, causal=True, linear="lm_head")


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
    llama.LlamaForCausalLM: LlamaForCausalLM,
    bert.BertLayer: BertLayer,
    bert.BertForMaskedLM: BertForMaskedLM,
    distilbert.TransformerBlock: TransformerBlock,
    distilbert.DistilBertForMaskedLM: DistilBertForMaskedLM,
    mobilebert.FFNLayer: FFNLayer,
    mobilebert.MobileBertForMaskedLM: MobileBertForMaskedLM,
    nn.Dropout: FusedDropout,
}
"""A module of exactly the class on the left gets the one on the right."""
