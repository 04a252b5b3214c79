"""Tests that need a GPU. `make test-cuda` runs them and the parity tests on one."""

import math

import pytest
import torch

import fastllm
from fastllm import DecoderModel, bench
from fastllm.generation.decoding import generate_tokens
from fastllm.ops import OPERATIONS, dispatch
from fastllm.ops.attention import AttentionOptions, attention
from fastllm.optim import AdamW
from tests import TRITON_DEVICE
from tests.conftest import MakeTrainer

pytestmark = pytest.mark.skipif(
    TRITON_DEVICE != "cuda", reason="needs a CUDA GPU: `make test-cuda` runs this on one"
)


def test_triton_is_chosen_on_a_gpu() -> None:
    x = torch.ones(2, 2, 64, 32, device="cuda", dtype=torch.bfloat16)
    chosen = dispatch.choose("attention", OPERATIONS["attention"], x, x, x, AttentionOptions())
    assert chosen.name == "triton"


@pytest.mark.parametrize("S", [1000, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_long_sequences_agree_with_pytorch(dtype: torch.dtype, S: int) -> None:
    q, k, v = (torch.randn(2, 4, S, 64, device="cuda", dtype=dtype) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=True
    )
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    error = (attention(q, k, v, None, True) - expected).abs().max()
    assert error <= 2 * (plain - expected).abs().max() + 1e-6 * expected.abs().max()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_learns_and_resumes(precision: str, make_trainer: MakeTrainer) -> None:
    flags = f"--device cuda --precision {precision} --hidden_size 64 --dropout 0.1".split()
    whole = make_trainer("whole", *flags, "--max_steps", "60")
    whole.train()
    assert whole.progress.val_loss is not None
    assert whole.progress.val_loss < math.log(whole.model.vocab_size)
    make_trainer("parts", *flags, "--max_steps", "30").train()
    resumed = make_trainer("parts", "--resume", "--max_steps", "60")
    resumed.train()
    # The gradient of embeddings is summed in varying order.
    assert resumed.progress.val_loss == pytest.approx(whole.progress.val_loss, rel=0.02)


def test_a_step_of_every_configuration() -> None:
    for config in bench.CONFIGS.values():
        model = bench.build_fastllm(config).to("cuda")
        optimizer = AdamW(model.parameters(), 1e-3, max_grad_norm=1.0)
        ids = config.random_ids().to("cuda")
        losses = []
        for _ in range(3):
            with torch.autocast("cuda", torch.bfloat16):
                loss = model.loss(ids, ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]


def test_generation_is_the_cpus() -> None:
    torch.manual_seed(0)
    model = DecoderModel(30, 64, 2, 2, 64).eval()
    expected = list(generate_tokens(model, [1, 2], 40, temperature=0))
    assert list(generate_tokens(model.to("cuda"), [1, 2], 40, temperature=0)) == expected
    with fastllm.use("ref"):
        assert list(generate_tokens(model, [1, 2], 40, temperature=0)) == expected
