"""Models of the known architectures: their fused against their own forward."""

import copy
import itertools

import pytest
import torch
from torch import Tensor

import fastllm
from fastllm import DecoderConfig, DecoderModel
from fastllm.generation.decoding import start_decoding
from fastllm.models.architectures import ARCHITECTURES
from fastllm.ops.decode import Decoding
from tests.conftest import assert_as_accurate, needs_extension

V, S = 61, 24
# More heads than keys and values have, heads wider than H / N, and a window shorter than S.
SIZES = {
    "vocab_size": V, "hidden_size": 48, "num_layers": 3, "num_heads": 4, "max_seq_len": S,
    "mlp_intermediate_size": 80,
}  # fmt: skip
SHARED = {**SIZES, "num_kv_heads": 2, "head_dim": 16}
WINDOW = {"window": 5, "window_pattern": (True, True, False)}
CONFIGS = {
    "gpt2": ARCHITECTURES["gpt2"](**SIZES),
    "llama": ARCHITECTURES["llama"](**SHARED),
    "qwen3": ARCHITECTURES["qwen3"](**SHARED),
    "gemma3": ARCHITECTURES["gemma3"](**{**SHARED, **WINDOW}),
    "nanochat": ARCHITECTURES["nanochat"](**SHARED, window=7),
    "neox": DecoderConfig(
        **SIZES, norm_order="parallel", pos_encoding="rope", rope_fraction=0.5, mlp="gelu"
    ),
    "gptj": DecoderConfig(
        **SIZES, norm_order="parallel", pos_encoding="rope", rope_interleaved=True, mlp="reglu",
        rope_fraction=2 / 3, norm_bias=False, residual_scale=0.5,
    ),
    "capped": DecoderConfig(
        **SHARED, norm="rms", norm_order="post", pos_encoding="none", attn_softcap=5.0,
        head_softcap=3.0, attn_scale=0.1, mlp="geglu", qkv_bias=True, out_bias=False,
    ),
    "output": DecoderConfig(
        **SHARED, norm="rms", norm_order="output", pos_encoding="rope", mlp="swiglu",
        qk_norm="weight", residual_scale=0.5,
    ),
}  # fmt: skip


def make_model(config: DecoderConfig) -> DecoderModel:
    """A model whose norms and biases are not what they start as."""
    torch.manual_seed(0)
    model = DecoderModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, V, (13, S), generator=torch.Generator().manual_seed(1))


def run(model: DecoderModel, ids: Tensor) -> list[Tensor]:
    """Logits, loss and gradients."""
    loss = model.loss(ids, ids)
    loss.backward()
    with torch.no_grad():
        return [model(ids), loss.detach(), *(p.grad for p in model.parameters())]


@needs_extension
@pytest.mark.parametrize("name", CONFIGS)
def test_kernels_and_modules_compute_the_same(name: str, ids: Tensor) -> None:
    """The whole model in one operation; its layers; and its modules, which a hook makes run."""
    model = make_model(CONFIGS[name])
    hooked = copy.deepcopy(model)
    for block in hooked.transformer_blocks:
        for module in (block.self_attn.out_proj, block.mlp.fc2):
            module.register_forward_hook(lambda *_: None)
    assert model.why_not_fused_loss(ids) is None
    assert "attached" in str(hooked.why_not_fused_loss(ids))
    assert "too few" in str(model.why_not_fused_loss(ids[:2]))
    results = ["logits", "loss", *(each for each, _ in model.named_parameters())]
    for batch in (ids, ids[:2]):
        with fastllm.use("ref"):
            oracle = run(copy.deepcopy(model).double(), batch)
            plain = run(copy.deepcopy(model), batch)
        for kind, each in (("kernels", copy.deepcopy(model)), ("modules", copy.deepcopy(hooked))):
            for i, found in enumerate(run(each, batch)):
                assert_as_accurate(found, plain[i], oracle[i], f"{results[i]} by the {kind}")


