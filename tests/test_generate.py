import copy
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastllm
from fastllm import DecoderModel, SimpleCharacterTokenizer
from fastllm.core.attachments import FORWARDS
from fastllm.generate import (
    ModuleDecoding,
    TextStream,
    generate_batch,
    generate_text,
    generate_tokens,
    start_decoding,
)
from fastllm.ops import dispatch
from fastllm.ops.decode import Decoding
from fastllm.ops.sampling import Sampling
from fastllm.tokenization import SubwordTokenizer, Tokenizer
from tests.conftest import MakeTrainer, needs_extension

TOKENIZER = SimpleCharacterTokenizer(["abcdefghij"])


@pytest.fixture(scope="module")
def model() -> DecoderModel:
    torch.manual_seed(0)
    model = DecoderModel(11, 16, 2, 2, max_seq_len=12).eval()
    for p in model.parameters():  # an untrained model hardly has preferences
        p.data *= 3
    return model


@pytest.mark.parametrize("learned", [False, True], ids=["sinusoidal", "learned"])
@pytest.mark.parametrize("prompt", [[1], [1, 2, 3], list(range(10)) * 3], ids=len)
def test_greedy_with_the_cache_equals_full_recomputation(learned: bool, prompt: list[int]) -> None:
    """Also far past max_seq_len, where the window moves on."""
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
def test_each_of_a_batch_continues_as_it_would_alone(
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
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_rounded_weights_hardly_change_the_text(precision: str) -> None:
    torch.manual_seed(0)
    model = DecoderModel(30, 64, 2, 2, 40).eval()
    ids = torch.randint(0, 30, (64, 40))
    ids[:, 1:] = (ids[:, :1] + 7 * torch.arange(1, 40)) % 30  # each token tells the next
    optimizer = fastllm.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        model.loss(ids, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    tokens = list(generate_tokens(model, [3], 30, temperature=0, precision=precision))
    assert tokens == [(3 + 7 * i) % 30 for i in range(1, 31)]


def test_what_is_attached_to_the_model_is_heard(model: DecoderModel) -> None:
    expected = list(generate_tokens(model, [1], 20, temperature=0))
    heard = []
    hook = model.transformer_blocks[1].mlp.fc1.register_forward_hook(lambda *a: heard.append(1))
    tokens = list(generate_tokens(model, [1], 20, temperature=0))
    with pytest.raises(ValueError, match="int8 needs the kernel and its cache: something is att"):
        list(generate_tokens(model, [1], 20, precision="int8"))
    hook.remove()
    assert len(heard) == 20 and tokens == expected
    model.train()  # with dropout
    assert len(list(generate_tokens(model, [1], 5))) == 5
    with pytest.raises(ValueError, match="dropout is on; call model.eval"):
        list(generate_tokens(model, [1], 20, precision="int8"))
    model.eval()


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "recomputed"])
def test_the_modules_compute_in_bf16_where_it_is_asked_for(
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
    """As adapters such as LoRA's stand in place of a linear layer."""

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
    if not dispatch.kernels.native_bf16():
        pytest.skip("this CPU has no bf16 dot products: under autocast the modules run")
    tokens = [[1, 2, 3]]
    rounded = start_decoding(model, 1, precision="bf16").extend(tokens).clone()
    plain = start_decoding(model, 1).extend(tokens).clone()
    with torch.autocast("cpu", torch.bfloat16):
        under = start_decoding(model, 1).extend(tokens).clone()
        assert isinstance(start_decoding(model, 1), Decoding)
    assert torch.equal(under, rounded) and not torch.equal(under, plain)


@needs_extension
def test_the_kernel_keeps_memory_for_what_is_asked(model: DecoderModel) -> None:
    decoding = start_decoding(model, 1, capacity=5)
    decoding.extend([[1, 2, 3, 4, 5]])
    with pytest.raises(ValueError, match="length 6 exceeds maximum sequence length 5"):
        decoding.extend([[6]])


@pytest.mark.parametrize("implementation", ["auto", "ref"])
def test_what_the_caller_does_to_the_tokens_changes_nothing(
    model: DecoderModel, implementation: str
) -> None:
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
def test_the_kernel_is_used_without_being_asked_for(
    model: DecoderModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DecoderModel, "forward", lambda *a, **k: pytest.fail("module was called"))
    monkeypatch.setitem(FORWARDS, DecoderModel, DecoderModel.forward)
    assert len(list(generate_tokens(model, [1], 20))) == 20


def test_repetitions_are_penalised(model: DecoderModel) -> None:
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


def test_same_seed_same_text(model: DecoderModel) -> None:
    texts = ["".join(generate_text(model, TOKENIZER, "abc", 40, seed=s)) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_callers_own_randomness_is_left_alone(model: DecoderModel) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    list(generate_tokens(model, [1], 5))
    assert torch.equal(torch.rand(3), expected)


def test_stop_text_ends_it_and_is_not_given_out(model: DecoderModel) -> None:
    text = "".join(generate_text(model, TOKENIZER, "ab", 80, seed=5))
    for length in (1, 2, 3):
        stop = text[30 : 30 + length]
        stopped = "".join(generate_text(model, TOKENIZER, "ab", 80, stop, seed=5))
        assert stopped == text[: text.index(stop)]
    assert "".join(generate_text(model, TOKENIZER, "ab", 80, "zz", seed=5)) == text


def test_pieces_of_a_subword_text_join_to_the_whole() -> None:
    """Characters that span tokens appear whole, and the spaces between words are kept."""
    text = "Grüße an 世界 and 🙂 the wonderful words of the world. " * 30
    for kind in ("bpe", "wordpiece"):
        tokenizer = SubwordTokenizer.train([text], kind, 300)  # type: ignore[arg-type]
        torch.manual_seed(0)
        model = DecoderModel(tokenizer.vocab_size, 8, 1, 2, 64).eval()
        tokens = list(generate_tokens(model, tokenizer.encode("the"), 200, seed=1))
        pieces = list(generate_text(model, tokenizer, "the", 200, seed=1))
        whole = tokenizer.decode(tokens)
        assert "".join(pieces) == whole
        assert len(pieces) > 50


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "character"])
def test_text_is_given_out_as_soon_as_it_is_certain_and_never_taken_back(kind: str) -> None:
    """Whatever tokens come, in an order that makes sense or not, and with any stop texts."""
    text = "Grüße an 世界 and 🙂 the wonderful words, of the world's end. " * 30
    tokenizer: Tokenizer = SimpleCharacterTokenizer([text])
    if kind != "character":
        tokenizer = SubwordTokenizer.train([text], kind, 300)  # type: ignore[arg-type]
    source = random.Random(5)
    sensible = tokenizer.encode(text)
    for _ in range(300):
        tokens = [source.randrange(tokenizer.vocab_size) for _ in range(source.randrange(60))]
        at = source.randrange(len(sensible) - 60)
        tokens = source.choice([tokens, sensible[at : at + 40], tokens + sensible[at : at + 20]])
        whole = tokenizer.decode(tokens)
        stream = TextStream(tokenizer)
        pieces = [stream.push(token) for token in tokens]
        assert "".join(pieces) + stream.end() == whole
        assert stream.length == stream.shown == len(whole) and not stream.stopped
        for number in (1, 2, 4):
            stops = [
                whole[at : at + source.randint(1, 5)] or "x"
                for at in (source.randrange(len(whole) + 1) for _ in range(number))
            ]
            ends = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops]
            expected = whole[: min((e for e in ends if e[1] >= 0), default=(0, len(whole)))[1]]
            stream, given = TextStream(tokenizer, stops), ""
            for token in tokens:
                given += stream.push(token)
                assert expected.startswith(given) and stream.shown == len(given)
                if stream.stopped:
                    break
            else:
                given += stream.end()
            assert given == expected


