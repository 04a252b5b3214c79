"""Models in GGUF, llama.cpp's file format.

Tensors are named, by the gguf package, and stored as in Hugging Face's format but for what a
`GgufArchitecture` says.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastllm.command import first_line
from fastllm.models.config import DecoderConfig, RopeScaling, rotation
from fastllm.models.gguf_file import GgufFile
from fastllm.models.huggingface import ARCHITECTURES, Architecture, check_size
from fastllm.models.pretrained import load_model, names_in

if TYPE_CHECKING:
    from fastllm.models.decoder import DecoderModel  # which imports this module


class Storage(NamedTuple):
    """How GGUF stores a tensor of Hugging Face's format.

    Attributes:
        read: from GGUF.
        write: the inverse.
    """

    read: Callable[[Tensor, DecoderConfig], Tensor]
    write: Callable[[Tensor, DecoderConfig], Tensor]


def _swapped(tensor: Tensor, *sizes: int, dim: int) -> Tensor:
    """Splits the rows into three dimensions, of which it swaps `dim` and the next."""
    return tensor.unflatten(0, sizes).transpose(dim, dim + 1).flatten(0, 2)


def _paired(heads: str) -> Storage:
    """Rotated pairs are neighbours in a head, rather than half of it apart."""
    return Storage(
        lambda tensor, config: _swapped(tensor, getattr(config, heads), -1, 2, dim=1),
        lambda tensor, config: _swapped(tensor, getattr(config, heads), 2, -1, dim=1),
    )


TRANSPOSED = Storage(lambda tensor, _: tensor.mT, lambda tensor, _: tensor.mT)
PLUS_ONE = Storage(lambda tensor, _: tensor - 1, lambda tensor, _: tensor + 1)
# All queries, all keys and all values, rather than those of each head.
BY_PART = Storage(
    lambda tensor, config: _swapped(tensor, 3, config.num_heads, -1, dim=0),
    lambda tensor, config: _swapped(tensor, config.num_heads, 3, -1, dim=0),
)


class GgufArchitecture(NamedTuple):
    """A `general.architecture`.

    Attributes:
        model_type: Hugging Face's name.
        activation: of the MLP, as far as llama.cpp distinguishes it.
        stored: the storage of tensors whose name contains this.
        window_period: every layer but the last of this many has a window, unless the file has a
            pattern; 0 if llama.cpp ignores windows.
        parallel: whether its sublayers may be parallel.
        tied: whether the head is tied to the embeddings, if llama.cpp fixes that.
        biases: the fields of biases that llama.cpp fixes.
        scaled_by_width: the number of layers with which scores are divided by sqrt(H / N).
    """

    model_type: str
    activation: str = "silu"
    stored: Mapping[str, Storage] = {}
    window_period: int = 0
    parallel: bool = False
    tied: bool | None = None
    biases: Mapping[str, bool] = {"out_bias": False, "mlp_bias": False}
    scaled_by_width: int = 0

    def storage_of(self, name: str) -> Storage | None:
        """The storage of a tensor, if it is a special one."""
        return next((each for part, each in self.stored.items() if part in name), None)


_LINEAR = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
_PLUS_ONE = {"norm.weight": PLUS_ONE}
_BIASES = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
GGUF_ARCHITECTURES = {
    "gpt2": GgufArchitecture("gpt2", "gelu", dict.fromkeys(_LINEAR, TRANSPOSED), biases=_BIASES),
    "llama": GgufArchitecture(
        "llama",
        stored={"attn_q.": _paired("num_heads"), "attn_k.": _paired("num_kv_heads")},
        biases={},
    ),
    "qwen2": GgufArchitecture("qwen2"),
    "qwen3": GgufArchitecture("qwen3"),
    "gemma2": GgufArchitecture("gemma2", "gelu", _PLUS_ONE, 2, tied=True, scaled_by_width=46),
    "gemma3": GgufArchitecture("gemma3_text", "gelu", _PLUS_ONE, 6, scaled_by_width=62),
    "phi3": GgufArchitecture("phi3"),
    "gptneox": GgufArchitecture(
        "gpt_neox", "gelu", {"attn_qkv.": BY_PART}, parallel=True, tied=False, biases=_BIASES
    ),
    "olmo2": GgufArchitecture("olmo2", tied=False),
    "stablelm": GgufArchitecture("stablelm", parallel=True, tied=False),
}
# The field of a `DecoderConfig` for each key, which begins with the architecture.
SIZES = {
    "context_length": "max_seq_len",
    "embedding_length": "hidden_size",
    "block_count": "num_layers",
    "feed_forward_length": "mlp_intermediate_size",
    "attention.head_count": "num_heads",
}
OPTIONAL: dict[str, tuple[str, type]] = {
    "attention.head_count_kv": ("num_kv_heads", int),
    "attention.key_length": ("head_dim", int),
    "attention.layer_norm_epsilon": ("norm_eps", float),
    "attention.layer_norm_rms_epsilon": ("norm_eps", float),
    "attention.sliding_window": ("window", int),
    "rope.freq_base": ("rope_base", float),
    "rope.freq_base_swa": ("local_rope_base", float),
    "attn_logit_softcapping": ("attn_softcap", float),
    "final_logit_softcapping": ("head_softcap", float),
}
# The part of a layer whose bias tells the value of a field.
BIASES = {
    "qkv_bias": ("attn_q", "attn_qkv"),
    "out_bias": ("attn_output",),
    "mlp_bias": ("ffn_down",),
}


def load_gguf(
    model_class: "type[DecoderModel]", path: Path, padding_idx: int | None, device: Any, dtype: Any
) -> "DecoderModel":
    """See `DecoderModel.from_pretrained`."""
    file = GgufFile(path)
    if file.architecture not in GGUF_ARCHITECTURES:
        known = ", ".join(GGUF_ARCHITECTURES)
        problem = f"must be one of {known}, not {file.architecture}"
        raise ValueError(f"{path}: general.architecture {problem}")
    theirs = GGUF_ARCHITECTURES[file.architecture]
    architecture = ARCHITECTURES[theirs.model_type]
    try:
        config = architecture.build(**_read_fields(file, theirs), padding_idx=padding_idx)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be used: {first_line(error)}") from None
    tensors = GgufTensors(file, architecture, config)
    return load_model(model_class, tensors, architecture, config, device, dtype)


def _read_fields(file: GgufFile, theirs: GgufArchitecture) -> dict[str, Any]:
    """The fields that the file determines."""
    fields: dict[str, Any] = {}
    for key, field in SIZES.items():
        fields[field] = file.model(key, int)
        check_size(f"{file.architecture}.{key}", fields[field])
    # A number of layers takes time before any tensor is compared.
    layers = {name.split(".")[1] for name in file.shapes if name.startswith("blk.")}
    if len(layers) != fields["num_layers"]:
        key = f"{file.architecture}.block_count"
        raise ValueError(f"{key} is {fields['num_layers']}, expected {len(layers)}")
    for key, (field, kind) in OPTIONAL.items():
        if value := file.model(key, kind, kind()):
            fields[field] = value
    fields["vocab_size"] = file.shapes.get("token_embd.weight", [0])[0]
    fields["tie_word_embeddings"] = "output.weight" not in file.shapes
    for field, parts in BIASES.items():
        fields[field] = any(f"blk.0.{part}.bias" in file.shapes for part in parts)
    width = fields["hidden_size"] // fields["num_heads"]
    if rotated := file.model("rope.dimension_count", int, 0):
        head_dim = fields.get("head_dim") or max(width, 1)
        fraction = rotated / head_dim
        # Rounding must not lose an element.
        short = int(head_dim * fraction) < rotated
        fields["rope_fraction"] = math.nextafter(fraction, 1) if short else fraction
    if theirs.window_period:
        key = "attention.sliding_window_pattern"
        if isinstance(file.settings.get(f"{file.architecture}.{key}"), list):
            fields["window_pattern"] = tuple(file.model(key, list))
        else:
            period = file.model(key, int, theirs.window_period)
            check_size(f"{file.architecture}.{key}", period)
            fields["window_pattern"] = tuple(
                i % period < period - 1 for i in range(fields["num_layers"])
            )
        if fields.setdefault("window", None) is None:
            fields["local_rope_base"] = None
    if fields["num_layers"] == theirs.scaled_by_width:
        fields["attn_scale"] = width**-0.5
    if theirs.parallel:
        is_parallel = file.model("use_parallel_residual", bool)
        fields["norm_order"] = "parallel" if is_parallel else "pre"
    if scaling := _read_scaling(file, fields):
        fields["rope_scaling"] = scaling
    if mlp := file.get("fastllm.mlp", str, ""):
        fields["mlp"] = mlp
    return fields


def _read_scaling(file: GgufFile, fields: dict[str, Any]) -> RopeScaling | None:
    kind = file.model("rope.scaling.type", str, "none")
    has_divisors = "rope_freqs.weight" in file.shapes
    if kind == "none" and not has_divisors:
        return None
    original = file.model("rope.scaling.original_context_length", int, fields["max_seq_len"])
    if kind == "none":
        return _llama3_scaling(file, fields.get("rope_base", 10000.0), original)
    settings = {"factor": file.model("rope.scaling.factor", float, 1.0)}
    if kind == "yarn":
        settings["original_max_position_embeddings"] = original
        for name in ("beta_fast", "beta_slow"):
            if value := file.model(f"rope.scaling.yarn_{name}", float, 0.0):
                settings[name] = value
    unknown = [
        name
        for name in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor")
        if f"{file.architecture}.rope.scaling.{name}" in file.settings
    ]
    if kind not in ("linear", "yarn") or has_divisors or unknown:
        name = f"{file.architecture}.rope.scaling.{(unknown or ['type'])[0]}"
        raise ValueError(f"{name} is not supported (got {file.settings[name]!r})")
    return RopeScaling(rope_type=kind, **settings)


def _llama3_scaling(file: GgufFile, base: float, original: int) -> RopeScaling:
    """The scaling of Llama 3, of which the file has only the divisors of the angles."""
    divisors = file.read("rope_freqs.weight")
    factor = float(str(np.float32(divisors.max().item())))
    # Files of llama.cpp do not tell the original length, which is a power of 2.
    for length in (original, *(2**n for n in range(4, 24))):
        scaling = RopeScaling(
            rope_type="llama3",
            factor=factor,
            original_max_position_embeddings=length,
        )
        if torch.allclose(divisors, llama3_divisors(2 * len(divisors), base, scaling), rtol=1e-5):
            return scaling
    raise ValueError("rope_freqs.weight is not a scaling that fastllm knows")


def llama3_divisors(R: int, base: float, scaling: RopeScaling) -> Tensor:
    """What the angles of R rotated elements are divided by, [R / 2]."""
    plain, scaled = (torch.tensor(rotation(R, base, each)[0]) for each in (None, scaling))
    return plain / scaled


def gguf_namer(arch: str, num_layers: int) -> Callable[[str], str]:
    """A function from the name of a tensor in Hugging Face's format to that in GGUF."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    (key,) = (key for key, name in MODEL_ARCH_NAMES.items() if name == arch)
    table = get_tensor_name_map(key, num_layers)

    def name_of(theirs: str) -> str:
        module, _, kind = theirs.rpartition(".")
        return f"{table.get_name(module)}.{kind}"

    return name_of


