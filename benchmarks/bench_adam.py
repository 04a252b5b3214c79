"""Clipping and one Adam step for all parameters, against PyTorch's fused Adam."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastllm.benchmarking.shapes import CONFIGS
from fastllm.benchmarking.steps import build_fastllm
from fastllm.optim import Adam

MODELS = {
    "A": CONFIGS["A"],  # 0.1M parameters: dominated by the cost of a call
    "50M": CONFIGS["E"]._replace(V=4900),  # dominated by memory traffic
}


def make_params(model: str) -> list[Tensor]:
    """Parameters with gradients, equal in every call."""
    torch.manual_seed(0)
    params = [p.detach().requires_grad_() for p in build_fastllm(MODELS[model]).parameters()]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def make_step(by: str, params: list[Tensor], clip: bool) -> Callable[[], None]:
    if by == "fastllm":
        return Adam(params, max_grad_norm=1.0 if clip else None).step
    optimizer = torch.optim.Adam(params, fused=True)

    def step() -> None:
        if clip:
            torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()

    return step


# pytest benchmarks/bench_adam.py --benchmark-only
@pytest.mark.parametrize("clip", [True, False], ids=["clip", "noclip"])
@pytest.mark.parametrize("model", MODELS)
def test_adam(race: Callable[..., None], model: str, clip: bool) -> None:
    params, theirs = make_params(model), make_params(model)
    step, their_step = make_step("fastllm", params, clip), make_step("torch", theirs, clip)
    before = [p.detach().clone() for p in params]
    step()
    their_step()
    for p, other, start in zip(params, theirs, before, strict=True):
        assert torch.allclose(p - start, other - start, rtol=1e-4, atol=1e-7)
    size = sum(p.numel() for p in params)
    race(
        f"adam {model} {'with' if clip else 'without'} clipping",
        step,
        {"call": their_step},
        # Four arrays are read and three written; clipping reads the gradients again.
        bytes_moved=size * (32 if clip else 28),
    )
