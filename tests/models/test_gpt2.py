import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastllm import MLP, DecoderConfig, DecoderModel
from fastllm.models import gpt2
from fastllm.optim import AdamW
from tests.conftest import assert_as_accurate

CONFIG: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 61,
    "n_positions": 20,
    "n_embd": 24,
    "n_layer": 3,
    "n_head": 4,
    "bos_token_id": None,
    "eos_token_id": None,
}
DISTILGPT2 = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 6, "n_head": 12}


def reference(**changes: Any) -> Any:
    """A `GPT2LMHeadModel` of transformers with random weights, biases and norms included.

    They are large enough to tell activations apart.
    """
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**CONFIG, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=model.config.n_embd**-0.5)
    return model


def load_in_transformers(folder: Path) -> Any:
    """The model that transformers loads from the folder, without missing or unexpected tensors."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model, info = transformers.GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def assert_same_logits(ours: DecoderModel, theirs: Any) -> None:
    ids = torch.randint(0, ours.vocab_size, (2, 20), generator=torch.Generator().manual_seed(1))
    expected = theirs(ids).logits
    difference = (ours.eval()(ids) - expected).abs().max().item()
    assert difference <= 1e-5 * expected.abs().max().item()


def make_model(**changes: Any) -> DecoderModel:
    """A model that GPT-2's format can express, with `changes` to its arguments."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "pos_encoding_learned": True,
        "mlp_activation": "gelu_tanh",
        "lm_head_bias": False,
        "scale_embeddings": False,
        **changes,
    }
    return DecoderModel(61, 24, 2, 4, 20, **settings)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tied model as `save_gpt2` writes it."""
    make_model(tie_word_embeddings=True).save_gpt2(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """`edit` changes the tensors, or returns new ones."""
    tensors = {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}
    save_file(edit(tensors) or tensors, folder / "model.safetensors")


CONFIGS: dict[str, dict[str, Any]] = {
    "small": {},
    "distilgpt2": DISTILGPT2,
    "untied": {"tie_word_embeddings": False},
    "narrow": {"n_inner": 37},
    "eps": {"layer_norm_epsilon": 1e-2},
    "upcast": {"reorder_and_upcast_attn": True},
    **{
        name: {"activation_function": name}
        for name in ("gelu_pytorch_tanh", "gelu_fast", "gelu", "relu", "silu", "swish")
    },
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_same_logits_as_transformers_both_ways(tmp_path: Path, changes: dict[str, Any]) -> None:
    theirs = reference(**changes)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = DecoderModel.from_gpt2(tmp_path / "theirs")
    assert ours.training and ours.tie_word_embeddings == theirs.config.tie_word_embeddings
    assert all(p.requires_grad and p.dtype == torch.float32 for p in ours.parameters())
    assert sum(p.numel() for p in ours.parameters()) == theirs.num_parameters()
    assert_same_logits(ours, theirs)
    ours.save_gpt2(tmp_path / "ours")
    assert_same_logits(ours, load_in_transformers(tmp_path / "ours"))


def test_fine_tuning_as_transformers_does(tmp_path: Path) -> None:
    """Same loss, gradients (a tied weight's included), and model after some steps."""
    theirs = reference(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0).train()
    theirs.save_pretrained(tmp_path)
    ours = DecoderModel.from_gpt2(tmp_path)
    ids = torch.randint(0, 61, (8, 20), generator=torch.Generator().manual_seed(1))
    oracle = DecoderModel.from_gpt2(tmp_path, dtype=torch.float64)
    oracle.loss(ids, ids).backward()
    ours.loss(ids, ids).backward()
    theirs(ids, labels=ids).loss.backward()
    assert_as_accurate(
        ours.lm_head.weight.grad,  # type: ignore[arg-type]
        theirs.lm_head.weight.grad,
        oracle.lm_head.weight.grad,  # type: ignore[arg-type]
    )
    optimizer = AdamW(ours.parameters(), lr=1e-2)
    for _ in range(20):
        loss = ours.loss(ids, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ours.save_gpt2(tmp_path)  # over the existing files
    again = load_in_transformers(tmp_path)
    assert again(ids, labels=ids).loss.item() == pytest.approx(ours.loss(ids, ids).item(), rel=1e-5)
    assert again(ids, labels=ids).loss < 0.8 * theirs(ids, labels=ids).loss


def test_shards(tmp_path: Path) -> None:
    theirs = reference()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "model.safetensors").exists()
    assert_same_logits(DecoderModel.from_gpt2(tmp_path), theirs)
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"{shards[1].name} does not exist, but model.safe"):
        DecoderModel.from_gpt2(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weights": 3}')
    with pytest.raises(ValueError, match="index.json has no weight_map"):
        DecoderModel.from_gpt2(tmp_path)


def test_names_and_masks_of_the_original_upload(folder: Path) -> None:
    expected = DecoderModel.from_gpt2(folder).state_dict()

    def as_uploaded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 20, 20) for i in range(2)}
        masks["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
        head = {"lm_head.weight": tensors["transformer.wte.weight"].clone()}  # equal, so accepted
        return {n.removeprefix("transformer."): t for n, t in (tensors | masks | head).items()}

    edit_tensors(folder, as_uploaded)
    actual = DecoderModel.from_gpt2(folder).state_dict()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("form", ["dict", "file", "object", "aliases"])
def test_a_configuration_gives_gpt2s_initial_weights(form: str, tmp_path: Path) -> None:
    given = {**CONFIG, "n_embd": 64, "n_layer": 8, "embd_pdrop": 0.3, "attn_pdrop": 0.2}
    source: Any = {key: value for key, value in given.items() if key != "model_type"}
    if form == "file":
        source = tmp_path / "some.json"
        source.write_text(json.dumps(given))
    elif form == "object":
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        source = transformers.GPT2Config(**given)
    elif form == "aliases":
        names = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers"}
        source = {names.get(key, key): value for key, value in source.items()}
    torch.manual_seed(0)
    model = DecoderModel.from_gpt2(source, padding_idx=7)
    assert (model.vocab_size, model.hidden_size, model.max_seq_len) == (61, 64, 20)
    assert len(model.transformer_blocks) == 8 and model.tie_word_embeddings
    block = model.transformer_blocks[3]
    assert model.embedding_layer.positional_encoding.dropout.p == 0.3
    assert (block.self_attn.p, block.self_attn.dropout.p, block.mlp.dropout.p) == (0.2, 0.2, 0.1)
    assert not model.lm_head.weight[7].any()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            assert torch.equal(parameter, torch.full_like(parameter, name.endswith("weight")))
        else:
            small = name.endswith(("out_proj.weight", "fc2.weight"))
            expected = 0.02 / 4 if small else 0.02  # sqrt(2 * 8) is 4
            assert parameter.std().item() == pytest.approx(expected, rel=0.1), name
    ids = torch.randint(0, 61, (4, 20))
    assert model.eval().loss(ids, ids).item() == pytest.approx(math.log(61), rel=0.02)
    assert DecoderModel.from_gpt2(source, device="meta").lm_head.weight.is_meta


def test_dtypes_and_devices(tmp_path: Path) -> None:
    model = make_model(tie_word_embeddings=True)
    model.to(torch.bfloat16).save_gpt2(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    single = DecoderModel.from_gpt2(tmp_path)
    assert torch.equal(single.lm_head.weight, model.lm_head.weight.float())
    double = DecoderModel.from_gpt2(tmp_path, device="cpu", dtype=torch.float64)
    assert double.lm_head.weight.dtype == torch.float64
    assert double.lm_head.weight is double.embedding_layer.token_embeddings.weight


def test_saved_files(tmp_path: Path) -> None:
    model = make_model(
        tie_word_embeddings=True,
        mlp_intermediate_size=30,
        norm_eps=1e-6,
        padding_idx=60,
        embedding_dropout_p=0.0,
        attn_dropout_p=0.2,
        mlp_dropout_p=0.3,
    )
    state = torch.get_rng_state()
    model.eval().save_gpt2(tmp_path / "new" / "folder")
    assert torch.equal(torch.get_rng_state(), state)
    folder = tmp_path / "new" / "folder"
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert len({p.stat().st_mode for p in folder.iterdir()}) == 1
    config = json.loads((folder / "config.json").read_text())
    expected = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 61,
        "n_positions": 20, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_inner": 30,
        "activation_function": "gelu_new", "embd_pdrop": 0.0, "attn_pdrop": 0.2,
        "resid_pdrop": 0.3, "layer_norm_epsilon": 1e-6, "tie_word_embeddings": True,
        "dtype": "float32", "bos_token_id": None, "eos_token_id": None, "pad_token_id": 60,
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
        assert file.get_slice("transformer.h.0.mlp.c_fc.weight").get_shape() == [24, 30]
    again = DecoderModel.from_gpt2(folder)
    assert again.padding_idx is None  # unless it is given
    assert again.transformer_blocks[1].self_attn.p == 0.2
    end = DecoderModel.from_gpt2({**CONFIG, "vocab_size": 50257, "n_embd": 4, "n_layer": 1})
    end.save_gpt2(folder)
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 50256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_attn_weights": False}, "scale_attn_weights: .*must be True, because .*sqrt"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: .*alike in"),
        ({"add_cross_attention": True}, "add_cross_attention: .*there is no encoder"),
        ({"activation_function": "quick_gelu"}, "activation_function: .*gelu_new.*'quick_gelu'"),
        ({"model_type": "gpt_neo"}, "model_type: .*'gpt2' .*'gpt_neo'"),
        ({"n_head": 5}, r"n_head: .*n_embd \(24\) must be divisible by n_head \(got 5\)"),
        ({"n_layer": 0}, "n_layer: "),
        ({"n_layer": 10**9}, "n_layer: "),
        ({"n_embd": "24"}, "n_embd: must be a whole number"),
        ({"resid_pdrop": 1.5}, "resid_pdrop: "),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon: "),
        ({"n_inner": 24.5}, "n_inner: "),
    ],
    ids=str,
)
def test_unsupported_configurations(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(folder, **changes)
    for source in (folder, folder / "config.json", {**CONFIG, **changes}):
        with pytest.raises(ValueError, match=message):
            DecoderModel.from_gpt2(source)
    with pytest.raises(ValueError, match=f"^{folder}/config.json: "):
        DecoderModel.from_gpt2(str(folder))


def test_a_file_must_have_gpt2s_model_type(folder: Path) -> None:
    """A run's config.json, for example, has none of GPT-2's keys."""
    (folder / "config.json").write_text('{"file_path": "book.txt"}')
    with pytest.raises(ValueError, match=r"config.json: model_type: is required"):
        DecoderModel.from_gpt2(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config.json: .*dictionary"):
        DecoderModel.from_gpt2(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        DecoderModel.from_gpt2(folder)


def test_missing_and_damaged_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="^distilgpt2 does not exist; .*hf download"):
        DecoderModel.from_gpt2("distilgpt2")
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        DecoderModel.from_gpt2(tmp_path)
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="model.safetensors cannot be read as safetensors"):
        DecoderModel.from_gpt2(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor .*save_pretrained"):
        DecoderModel.from_gpt2(folder)


BLOCK = "transformer.h.1.mlp.c_fc.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda t: {name: tensor for name, tensor in t.items() if name != BLOCK},
            r"'h.1.mlp.c_fc.weight' is missing, expected \[24, 96\]",
        ),
        (
            lambda t: t.update({BLOCK: t[BLOCK].T.contiguous()}),
            r"'h.1.mlp.c_fc.weight' is \[96, 24\], expected \[24, 96\]",
        ),
        (
            lambda t: t.update({"transformer.h.2.ln_1.weight": torch.ones(24)}),
            r"'h.2.ln_1.weight' is \[24\], expected nothing",
        ),
        (
            lambda t: t.update({"score.weight": torch.ones(2, 24)}),
            r"'score.weight' is \[2, 24\], expected nothing",
        ),
        (
            lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1}),
            "'lm_head.weight' differs from 'wte.weight', but config.json says tie_word_embeddings",
        ),
    ],
    ids="missing turned layer unexpected head".split(),
)
def test_tensors_that_do_not_match(folder: Path, edit: Callable[..., Any], message: str) -> None:
    edit_tensors(folder, edit)
    with pytest.raises(ValueError, match=message):
        DecoderModel.from_gpt2(folder)


