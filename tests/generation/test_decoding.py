import copy

import pytest
import torch

import fastllm
from fastllm import DecoderModel
from fastllm.core.fusible import FORWARDS
from fastllm.generation.decoding import (
    ModuleDecoding,
    generate_batch,
    generate_tokens,
    start_decoding,
)
from fastllm.ops import extension
from fastllm.ops.decode import Decoding
from fastllm.ops.sampling import Sampling
from tests.conftest import needs_extension


@pytest.mark.parametrize("learned", [False, True], ids=["sinusoidal", "learned"])
@pytest.mark.parametrize("prompt", [[1], [1, 2, 3], list(range(10)) * 3], ids=len)
def test_greedy_with_the_cache_equals_full_recomputation(learned: bool, prompt: list[int]) -> None:
    """Even far past max_seq_len, where the window moves."""
    torch.manual_seed(1)
    model = DecoderModel(11, 16, 2, 2, 12, pos_encoding_learned=learned).eval()
    cached, full = (
        list(generate_tokens(model, prompt, 60, temperature=0, use_cache=use)) for use in (1, 0)
    )
    assert cached == full
    assert len(cached) == 60


SAMPLINGS = [Sampling(0), Sampling(1.0, 5, 0.9, 0.01, 1.2)]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "recomputed"])
def test_each_prompt_of_a_batch_continues_as_it_would_alone(
    model: DecoderModel, sampling: Sampling, use_cache: bool
) -> None:
    """Prompts of unequal lengths, far past max_seq_len; the kernel and the modules agree."""
    prompts = [[1], [1, 2, 3], list(range(10)), [4] * 30, [1]]
    batch = list(zip(*generate_batch(model, prompts, 40, sampling, 7, use_cache), strict=True))
    for b, prompt in enumerate(prompts):
        for implementation in ("auto", "ref"):
            with fastllm.use(implementation):
                alone = generate_batch(model, [prompt], 40, sampling, 7 + b)
                assert [token for (token,) in alone] == list(batch[b])
    if sampling.temperature:
        assert batch[0] != batch[4]  # the next seed


@needs_extension
def test_a_thousand_tokens_equal_full_recomputation() -> None:
    torch.manual_seed(2)
    model = DecoderModel(66, 32, 2, 2, 1200, embedding_dropout_p=0).eval()
    for p in model.parameters():
        p.data *= 2
    cached = list(generate_tokens(model, [1, 2], 1000, temperature=0))
    assert len(set(cached)) > 10
    ids = torch.tensor([[1, 2, *cached[:-1]]])
    with torch.no_grad(), fastllm.use("ref"):
        full = model(ids)[0, 1:]
    assert full.argmax(-1).tolist() == cached


@needs_extension
@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_rounded_weights_hardly_change_the_text(precision: str) -> None:
    torch.manual_seed(0)
    model = DecoderModel(30, 64, 2, 2, 40).eval()
    ids = torch.randint(0, 30, (64, 40))
    ids[:, 1:] = (ids[:, :1] + 7 * torch.arange(1, 40)) % 30  # each token determines the next
    optimizer = fastllm.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        model.loss(ids, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    tokens = list(generate_tokens(model, [3], 30, temperature=0, precision=precision))
    assert tokens == [(3 + 7 * i) % 30 for i in range(1, 31)]


def test_hooks_and_dropout_are_honoured(model: DecoderModel) -> None:
    expected = list(generate_tokens(model, [1], 20, temperature=0))
    calls = []
    hook = model.transformer_blocks[1].mlp.fc1.register_forward_hook(lambda *a: calls.append(1))
    tokens = list(generate_tokens(model, [1], 20, temperature=0))
    with pytest.raises(ValueError, match="int8 needs the kernel and its cache: .*something is att"):
        list(generate_tokens(model, [1], 20, precision="int8"))
    hook.remove()
    assert len(calls) == 20 and tokens == expected
    model.train()  # with dropout
    assert len(list(generate_tokens(model, [1], 5))) == 5
    with pytest.raises(ValueError, match="dropout is on; call model.eval"):
        list(generate_tokens(model, [1], 20, precision="int8"))
    model.eval()


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "recomputed"])
def test_the_modules_compute_in_the_requested_precision(
    model: DecoderModel, use_cache: bool
) -> None:
    dtypes = []
    fc1 = model.transformer_blocks[0].mlp.fc1
    hook = fc1.register_forward_hook(lambda module, inputs, out: dtypes.append(out.dtype))
    for precision in ("fp32", "bf16"):
        rounded = generate_tokens(model, [1, 2], 20, use_cache=use_cache, precision=precision)
        assert len(list(rounded)) == 20
    with torch.autocast("cpu", torch.bfloat16):
        list(generate_tokens(model, [1, 2], 20, use_cache=use_cache))
    hook.remove()
    assert dtypes == [torch.float32] * 20 + [torch.bfloat16] * 40