@needs_extension
@pytest.mark.parametrize("name", CONFIGS)
def test_kernels_and_modules_draw_the_same_dropout(name: str, ids: Tensor) -> None:
    dropout = {"embedding_dropout_p": 0.1, "attn_dropout_p": 0.2, "mlp_dropout_p": 0.3}
    model = make_model(DecoderConfig(**{**CONFIGS[name].model_dump(), **dropout}))
    losses = []
    for hook in (False, True):
        for block in model.transformer_blocks if hook else ():
            for module in (block.self_attn.out_proj, block.mlp.fc2):
                module.register_forward_hook(lambda *_: None)
        torch.manual_seed(3)
        losses.append(model.loss(ids, ids).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] != pytest.approx(model.eval().loss(ids, ids).item(), rel=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_caches_give_what_the_whole_sequence_gives(name: str, ids: Tensor) -> None:
    model = make_model(CONFIGS[name]).eval()
    with torch.no_grad():
        whole = model(ids)
        for pieces in ((S,), (1,) * S, (9, 1, 6, 1, 7)):
            caches, ends = model.new_caches(), list(itertools.accumulate(pieces))
            found = [
                model(ids[:, end - size : end], caches=caches)
                for size, end in zip(pieces, ends, strict=True)
            ]
            torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-4)


@needs_extension
@pytest.mark.parametrize("name", CONFIGS)
def test_the_decoding_kernel_continues_as_the_whole_sequence(name: str, ids: Tensor) -> None:
    model, rows = make_model(CONFIGS[name]).eval(), ids[:2].tolist()
    decoding = start_decoding(model, 2)
    assert isinstance(decoding, Decoding)
    found = [decoding.extend([row[:9] for row in rows]).clone()]
    found += [decoding.extend([row[t : t + 1] for row in rows]).clone() for t in range(9, S)]
    with torch.no_grad(), fastllm.use("ref"):
        whole = model(ids[:2])[:, 8:]
    torch.testing.assert_close(torch.stack(found, 1), whole, rtol=1e-4, atol=1e-5)


def test_a_cache_keeps_only_the_window(ids: Tensor) -> None:
    model = make_model(CONFIGS["gemma3"]).eval()
    caches = model.new_caches()
    for t in range(S):
        model(ids[:, t : t + 1], caches=caches)
    kept = [cache._keys.shape for cache in caches]
    assert kept == [(13, 2, 4, 16), (13, 2, 4, 16), (13, 2, S, 16)]
    hidden = torch.zeros(S, dtype=torch.bool)
    hidden[-3:] = True  # of the keys of all positions
    model, caches = make_model(CONFIGS["gemma3"]).eval(), model.new_caches()
    model(ids[:, :-1], caches=caches)
    last = model(ids[:, -1:], hidden, caches)
    torch.testing.assert_close(last, model(ids, hidden)[:, -1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_is_made_again_from_its_settings(name: str, ids: Tensor) -> None:
    model = make_model(CONFIGS[name])
    again = DecoderModel.from_settings(model.settings, device="meta").to_empty(device="cpu")
    again.load_state_dict(model.state_dict())
    assert again.config == model.config
    assert torch.equal(again(ids), model(ids))


def test_rotary_tables_outlive_conversions(ids: Tensor) -> None:
    config = ARCHITECTURES["gemma3"](**{**SHARED, **WINDOW})
    model = DecoderModel.from_config(config)
    tables = [block.self_attn.rotary.table.clone() for block in model.transformer_blocks]
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])
    for changed in (
        copy.deepcopy(model).to(torch.bfloat16),
        copy.deepcopy(model).double(),
        copy.deepcopy(model).to_empty(device="cpu"),
        copy.deepcopy(model).to("meta").to_empty(device="cpu"),
    ):
        rotaries = [block.self_attn.rotary for block in changed.transformer_blocks]
        assert rotaries[0] is rotaries[1]
        assert all(map(torch.equal, [each.table for each in rotaries], tables))
    assert not any("rotary" in name for name in model.state_dict())