@pytest.mark.parametrize("changes", [{"n_positions": 2**24}, {"vocab_size": 2**24}], ids=str)
def test_a_configuration_of_other_weights_allocates_nothing(
    folder: Path, changes: dict[str, int]
) -> None:
    """With the n_embd given here, allocating would take terabytes."""
    edit_config(folder, **changes, n_embd=2**20)
    with pytest.raises(ValueError, match=r"'wte.weight' is \[61, 24\], expected \["):
        DecoderModel.from_gpt2(folder)


def test_an_untied_model_needs_its_head(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"'lm_head.weight' is missing, expected \[61, 24\]"):
        DecoderModel.from_gpt2(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_first": False}, "Post-LN"),
        ({"pos_encoding_learned": False}, "positions are sinusoidal"),
        ({"scale_embeddings": True}, r"multiplied by sqrt\(H\)"),
        ({"lm_head_bias": True}, "head has a bias"),
        ({"qkv_bias": False}, "in its blocks lacks a bias"),
        ({"mlp_bias": False}, "in its blocks lacks a bias"),
        ({"mlp_activation": "leaky_relu"}, "its activation is leaky_relu"),
        ({"mlp_activation": nn.Tanh()}, "transformer_blocks.0.mlp.activation, a Tanh"),
        ({"mlp_activation": nn.LeakyReLU(0.3)}, "transformer_blocks.0 has a part"),
        ({"is_causal": False}, "not causal"),
    ],
    ids=str,
)
def test_models_that_gpt2s_format_cannot_express(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"cannot express this model: .*{message}"):
        make_model(**changes).save_gpt2(tmp_path / "new")
    assert not (tmp_path / "new").exists()


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def set_epsilon(model: DecoderModel) -> None:
    model.transformer_blocks[1].norm2.eps = 1e-6


