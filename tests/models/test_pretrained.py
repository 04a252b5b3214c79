"""Models in Hugging Face's format against transformers, with random weights of small, odd sizes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastllm
from fastllm import DecoderConfig, DecoderModel
from fastllm.generation.decoding import generate_batch, start_decoding
from fastllm.models import architectures
from fastllm.models.config import RopeScaling
from fastllm.models.huggingface import ARCHITECTURES, read_settings
from fastllm.ops.sampling import Sampling

V, S = 61, 24
SIZES: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "intermediate_size": 76, "max_position_embeddings": 40,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e3, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10}
PARTIAL = {"rope_type": "default", "rope_theta": 5e3, "partial_rotary_factor": 0.5}
# The class of transformers, and what its configuration changes in SIZES.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 3}),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    "llama, scaled": ("Llama", {"rope_parameters": LLAMA3}),
    "gpt2": ("GPT2", {"n_inner": 76}),
    "mistral": ("Mistral", {"sliding_window": 5, "head_dim": 10}),
    "qwen2": ("Qwen2", {"rope_parameters": {**YARN, "rope_theta": 1e6}}),
    "qwen2, windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1,
         "tie_word_embeddings": True},
    ),
    "qwen3": ("Qwen3", {"head_dim": 10, "tie_word_embeddings": True}),
    "qwen3, biases": ("Qwen3", {"head_dim": 10, "attention_bias": True}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 10, "sliding_window": 5, "query_pre_attn_scalar": 25,
         "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
    ),
    "gemma2, uncapped": (
        "Gemma2",
        {"head_dim": 16, "attn_logit_softcapping": None, "final_logit_softcapping": None,
         "tie_word_embeddings": False, "attention_bias": True},
    ),
    "gemma3": (
        "Gemma3Text",
        {"head_dim": 10, "sliding_window": 5, "query_pre_attn_scalar": 25,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
         "rope_parameters": {
             "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
             "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
         }},
    ),
    "phi3": ("Phi3", {"rope_parameters": {**PARTIAL, "partial_rotary_factor": 0.75}}),
    "phi3, window": ("Phi3", {"sliding_window": 5, "tie_word_embeddings": True}),
    "gpt_neox": ("GPTNeoX", {"rope_parameters": {**PARTIAL, "partial_rotary_factor": 0.25}}),
    "gpt_neox, in series": (
        "GPTNeoX",
        {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True,
         "hidden_act": "gelu_fast"},
    ),
    "gpt_neo": (
        "GPTNeo",
        {"attention_types": [[["global", "local"], 1], [["global"], 1]], "window_size": 5,
         "num_layers": 3, "num_heads": 6},
    ),
    "olmo2": ("Olmo2", {}),
    "olmo2, biases": ("Olmo2", {"attention_bias": True, "tie_word_embeddings": True}),
    "stablelm": ("StableLm", {"use_qkv_bias": True}),
    "stablelm, parallel": ("StableLm", {"use_parallel_residual": True, "rope_parameters": PARTIAL}),
}  # fmt: skip


def reference(name: str, **changes: Any) -> Any:
    """A model of transformers with random weights, norms and biases included."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    kind, own = CASES[name]
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **own, **changes})
    torch.manual_seed(0)
    # Gemma 2 caps its scores only so.
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def load_in_transformers(folder: Path) -> Any:
    """The model that transformers loads, without missing or unexpected tensors."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not any(info.values()), info
    return model.eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, V, (3, S), generator=torch.Generator().manual_seed(1))


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_are_those_of_transformers_both_ways(name: str, ids: Tensor, tmp_path: Path) -> None:
    theirs = reference(name)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = theirs(ids).logits
    ours = DecoderModel.from_pretrained(tmp_path / "theirs")
    assert ours.training and ours.tie_word_embeddings == theirs.config.tie_word_embeddings
    for implementation in ("auto", "ref"):
        with fastllm.use(implementation):
            assert_close(ours.eval()(ids), expected)
            assert_close(ours.loss(ids, ids), theirs(ids, labels=ids).loss)
    ours.save_pretrained(tmp_path / "ours")
    again = DecoderModel.from_pretrained(tmp_path / "ours")
    assert again.config == ours.config
    assert all(map(torch.equal, ours.state_dict().values(), again.state_dict().values()))
    assert_close(load_in_transformers(tmp_path / "ours")(ids).logits, expected)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_caches_and_padding_give_the_logits_of_transformers(
    name: str, ids: Tensor, tmp_path: Path
) -> None:
    """One step at a time, by the kernel if it can and by the modules; and padded on either side."""
    theirs = reference(name)
    theirs.save_pretrained(tmp_path)
    expected = theirs(ids).logits
    ours = DecoderModel.from_pretrained(tmp_path).eval()
    decoding, caches = start_decoding(ours, len(ids)), ours.new_caches()
    steps = [decoding.extend(ids[:, :9].tolist()).clone()]
    steps += [decoding.extend(ids[:, t : t + 1].tolist()).clone() for t in range(9, S)]
    assert_close(torch.stack(steps, 1), expected[:, 8:])
    pieces = [ours(piece, caches=caches) for piece in ids.split((9, *[1] * (S - 9)), 1)]
    assert_close(torch.cat(pieces, 1), expected)
    padded, is_padding = ids.clone(), torch.arange(S) >= 15
    padded[:, is_padding] = 0
    assert_close(ours(padded)[:, :15], expected[:, :15])
    assert_close(ours(padded, is_padding)[:, :15], expected[:, :15])
    is_token = torch.arange(S) >= torch.tensor([[0], [3], [7]])
    expected = theirs(ids, attention_mask=is_token.long()).logits
    assert_close(ours(ids, ~is_token[:, None, None])[is_token], expected[is_token])


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_greedy_generation_is_that_of_transformers(name: str, ids: Tensor, tmp_path: Path) -> None:
    """Of prompts of several lengths, which transformers pads on the left."""
    theirs = reference(name)
    theirs.save_pretrained(tmp_path)
    is_token = torch.arange(10) >= torch.tensor([[0], [3], [7]])
    prompts = ids[:, :10].masked_fill(~is_token, 0)
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    expected = theirs.generate(prompts, attention_mask=is_token.long(), **options)[:, 10:]
    ours = DecoderModel.from_pretrained(tmp_path).eval()
    rows = [ids[i, first:10].tolist() for i, first in enumerate((0, 3, 7))]
    for use_cache in (True, False):
        tokens = generate_batch(ours, rows, 9, Sampling(temperature=0.0), use_cache=use_cache)
        assert torch.equal(torch.tensor(list(tokens)).T, expected)


@torch.no_grad()
def test_shards_and_files_without_the_head(ids: Tensor, tmp_path: Path) -> None:
    theirs = reference("llama, tied")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    assert_close(DecoderModel.from_pretrained(tmp_path / "shards")(ids), theirs(ids).logits)
    theirs.model.save_pretrained(tmp_path / "headless")  # without the prefix
    assert_close(DecoderModel.from_pretrained(tmp_path / "headless")(ids), theirs(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_files_of_16_bits(dtype: torch.dtype, ids: Tensor, tmp_path: Path) -> None:
    theirs = reference("llama")
    theirs.to(dtype).save_pretrained(tmp_path)
    ours = DecoderModel.from_pretrained(tmp_path)
    assert ours.lm_head.weight.dtype == torch.float32
    # A conversion of the model itself would round its rotary angles.
    assert_close(ours(ids), load_in_transformers(tmp_path)(ids).logits)
    same = DecoderModel.from_pretrained(tmp_path, dtype=dtype)
    same.save_pretrained(tmp_path / "ours", eos_token_id=[3, 5])
    settings = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert settings["dtype"] == str(dtype).removeprefix("torch.")
    assert (settings["eos_token_id"], settings["bos_token_id"]) == ([3, 5], None)
    again = DecoderModel.from_pretrained(tmp_path / "ours", dtype=dtype)
    assert torch.equal(again.lm_head.weight, same.lm_head.weight)


def test_names_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # asks for no connection
    reference("llama").save_pretrained(tmp_path)
    names = []

    def downloaded(name: str, **options: Any) -> str:
        names.append(name)
        if name == "distilgpt2":
            raise OSError("there is no network")
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", downloaded)
    assert DecoderModel.from_pretrained("someone/Llama-3.2_tiny").vocab_size == V
    with pytest.raises(ValueError, match="distilgpt2 is not a folder .* there is no network On a"):
        DecoderModel.from_pretrained("distilgpt2")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    misspelt = "runs/bokk", tmp_path / "none"
    for local in ("./distilgpt2", "/distilgpt2", "a/b/c", "~/distilgpt2", *misspelt):
        with pytest.raises(FileNotFoundError, match="does not exist; give a folder with config"):
            DecoderModel.from_pretrained(local)
    assert names == ["someone/Llama-3.2_tiny", "distilgpt2"]


def test_runs(tmp_path: Path) -> None:
    """A run of finetune has a model in this format, one of train has not."""
    (tmp_path / "config.json").write_text('{"fastllm_version": "1"}')
    with pytest.raises(ValueError, match=r"fastllm's own; load it with fastllm.load_model"):
        DecoderModel.from_pretrained(tmp_path)
    reference("llama").save_pretrained(tmp_path / "model")
    assert DecoderModel.from_pretrained(tmp_path).vocab_size == V


def edit_config(folder: Path, **changes: Any) -> None:
    """Changes settings in config.json; ... removes one."""
    file = folder / "config.json"
    settings = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: each for key, each in settings.items() if each is not ...}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tensors = {name: each.clone() for name, each in load_file(folder / "model.safetensors").items()}
    save_file(edit(tensors), folder / "model.safetensors")


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_file_may_lack_what_is_as_in_transformers(model_type: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.AutoConfig.for_model(model_type)
    complete = json.loads(config.to_json_string(use_diff=False))
    assert read_settings({"model_type": model_type}) == read_settings(complete)


# The same settings as earlier versions of transformers wrote them.
OLDER: dict[str, dict[str, Any]] = {
    "llama, scaled": {
        "rope_parameters": ..., "rope_theta": 5e3, "head_dim": ..., "attention_bias": ...,
        "rope_scaling": {key: LLAMA3[key] for key in LLAMA3 if key != "rope_theta"},
    },
    "qwen2": {
        "rope_parameters": ..., "rope_theta": 1e6, "layer_types": ...,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10},
    },
    "qwen2, windows": {"layer_types": ...},
    "gemma2": {"layer_types": ..., "hidden_act": "gelu", "rope_parameters": ...},
    "gemma3": {
        "rope_parameters": ..., "rope_theta": 1e5, "rope_local_base_freq": 1e3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "phi3": {
        "rope_parameters": ..., "rope_theta": 5e3, "rope_scaling": None,
        "partial_rotary_factor": 0.75,
    },
    "gpt_neox": {"rope_parameters": ..., "rotary_emb_base": 5e3, "rotary_pct": 0.25},
    "stablelm, parallel": {
        "rope_parameters": ..., "rope_theta": 5e3, "partial_rotary_factor": 0.5,
    },
    "gpt2": {"n_positions": ..., "max_position_embeddings": 40},
}  # fmt: skip


@pytest.mark.parametrize("name", OLDER)
@torch.no_grad()
def test_older_files(name: str, ids: Tensor, tmp_path: Path) -> None:
    """Older configurations, and masks and rotary tables among the weights."""
    theirs = reference(name)
    theirs.save_pretrained(tmp_path)
    edit_config(tmp_path, **OLDER[name])
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "gpt_neox.layers.1.attention.masked_bias": torch.tensor(-1e4),
        "gpt_neox.layers.1.attention.bias": torch.ones(1, 1, 40, 40),
        "transformer.h.0.attn.attention.bias": torch.ones(1, 1, 40, 40),
        "h.0.attn.bias": torch.ones(1, 1, 40, 40),
    }
    edit_tensors(tmp_path, lambda tensors: tensors | buffers)
    assert_close(DecoderModel.from_pretrained(tmp_path).eval()(ids), theirs(ids).logits)


@pytest.mark.parametrize("prefix", ["language_model.", "model.language_model."])
@torch.no_grad()
def test_the_text_model_in_a_gemma3_that_sees(prefix: str, ids: Tensor, tmp_path: Path) -> None:
    theirs = reference("gemma3")
    theirs.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    text = json.dumps({"model_type": "gemma3", "text_config": settings, "vision_config": {}})
    (tmp_path / "config.json").write_text(text)

    def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        own = {prefix + (n[6:] if prefix[0] == "m" else n): t for n, t in tensors.items()}
        return own | {"vision_tower.layers.0.weight": torch.ones(3)}

    edit_tensors(tmp_path, renamed)
    assert_close(DecoderModel.from_pretrained(tmp_path)(ids), theirs(ids).logits)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"model_type": "mamba"}, "model_type: fastllm supports gpt2, llama, .*'mamba'"),
        ("llama", {"model_type": ["llama"]}, r"model_type: fastllm supports .*\['llama'\]"),
        ("llama", {"model_type": ...}, "model_type: is required; it is one of gpt2, llama"),
        ("llama", {"hidden_act": "quick_gelu"}, "hidden_act: fastllm supports .*quick_gelu"),
        ("llama", {"num_hidden_layers": "3"}, "num_hidden_layers: must be a whole number"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers: must be from 1 to 1024"),
        ("llama", {"num_attention_heads": 5}, r"num_attention_heads: hidden_size \(48\) must be d"),
        ("llama", {"num_key_value_heads": 4}, r"num_kv_heads \(4\) must divide num_heads \(6\)"),
        ("llama", {"rms_norm_eps": -1}, "rms_norm_eps: must be greater"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: .* rotates whole heads"),
        ("llama", {"rope_scaling": {"type": "dynamic"}}, "rope_scaling.rope_type: dynamic is"),
        (
            "qwen2", {"rope_parameters": {**YARN, "mscale": 0.7}},
            "rope_parameters.mscale: is not supported for yarn",
        ),
        ("qwen2", {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters: factor: is requ"),
        ("llama", {"hidden_size": None}, "hidden_size: must not be null"),
        ("qwen2", {"rope_parameters": 3}, "a value is of the wrong kind"),
        ("qwen2", {"rope_scaling": "yarn"}, "a value is of the wrong kind"),
        (
            "phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
            "rope_scaling.rope_type: longrope is not supported, only default",
        ),
        ("gemma3", {"layer_types": ["full_attention"]}, "layer_types: must be full_attention or"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 3}, "layer_types: .*chunked_attention"),
        ("gemma2", {"sliding_window": None}, "sliding_window: is required by layer_types"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention: must be F"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: must be None, bec"),
        ("gemma3", {"rope_parameters": YARN}, "rope_parameters: needs full_attention and sliding"),
        (
            "gemma3", {"rope_parameters": {"full_attention": {}, "sliding_attention": YARN}},
            "rope_parameters.sliding_attention.rope_type: yarn is not supported, only default",
        ),
        ("gpt_neo", {"attention_types": [[["local"], 2]]}, "attention_types: must be global or"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm: must be False, because all heads sh"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config: quantized weights"),
        ("qwen2", {"hidden_size": 96}, r"not fit config.json: 'embed_tokens.weight' is \[61, 48"),
        ("mistral", {"model_type": "qwen3"}, "'layers.0.self_attn.q_norm.weight' is missing"),
        ("qwen3", {"model_type": "mistral"}, "'layers.0.self_attn.k_norm.weight' is .* expected n"),
    ],
    ids=lambda value: json.dumps(value, default=str) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_cannot_be_computed_is_refused(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    reference(name).save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        DecoderModel.from_pretrained(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))


SMALL = {
    "vocab_size": V, "hidden_size": 48, "num_layers": 3, "num_heads": 6, "max_seq_len": 40,
    "mlp_intermediate_size": 76,
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        architectures.gpt2(**SMALL, mlp="relu", attn_dropout_p=0.3, padding_idx=7),
        architectures.llama(**SMALL, num_kv_heads=2, head_dim=10),
        architectures.llama(**SMALL, window=5, mlp="geglu"),
        architectures.llama(**SMALL, separate_qkv=False, rope_fraction=0.5),
        architectures.qwen3(**SMALL, num_kv_heads=2, window=5, window_pattern=(True, False)),
        architectures.gemma2(**SMALL, num_kv_heads=3),
        architectures.gemma3(**SMALL, num_kv_heads=2, window=5, window_pattern=(True, False)),
        architectures.gemma3(
            **SMALL,
            window=3,
            rope_scaling=RopeScaling(
                rope_type="yarn", factor=2, original_max_position_embeddings=20, beta_fast=16
            ),
        ),
        architectures.gemma3(**SMALL, window=None, local_rope_base=None, rope_base=1e4),
        architectures.olmo2(**SMALL, num_kv_heads=2),
        architectures.stablelm(**SMALL, norm_order="parallel"),
        architectures.gpt_neox(**SMALL, rope_fraction=0.5),
        architectures.gpt_neo(**SMALL, window=3),
    ],
    ids="gpt2 llama mistral phi3 qwen3 gemma2 gemma3 yarn full olmo2 stablelm neox neo".split(),
)
@torch.no_grad()
def test_models_made_here_are_saved_for_transformers(
    config: DecoderConfig, ids: Tensor, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = DecoderModel.from_config(config).eval()
    model.save_pretrained(tmp_path)
    theirs = load_in_transformers(tmp_path)
    assert_close(theirs(ids).logits, model(ids))
    assert theirs.config.pad_token_id == config.padding_idx


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lm_head_bias": True}, "llama differs in lm_head_bias"),
        ({"embedding_scale": 2.0}, "llama differs in embedding_scale"),
        ({"mlp": "relu_squared"}, "llama differs in mlp"),
        ({"qkv_bias": True, "out_bias": False, "mlp_bias": True}, "llama differs in out_bias"),
        ({"hidden_size": 50, "head_dim": 8}, r"n_head: n_embd \(50\) must be divisible"),
        ({"rope_interleaved": True}, "llama differs in rotary positions"),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 2}}, "llama differs in rotary positions"),
        ({"norm_order": "post"}, "llama differs in norm_order"),
        ({"causal": False}, "llama differs in causal"),
        ({"mlp": nn.SiLU()}, "only activations with a name"),
    ],
    ids=str,
)
def test_models_that_transformers_does_not_have(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = DecoderModel.from_config(architectures.llama(**{**SMALL, **change}))
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_models_that_were_changed(tmp_path: Path) -> None:
    model = DecoderModel.from_config(architectures.stablelm(**SMALL, norm_order="parallel"))
    nn.init.normal_(model.transformer_blocks[1].norm2.weight)
    with pytest.raises(ValueError, match="the two norms of a layer have become different"):
        model.save_pretrained(tmp_path / "new")
    model.transformer_blocks[1].norm2 = nn.RMSNorm(48)
    with pytest.raises(ValueError, match="'transformer_blocks.1.norm2' is RMSNorm"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
