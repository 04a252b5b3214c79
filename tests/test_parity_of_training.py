"""Whole runs: the C++ kernels learn what the reference learns, step by step."""

from collections.abc import Callable
from pydoc_data import topics

import pytest
import torch
from torch import Tensor

import fastllm
from fastllm import DecoderModel
from fastllm.benchmarking.shapes import CONFIGS, MeasuredPrecision, StepShape
from fastllm.benchmarking.steps import build_fastllm
from fastllm.device import autocast
from fastllm.models.architectures import llama
from fastllm.ops.precision import why_not_autocast
from fastllm.optim import Adam
from fastllm.tokenization.simple_tokenizer import SimpleCharacterTokenizer
from tests.conftest import TEXTS, needs_extension


def read_text() -> str:
    """Several hundred thousand characters of English, on any machine."""
    path = TEXTS / "tinyshakespeare.txt"
    if path.exists():
        return path.read_text(encoding="utf-8")
    return "\n".join(topics.topics.values())


def small_llama(shape: StepShape) -> DecoderModel:
    """A Llama with shared heads and this shape."""
    config = llama(
        vocab_size=shape.V,
        hidden_size=shape.H,
        num_layers=shape.L,
        num_heads=shape.N,
        num_kv_heads=1,
        max_seq_len=shape.S,
        embedding_dropout_p=shape.dropout,
        attn_dropout_p=shape.dropout,
        mlp_dropout_p=shape.dropout,
    )
    return DecoderModel.from_config(config)


def losses(
    implementation: str,
    ids: Tensor,
    steps: int,
    precision: MeasuredPrecision = "fp32",
    build: Callable[[StepShape], DecoderModel] = build_fastllm,
    lr: float = 3e-3,
) -> list[float]:
    """The losses of benchmark configuration A, trained with dropout on windows of a text."""
    config = CONFIGS["A"]
    torch.manual_seed(0)
    model = build(config)
    optimizer = Adam(model.parameters(), lr=lr, max_grad_norm=1.0)
    found = []
    with fastllm.use(implementation):
        for _ in range(steps):
            starts = torch.randint(len(ids) - config.S, (config.B, 1))
            batch = ids[starts + torch.arange(config.S)]
            with autocast("cpu", precision):
                loss = model.loss(batch, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
    return found


@pytest.fixture
def ids() -> Tensor:
    """A text with no more distinct characters than configuration A has tokens."""
    text = read_text()
    common = "".join(sorted(set(text), key=text.count)[-CONFIGS["A"].V + 1 :])
    text = "".join(c for c in text[:400_000] if c in common)
    tokenizer = SimpleCharacterTokenizer([text])
    assert tokenizer.vocab_size <= CONFIGS["A"].V
    return torch.tensor(tokenizer.encode(text))


@needs_extension
@pytest.mark.parametrize(
    ("build", "lr"), [(build_fastllm, 3e-3), (small_llama, 1e-3)], ids=["gpt2", "llama"]
)
def test_two_hundred_steps_have_the_same_losses(
    ids: Tensor, build: Callable[[StepShape], DecoderModel], lr: float
) -> None:
    """Both draw the same dropout masks, so they differ only by rounding.

    Measured: at most 3e-7 of a loss, three units in the last place. The Llama at the higher rate is
    chaotic: even weights that differ by 1e-7 lead the reference away from itself by 7e-4.
    """
    actual, expected = (losses(each, ids, 200, build=build, lr=lr) for each in ("cpu", "ref"))
    assert actual == pytest.approx(expected, rel=1e-4)
    assert sum(actual[-10:]) / 10 < actual[0] - 1  # it learned


@needs_extension
def test_bf16_learns_as_much(ids: Tensor) -> None:
    """After two hundred steps the loss is that of fp32, within the variation between runs."""
    if reason := why_not_autocast(torch.bfloat16):
        pytest.skip(reason)
    in_fp32, in_bf16 = (losses("cpu", ids, 200, precision) for precision in ("fp32", "bf16"))
    assert in_bf16 != in_fp32
    assert sum(in_bf16[-50:]) / 50 == pytest.approx(sum(in_fp32[-50:]) / 50, abs=0.01)