def replace_linear(model: DecoderModel) -> None:
    model.transformer_blocks[1].mlp.fc1 = Scaled(24, 96)


def replace_mlp(model: DecoderModel) -> None:
    model.transformer_blocks[0].mlp = nn.Linear(24, 24)


def hook(model: DecoderModel) -> None:
    model.transformer_blocks[1].register_forward_hook(lambda *_: None)


def patch(model: DecoderModel) -> None:
    model.forward = lambda *_: None  # type: ignore[method-assign,assignment]


def subclass(model: DecoderModel) -> None:
    model.__class__ = type("Mine", (DecoderModel,), {})


def other_width(model: DecoderModel) -> None:
    other = make_model(mlp_intermediate_size=50)
    model.transformer_blocks[1] = other.transformer_blocks[1]


def other_vocabulary(model: DecoderModel) -> None:
    model.lm_head = nn.Linear(24, 62, bias=False)


def add(model: DecoderModel) -> None:
    model.extra = nn.Linear(3, 3)


def half(model: DecoderModel) -> None:
    model.transformer_blocks[0].mlp.bfloat16()


def no_blocks(model: DecoderModel) -> None:
    del model.transformer_blocks[:]


def no_norm_bias(model: DecoderModel) -> None:
    model.transformer_blocks[0].norm2 = nn.LayerNorm(24, bias=False)