def test_wrong_settings(model: DecoderModel) -> None:
    with pytest.raises(ValueError, match=r"top_p must be in \(0, 1\], got 1.1"):
        list(generate_tokens(model, [1], 5, top_p=1.1))
    with pytest.raises(ValueError, match="max_new_tokens must not be negative, got -1"):
        list(generate_tokens(model, [1], -1))
    for wrong in (11, -1):
        for prompt in ([1, wrong], [wrong, *[1] * 30]):  # also where the model does not see it
            for penalty in (1.0, 1.1):
                with pytest.raises(IndexError, match=f"Token id {wrong} is outside the vocab"):
                    list(generate_tokens(model, prompt, 5, repetition_penalty=penalty))
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match="seed must be in"):
            list(generate_tokens(model, [1], 5, seed=seed))
    for use_cache in (True, False):
        with pytest.raises(ValueError, match="no precision 'fp8'; choose from fp32, bf16, int8, "):
            list(generate_tokens(model, [1], 5, use_cache=use_cache, precision="fp8"))


def test_empty_prompt_and_unknown_characters(model: DecoderModel) -> None:
    with pytest.raises(ValueError, match="the prompt is empty"):
        list(generate_text(model, TOKENIZER, "", 5))
    for prompts in ([[1], []], []):
        with pytest.raises(ValueError, match="the prompt is empty"):
            list(generate_batch(model, prompts, 5))
    with pytest.raises(KeyError, match="Character 'z' not found"):
        generate_text(model, TOKENIZER, "abz", 5)


