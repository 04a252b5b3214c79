"""Writing models in GGUF, llama.cpp's file format.

llama.cpp computes every GELU by the tanh approximation, on a CPU from a table of fp16 numbers, and
by default keeps keys and values in fp16.
"""

import math
import os
import re
from collections.abc import Iterator
from typing import Any

from fastllm.flags import Quantization
from fastllm.integrations.gguf_tokenizer import add_setting, gguf_vocabulary, write_tokenizer
from fastllm.models.config import DecoderConfig
from fastllm.models.decoder import DecoderModel
from fastllm.models.gguf import (
    GGUF_ARCHITECTURES,
    OPTIONAL,
    SIZES,
    GgufArchitecture,
    gguf_tensors,
    llama3_divisors,
)
from fastllm.models.huggingface import ARCHITECTURES, Architecture, write_settings
from fastllm.tokenization import Tokenizer

BLOCK = 32  # numbers with a common scale, in types of 4, 5 and 8 bits

# Models of Hugging Face that llama.cpp takes for another.
ALIASES = {"mistral": "llama"}


def save_gguf(
    model: DecoderModel,
    tokenizer: Tokenizer,
    path: str | os.PathLike[str],
    name: str,
    quantization: Quantization | None = None,
) -> None:
    """Writes the model and its tokenizer.

    Args:
        model: whose configuration `find_architecture` accepts.
        name: the model's name in llama.cpp.
        quantization: the type of matrices, whose rows must be multiples of 32 numbers: others
            become f16. With one of 4 or 5 bits, embeddings and head have 8. fp32 unless given.

    Raises:
        ValueError: llama.cpp does not have the architecture or the tokenizer; nothing was written.
        ImportError: gguf is not installed.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
    from gguf.quants import quantize

    arch, architecture = find_architecture(model.config)
    vocabulary = gguf_vocabulary(tokenizer, model.vocab_size)
    kind = f"MOSTLY_{quantization.upper()}" if quantization else "ALL_F32"
    writer = GGUFWriter(path, arch)
    # By this name llama.cpp takes the tokens for Phi-3's, and fails if it misses one.
    writer.add_name(re.sub("(?i)phi-?3", "phi", name))
    writer.add_file_type(LlamaFileType[kind])
    for key, value in _settings(arch, model.config).items():
        add_setting(writer, f"{arch}.{key}", value)
    # llama.cpp has one GELU.
    writer.add_string("fastllm.mlp", str(model.config.mlp))
    write_tokenizer(writer, tokenizer, vocabulary)
    for key, tensor in gguf_tensors(model, architecture, arch):
        values = tensor.float().cpu().contiguous().numpy()
        number = GGMLQuantizationType[_number_type(key, values.shape, quantization)]
        writer.add_tensor(key, quantize(values, number), raw_dtype=number)
    scaling = model.config.rope_scaling
    if scaling is not None and scaling.rope_type == "llama3":
        divisors = llama3_divisors(model.config.rotary_size, model.config.rope_base, scaling)
        writer.add_tensor("rope_freqs.weight", divisors.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _settings(arch: str, config: DecoderConfig) -> dict[str, Any]:
    """The settings of the architecture, without its name before the keys."""
    theirs = GGUF_ARCHITECTURES[arch]
    rope, scaling = config.pos_encoding == "rope", config.rope_scaling
    settings = {key: getattr(config, field) for key, field in SIZES.items()}
    settings |= {key: getattr(config, field) for key, (field, _) in OPTIONAL.items()}
    del settings[f"attention.layer_norm_{'rms_' if config.norm == 'layer' else ''}epsilon"]
    settings |= {
        "vocab_size": config.vocab_size,
        "attention.value_length": config.head_dim,
        "rope.freq_base": config.rope_base if rope else None,
        "rope.dimension_count": config.rotary_size if rope else None,
        "use_parallel_residual": config.norm_order == "parallel" if theirs.parallel else None,
    }
    windows = [config.window_of(i) is not None for i in range(config.num_layers)]
    if theirs.window_period:
        period = theirs.window_period
        usual = [i % period < period - 1 for i in range(config.num_layers)]
        settings["attention.sliding_window_pattern"] = windows if windows != usual else None
    else:
        settings["attention.sliding_window"] = 0 if arch == "phi3" else None
    if scaling is not None:
        settings["rope.scaling.original_context_length"] = scaling.original_max_position_embeddings
        if scaling.rope_type != "llama3":
            settings["rope.scaling.type"] = scaling.rope_type
            settings["rope.scaling.factor"] = scaling.factor
        if scaling.rope_type == "yarn":
            settings["rope.scaling.yarn_beta_fast"] = scaling.beta_fast
            settings["rope.scaling.yarn_beta_slow"] = scaling.beta_slow
    return {key: value for key, value in settings.items() if value is not None}


def _number_type(name: str, shape: tuple[int, ...], quantization: Quantization | None) -> str:
    """The type of a tensor's numbers."""
    # llama.cpp adds vectors and positions as they are.
    if quantization is None or len(shape) < 2 or name == "position_embd.weight":
        return "F32"
    if quantization.startswith("q") and shape[-1] % BLOCK:
        return "F16"
    if quantization.startswith(("q4", "q5")) and name in ("token_embd.weight", "output.weight"):
        return "Q8_0"
    return quantization.upper()