def rms_norm(model: DecoderModel) -> None:
    model.transformer_blocks[1].norm1 = nn.RMSNorm(24, eps=1e-5)


def gated(model: DecoderModel) -> None:
    for block in model.transformer_blocks:
        block.mlp = MLP(24, include_norm_residual=False, gated=True)


def no_norm(model: DecoderModel) -> None:
    model.final_norm = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_epsilon, "layer norms differ in epsilon"),
        (replace_linear, "transformer_blocks.1.mlp.fc1 is a Scaled, not a Linear"),
        (replace_mlp, "transformer_blocks.0.mlp is a Linear, not a MLP"),
        (hook, "transformer_blocks.1, a TransformerBlock, .*a hook"),
        (patch, "the model, a DecoderModel, .*a patched forward"),
        (subclass, "the model, a Mine, is not a plain DecoderModel: it is a subclass"),
        (other_width, "blocks differ in heads, MLP width"),
        (other_vocabulary, "head does not have the size of its embeddings"),
        (add, "no name for 'extra"),
        (half, "parameters differ in type: torch.bfloat16, torch.float32"),
        (no_blocks, "no blocks"),
        (no_norm, "Post-LN"),
        (no_norm_bias, "a norm lacks its weight or bias"),
        (rms_norm, "norm1 is a RMSNorm, not a LayerNorm"),
        (gated, "it has gated MLPs"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_modified_models_that_gpt2s_format_cannot_express(
    tmp_path: Path, change: Callable[[DecoderModel], None], message: str
) -> None:
    model = make_model()
    model.save_gpt2(tmp_path / "before")
    change(model)
    with pytest.raises(ValueError, match=f"cannot express this model: .*{message}"):
        model.save_gpt2(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"pos_encoding": "rope"}, "embeddings have no positions"),
        ({"num_kv_heads": 1}, "shares heads of keys and values"),
        ({"head_dim": 4}, "heads of another width"),
        ({"separate_qkv": True}, "separate projections"),
        ({"qk_norm": "no_weight"}, "normalizes queries and keys"),
        ({"window": 3}, "has a window"),
        ({"attn_scale": 0.1}, "scale of attention"),
        ({"attn_softcap": 5.0}, "caps its scores"),
        ({"head_softcap": 5.0}, "caps its scores or logits"),
        ({"norm_order": "sandwich"}, "normalizes its sublayers' outputs"),
        ({"residual_scale": 0.5}, "scales its sublayers' outputs"),
        ({"norm_order": "parallel"}, "parallel sublayers"),
        ({"norm_bias": False}, "a norm lacks its weight or bias"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_configurations_that_gpt2s_format_cannot_express(
    tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    sizes = {"vocab_size": 11, "hidden_size": 16, "num_layers": 1, "num_heads": 2}
    own = {"pos_encoding": "learned", "lm_head_bias": False}
    DecoderModel.from_config(DecoderConfig(**sizes, **own)).save_gpt2(tmp_path / "gpt2")
    model = DecoderModel.from_config(DecoderConfig(**{**sizes, **own, **settings}))
    with pytest.raises(ValueError, match=f"cannot express this model: .*{reason}"):
        model.save_gpt2(tmp_path / "new")
    with pytest.raises(ValueError, match=f"cannot express this model: .*{reason}"):
        gpt2.convert_to_gpt2(model)


@pytest.mark.parametrize("fail_at", ["save_file", "flush"])
def test_a_failing_disk_leaves_the_existing_files(
    folder: Path, fail_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*arguments: Any, **keywords: Any) -> None:
        raise OSError(28, "No space left on device")

    owner = "fastllm.files" if fail_at == "flush" else "fastllm.models.pretrained"
    monkeypatch.setattr(f"{owner}.{fail_at}", fail)
    with pytest.raises(OSError, match="No space left"):
        make_model(norm_eps=0.1).save_gpt2(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@torch.no_grad()
def assert_converted(model: DecoderModel) -> DecoderModel:
    """Converts the model in float64, where any error beyond rounding shows."""
    for parameter in model.parameters():
        parameter += torch.randn_like(parameter) / 4
    model.double().eval()
    result = gpt2.convert_to_gpt2(model)
    gpt2.check_gpt2(result)
    ids = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(1))
    expected = model(ids)
    difference = (result(ids) - expected).abs().max().item()
    assert difference <= 1e-12 * expected.abs().max().item()
    assert result.padding_idx == model.padding_idx and not result.training
    return result


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
def test_models_with_fastllms_defaults_become_gpt2(activation: str, tied: bool) -> None:
    """Scaled embeddings, sinusoidal positions and a head with a bias."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"mlp_activation": activation, "tie_word_embeddings": tied}
    model = DecoderModel(61, 24, 2, 4, 20, norm_eps=1e-2, padding_idx=60, **settings)
    assert assert_converted(model).hidden_size == 24 + 6


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scale_embeddings": True},
        {"pos_encoding_learned": False},
        {"lm_head_bias": True, "mlp_intermediate_size": 7},
        {"pos_encoding_learned": False, "scale_embeddings": True, "tie_word_embeddings": True},
    ],
    ids=["none", "scale", "sinusoids", "bias", "several"],
)
def test_conversion_widens_only_for_a_bias_of_the_head(changes: dict[str, Any]) -> None:
    result = assert_converted(make_model(**changes))
    assert result.hidden_size == (30 if changes.get("lm_head_bias") else 24)
    assert result.tie_word_embeddings == changes.get("tie_word_embeddings", False)


@pytest.mark.parametrize(
    ("hidden_size", "num_heads", "expected"), [(64, 2, 96), (64, 8, 96), (96, 4, 192), (30, 5, 36)]
)
def test_a_wider_model_keeps_its_heads_and_blocks_of_32_channels(
    hidden_size: int, num_heads: int, expected: int
) -> None:
    """llama.cpp's formats of 4 and 8 bits need rows of such blocks."""
    model = DecoderModel(61, hidden_size, 1, num_heads, 20)
    result = assert_converted(model)
    head_dim = hidden_size // num_heads
    assert (result.hidden_size, result.config.num_heads) == (expected, expected // head_dim)


def test_a_bias_of_zeros_does_not_widen() -> None:
    model = make_model(lm_head_bias=True)
    nn.init.zeros_(model.lm_head.bias)
    assert gpt2.convert_to_gpt2(model).hidden_size == 24


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_first": False, "pos_encoding_learned": False}, "Post-LN"),
        ({"mlp_activation": "leaky_relu"}, "its activation is leaky_relu"),
        ({"is_causal": False}, "not causal"),
        ({"qkv_bias": False}, "in its blocks lacks a bias"),
    ],
    ids=str,
)
def test_models_that_cannot_be_converted(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"cannot express this model: .*{message}"):
        gpt2.convert_to_gpt2(make_model(**changes))


def test_a_model_with_a_hook_is_not_converted() -> None:
    model = make_model(scale_embeddings=True)
    model.transformer_blocks[0].register_forward_hook(lambda *arguments: None)
    with pytest.raises(ValueError, match="a hook, a patched forward or the like"):
        gpt2.convert_to_gpt2(model)