def run(module: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"fastllm.{module}", *flags],
        capture_output=True, text=True, timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture
def run_dir(make_trainer: MakeTrainer) -> Path:
    trainer = make_trainer("run", "--max_steps", "3")
    trainer.train()
    return trainer.run_dir


def test_generate_command(run_dir: Path) -> None:
    flags = ("--checkpoint", str(run_dir), "--max-new-tokens", "40", "--seed", "3")
    first, again = (
        run("generate", *flags, "--prompt", "the"),
        run("generate", *flags, "--prompt", "the"),
    )
    assert first.returncode == 0, first.stderr
    assert first.stdout == again.stdout
    assert first.stdout.startswith("the") and len(first.stdout) == 3 + 40 + 1
    wrong = run("generate", *flags, "--prompt", "the Quick")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: Character 'Q' not found")
    assert wrong.stdout == ""
    missing = run("generate", "--checkpoint", str(run_dir / "nowhere"), "--prompt", "the")
    assert missing.returncode == 1
    assert "is no folder" in missing.stderr


def test_generate_command_on_a_file_of_prompts(run_dir: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the quick\n\nfox\n")
    flags = f"--checkpoint {run_dir} --prompt_file {prompts} --max_new_tokens 20".split()
    for more in ("", "--quantize int8", "--precision auto", "--temperature 0 --min_p 0.1"):
        result = run("generate", *flags, *more.split())
        assert result.returncode == 0, result.stderr
        first, second = result.stdout.split("\n---\n")
        assert first.startswith("the quick") and len(first) == 9 + 20
        assert second.startswith("fox") and len(second) == 3 + 20 + 1
    for wrong, message in (
        ("--prompt the", "give either a prompt or a prompt_file"),
        ("--quantize int8 --precision bf16", "exclude each other"),
        ("--prompt_file nowhere.txt", "nowhere.txt does not exist"),
    ):
        result = run("generate", *flags, *wrong.split())
        assert result.returncode == 1 and message in result.stderr
    lines = [word for word in "the quick brown fox jumps over a lazy dog".split() for _ in range(2)]
    prompts.write_text("\n".join(lines))
    together = run("generate", *flags, "--seed", "5").stdout.split("\n---\n")
    assert len(together) == len(lines) == 18  # more than are continued at a time
    for b in (0, 15, 16, 17):
        prompts.write_text(lines[b])
        alone = run("generate", *flags, "--seed", str(5 + b)).stdout
        assert alone.strip("\n") == together[b].strip("\n")
    prompts.write_text("\n")
    assert "has no line to continue" in run("generate", *flags).stderr


def test_evaluate_command(run_dir: Path, text: Path) -> None:
    flags = ("--checkpoint", str(run_dir), "--file_path", str(text))
    result = run("evaluate", *flags, "--json")
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert set(values) == {"loss", "perplexity", "bits_per_character", "tokens"}
    assert values["tokens"] == len(text.read_text()) - 1
    assert values["bits_per_character"] == pytest.approx(values["loss"] / 0.6931472, rel=1e-5)
    assert "bits per character" in run("evaluate", *flags).stdout
    for rounded in ("--quantize int8", "--precision auto"):
        again = run("evaluate", *flags, "--json", *rounded.split())
        assert again.returncode == 0, again.stderr
        assert json.loads(again.stdout)["loss"] == pytest.approx(values["loss"], rel=0.01)
    assert json.loads(run("evaluate", *flags, "--json", "--quantize", "int8").stdout) != values
    text.write_text("the QUICK fox")
    wrong = run("evaluate", *flags)
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: Character 'Q' not found")
