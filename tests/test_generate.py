import json
import os
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from fastllm import DecoderModel, SimpleCharacterTokenizer
from fastllm.generate import generate_text, generate_tokens, sample
from fastllm.tokenization import SubwordTokenizer
from tests.conftest import MakeTrainer

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


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=20), st.floats(0.05, 1), st.integers(0, 9))
@settings(deadline=None, max_examples=100, derandomize=True)
def test_sampled_tokens_are_among_the_likeliest(
    logits: list[float], top_p: float, top_k: int
) -> None:
    scores = torch.tensor(logits)
    probabilities = scores.softmax(0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        token = sample(scores, 1.0, top_k, top_p, generator)
        likelier = probabilities[probabilities > probabilities[token]]
        if top_k:
            assert len(likelier) < top_k
        else:
            assert likelier.sum().item() < top_p + 1e-5


def test_sampling_follows_the_probabilities() -> None:
    logits = torch.tensor([0.1, 0.2, 0.7]).log()
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(3)
    for _ in range(4000):
        counts[sample(logits, 1.0, 0, 1.0, generator)] += 1
    assert torch.allclose(counts / 4000, torch.tensor([0.1, 0.2, 0.7]), atol=0.03)
    assert sample(logits, 0.0, 0, 1.0, generator) == 2
    assert sample(logits, 1e-40, 0, 1.0, generator) == 2
    assert {sample(logits, 1.0, 1, 1.0, generator) for _ in range(50)} == {2}
    assert {sample(logits, 1.0, 0, 0.8, generator) for _ in range(200)} == {1, 2}


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


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}],
    ids=str,
)
def test_wrong_settings(model: DecoderModel, settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must not be negative and top_p must be in"):
        list(generate_tokens(model, [1], 5, **settings))  # type: ignore[arg-type]


def test_empty_prompt_and_unknown_characters(model: DecoderModel) -> None:
    with pytest.raises(ValueError, match="the prompt is empty"):
        list(generate_text(model, TOKENIZER, "", 5))
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


def test_evaluate_command(run_dir: Path, text: Path) -> None:
    flags = ("--checkpoint", str(run_dir), "--file_path", str(text))
    result = run("evaluate", *flags, "--json")
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert set(values) == {"loss", "perplexity", "bits_per_character", "tokens"}
    assert values["tokens"] == len(text.read_text()) - 1
    assert values["bits_per_character"] == pytest.approx(values["loss"] / 0.6931472, rel=1e-5)
    assert "bits per character" in run("evaluate", *flags).stdout
    text.write_text("the QUICK fox")
    wrong = run("evaluate", *flags)
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: Character 'Q' not found")
