"""GGUF, llama.cpp's file format: a model of GPT-2's architecture with its tokenizer.

llama.cpp computes every GELU by the tanh approximation, on a CPU from a table of fp16 numbers, and
by default keeps keys and values in fp16.
"""

import os

from fastllm.integrations.gguf_tokenizer import gguf_vocabulary
from fastllm.models.decoder import DecoderModel
from fastllm.models.gpt2 import (
    ACTIVATIONS,
    check_gpt2,
    config_json,
    convert_to_gpt2,
    tensor_names,
)
from fastllm.tokenization import Tokenizer

# GPT-2's names of GELU. The exact GELU is also accepted: it differs from the approximation by 5e-4
# at most, less than the table's rounding.
GELUS = [theirs for theirs, ours in ACTIVATIONS.items() if ours in ("gelu", "gelu_tanh")]

# GGUF's name for each of fastllm's tensors; {i} is the layer, {kind} is weight and bias.
TENSORS = {
    "embedding_layer.token_embeddings.weight": "token_embd.weight",
    "embedding_layer.positional_encoding.pos_embedding.weight": "position_embd.weight",
    "lm_head.weight": "output.weight",
    "final_norm.{kind}": "output_norm.{kind}",
    "transformer_blocks.{i}.norm1.{kind}": "blk.{i}.attn_norm.{kind}",
    "transformer_blocks.{i}.self_attn.qkv_proj.{kind}": "blk.{i}.attn_qkv.{kind}",
    "transformer_blocks.{i}.self_attn.out_proj.{kind}": "blk.{i}.attn_output.{kind}",
    "transformer_blocks.{i}.norm2.{kind}": "blk.{i}.ffn_norm.{kind}",
    "transformer_blocks.{i}.mlp.fc1.{kind}": "blk.{i}.ffn_up.{kind}",
    "transformer_blocks.{i}.mlp.fc2.{kind}": "blk.{i}.ffn_down.{kind}",
}


def check_gguf(model: DecoderModel, tokenizer: Tokenizer) -> None:
    """Raises a `ValueError` with the reason if llama.cpp cannot run the model as it is."""
    check_gpt2(model, convertible=True)
    activation = config_json(model)["activation_function"]
    if activation not in GELUS:
        raise ValueError(f"llama.cpp's GPT-2 supports only GELU, not {activation}")
    gguf_vocabulary(tokenizer)


def save_gguf(
    model: DecoderModel, tokenizer: Tokenizer, path: str | os.PathLike[str], name: str
) -> None:
    """Writes the model and its tokenizer in fp32.

    Args:
        name: the model's name in llama.cpp.

    Raises:
        ValueError: llama.cpp cannot run the model as it is; the message gives the reason, and
            nothing was written.
        ImportError: gguf is not installed.
    """
    from gguf import GGUFWriter, LlamaFileType

    check_gguf(model, tokenizer)
    model = convert_to_gpt2(model)
    tokens, types, merges = gguf_vocabulary(tokenizer)
    config, pad = config_json(model), tokenizer.pad_token_id
    writer = GGUFWriter(path, "gpt2")
    writer.add_name(name)
    writer.add_file_type(LlamaFileType.ALL_F32)
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(config["n_inner"])
    writer.add_block_count(config["n_layer"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    # Without the first two, llama.cpp takes token 11 for both and ends a text with it.
    writer.add_bos_token_id(pad)
    writer.add_eos_token_id(pad)
    writer.add_pad_token_id(pad)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    weights, names = model.state_dict(), tensor_names(TENSORS, config["n_layer"])
    if model.tie_word_embeddings:
        del weights["lm_head.weight"]
    for ours, tensor in weights.items():
        writer.add_tensor(names[ours], tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