class GgufTensors:
    """The tensors of a file by their names in Hugging Face's format."""

    def __init__(self, file: GgufFile, architecture: Architecture, config: DecoderConfig) -> None:
        self.file, self.architecture, self.config = file, architecture, config
        self.name_of = gguf_namer(file.architecture, config.num_layers)

    def check(self, model: "DecoderModel", names: Mapping[str, list[str]]) -> None:
        """Raises a `ValueError` unless the tensors are exactly those of the model, which is on the
        meta device."""
        stored = gguf_tensors(model, self.architecture, self.file.architecture)
        expected = {name: list(tensor.shape) for name, tensor in stored}
        found = {
            name: shape for name, shape in self.file.shapes.items() if name != "rope_freqs.weight"
        }
        for name in [*expected, *sorted(found)]:
            if found.get(name) != expected.get(name):
                raise ValueError(
                    f"{self.file.path}: the tensors do not fit the settings: '{name}' is "
                    f"{found.get(name, 'missing')}, expected {expected.get(name, 'nothing')}"
                )

    def read(self, name: str) -> Tensor:
        """The tensor of this name in Hugging Face's format."""
        name = self.name_of(name)
        storage = GGUF_ARCHITECTURES[self.file.architecture].storage_of(name)
        tensor = self.file.read(name)
        return storage.read(tensor, self.config) if storage else tensor


def gguf_tensors(
    model: "DecoderModel", architecture: Architecture, arch: str
) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors as GGUF names and stores them."""
    state, config = model.state_dict(), model.config
    name_of = gguf_namer(arch, config.num_layers)
    for theirs, ours in names_in(architecture, model).items():
        parts = [state[name].detach() for name in ours]
        tensor = architecture.layout_of(theirs).to_theirs(parts, config)
        name = name_of(theirs)
        storage = GGUF_ARCHITECTURES[arch].storage_of(name)
        yield name, storage.write(tensor, config) if storage else tensor