def find_architecture(config: DecoderConfig) -> tuple[str, Architecture]:
    """The architecture of llama.cpp, and the one of Hugging Face, that compute a model.

    Raises:
        ValueError: there is none; the message gives the reason.
    """
    model_type = write_settings(config)[1]["model_type"]
    model_type = ALIASES.get(model_type, model_type)
    for name, theirs in GGUF_ARCHITECTURES.items():
        if theirs.model_type == model_type:
            if (reason := next(_obstacles(theirs, config), None)) is not None:
                raise ValueError(f"llama.cpp's {name} {reason}")
            return name, ARCHITECTURES[model_type]
    raise ValueError(f"llama.cpp does not have the architecture {model_type}")


def _obstacles(theirs: GgufArchitecture, config: DecoderConfig) -> Iterator[str]:
    """Reasons why llama.cpp computes something else than a model of the configuration."""
    activation = str(config.activation)
    if activation.removesuffix("_tanh") != theirs.activation:
        yield f"supports only {theirs.activation}, not {activation}"
    for field, value in theirs.biases.items():
        own = getattr(config, field)
        if (config.qkv_bias if own is None else own) != value:
            yield f"{'needs' if value else 'has no'} {field}"
    if theirs.tied is not None and config.tie_word_embeddings != theirs.tied:
        yield f"needs a head {'tied to the embeddings' if theirs.tied else 'of its own'}"
    if theirs.model_type == "gemma2" and not (config.attn_softcap and config.head_softcap):
        yield "always caps scores and logits"
    if theirs.model_type == "gemma3_text" and config.attn_softcap:
        yield "does not cap scores"
    windows = [config.window_of(i) for i in range(config.num_layers)]
    if not theirs.window_period and any(0 < (w or 0) < config.max_seq_len for w in windows):
        yield "ignores windows"
    width = config.hidden_size // config.num_heads
    scaled_by_width = config.num_layers == theirs.scaled_by_width
    scale = (width if scaled_by_width else config.head_dim) ** -0.5
    if not math.isclose(config.attn_scale or config.head_dim**-0.5, scale, rel_tol=1e-6):
        yield f"scales scores by {scale:.6g}, not {config.attn_scale:.6g}"
    scaling = config.rope_scaling
    if scaling is None:
        return
    if scaling.attention_factor is not None:
        yield "has no attention_factor"
    if scaling.rope_type == "llama3":
        if theirs.model_type != "llama":
            yield "has no rope_scaling of the type llama3"
        if (scaling.low_freq_factor, scaling.high_freq_factor) != (1, 4):
            yield "has only the low_freq_factor 1 and the high_freq_factor 4"