@needs_extension
def test_a_replaced_layer_is_called(model: DecoderModel) -> None:
    """For example an adapter such as LoRA's in place of a linear layer."""

    class Doubled(torch.nn.Module):
        def __init__(self, layer: torch.nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.layer(x)

    replaced, scaled = copy.deepcopy(model), copy.deepcopy(model)
    mlp = replaced.transformer_blocks[0].mlp
    mlp.fc2 = Doubled(mlp.fc2)
    with torch.no_grad():
        for p in scaled.transformer_blocks[0].mlp.fc2.parameters():
            p *= 2
    first, second, plain = (
        list(generate_tokens(m, [1], 20, temperature=0)) for m in (replaced, scaled, model)
    )
    assert first == second != plain
    assert isinstance(start_decoding(replaced, 1), ModuleDecoding)
    assert isinstance(start_decoding(scaled, 1), Decoding)


@needs_extension
def test_autocast_is_honoured(model: DecoderModel) -> None:
    if not extension.kernels.native_bf16():
        pytest.skip("this CPU has no bf16 dot products: under autocast the modules run")
    tokens = [[1, 2, 3]]
    rounded = start_decoding(model, 1, precision="bf16").extend(tokens).clone()
    plain = start_decoding(model, 1).extend(tokens).clone()
    with torch.autocast("cpu", torch.bfloat16):
        under = start_decoding(model, 1).extend(tokens).clone()
        assert isinstance(start_decoding(model, 1), Decoding)
    assert torch.equal(under, rounded) and not torch.equal(under, plain)


@needs_extension
def test_the_kernel_reserves_memory_for_the_given_capacity(model: DecoderModel) -> None:
    decoding = start_decoding(model, 1, capacity=5)
    decoding.extend([[1, 2, 3, 4, 5]])
    with pytest.raises(ValueError, match="length 6 exceeds maximum sequence length 5"):
        decoding.extend([[6]])


@pytest.mark.parametrize("implementation", ["auto", "ref"])
def test_the_caller_may_change_the_yielded_tokens(model: DecoderModel, implementation: str) -> None:
    prompts = [[1], [2, 3]]
    with fastllm.use(implementation):
        expected = list(generate_batch(model, prompts, 30, Sampling(0)))
        seen = []
        for tokens in generate_batch(model, prompts, 30, Sampling(0)):
            seen.append(list(tokens))
            tokens[:] = [0, 0]
    assert seen == expected
    assert prompts == [[1], [2, 3]]


@needs_extension
def test_the_kernel_is_the_default(model: DecoderModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        DecoderModel, "forward", lambda *a, **k: pytest.fail("the module was called")
    )
    monkeypatch.setitem(FORWARDS, DecoderModel, DecoderModel.forward)
    assert len(list(generate_tokens(model, [1], 20))) == 20


def test_repetition_penalty_gives_more_distinct_tokens(model: DecoderModel) -> None:
    plain, penalised = (
        list(generate_tokens(model, [1], 40, temperature=0, repetition_penalty=penalty))
        for penalty in (1.0, 1.5)
    )
    assert len(set(penalised)) > len(set(plain))


def test_the_model_never_sees_more_than_it_was_trained_on(model: DecoderModel) -> None:
    lengths = []
    hook = model.register_forward_hook(lambda m, inputs, out: lengths.append(inputs[0].size(1)))
    list(generate_tokens(model, [1], 30, use_cache=False))
    hook.remove()
    assert max(lengths) == 11
    assert lengths[11:14] == [5, 6, 7]


def test_padding_is_never_generated() -> None:
    torch.manual_seed(0)
    model = DecoderModel(11, 16, 1, 2, 12, padding_idx=10).eval()
    with torch.no_grad():
        model.lm_head.bias[10] = 100.0
    assert 10 not in list(generate_tokens(model, [1], 50))
    assert 10 not in list(generate_tokens(model, [1], 50, temperature=0))


def test_the_callers_random_state_is_left_alone(model: DecoderModel) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    list(generate_tokens(model, [1], 5))
    assert torch.equal(torch.rand(3), expected)


def test_invalid_settings(model: DecoderModel) -> None:
    with pytest.raises(ValueError, match=r"top_p must be in \(0, 1\], got 1.1"):
        list(generate_tokens(model, [1], 5, top_p=1.1))
    with pytest.raises(ValueError, match="max_new_tokens must not be negative, got -1"):
        list(generate_tokens(model, [1], -1))
    for wrong in (11, -1):
        for prompt in ([1, wrong], [wrong, *[1] * 30]):  # even outside the model's window
            for penalty in (1.0, 1.1):
                with pytest.raises(IndexError, match=f"Token id {wrong} is outside the vocab"):
                    list(generate_tokens(model, prompt, 5, repetition_penalty=penalty))
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match="seed must be in"):
            list(generate_tokens(model, [1], 5, seed=seed))
    for use_cache in (True, False):
        with pytest.raises(
            ValueError, match="unknown precision 'fp8'; choose from fp32, bf16, int8, int4, "
        ):
            list(generate_tokens(model, [1], 5, use_cache=use_cache, precision="fp8"))


def test_empty_prompts(model: DecoderModel) -> None:
    for prompts in ([[1], []], []):
        with pytest.raises(ValueError, match="the prompt is empty"):
            list(generate_batch(model, prompts, 5))
