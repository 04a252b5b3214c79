"""The layers of today's decoders, a block at a time and drawn at random."""

import os
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.ops.attention import attention
from fastllm.ops.decoder import Dropout, MultiHeadAttention
from fastllm.ops.dispatch import use
from fastllm.ops.mlp import mlp
from fastllm.ops.multi_head_attention import multi_head_attention
from fastllm.ops.rope import rotate
from tests.conftest import assert_parity, assert_same_bits, decided_by_more_runs
from tests.ops.layers import Maker, problem

H = 24


@dataclass
class Case:
    """A block: settings of an attention with N heads that share K heads, of size D."""

    N: int = 3
    K: int = 3
    D: int = 8
    settings: Any = None  # a function of a Maker and the number of positions
    separate: bool = False


CASES = {
    "separate": Case(separate=True),
    "shared": Case(4, 2),
    "one-kv-head": Case(3, 1, separate=True),
    "wide-heads": Case(2, 1, 256),
    "rope": Case(settings=lambda m, S: {"rope": m.rope(S, 8)}),
    "rope-shared": Case(4, 2, 10, lambda m, S: {"rope": m.rope(S, 10)}, True),
    "rope-partial": Case(settings=lambda m, S: {"rope": m.rope(S, 6)}),
    "rope-interleaved": Case(settings=lambda m, S: {"rope": m.rope(S, 8, True)}),
    "qk-norm": Case(
        4, 2, 8, lambda m, S: {"q_norm": m.norm(8, "rms"), "k_norm": m.norm(8, "rms", offset=1)}
    ),
    "qk-norm-rope": Case(
        4,
        2,
        8,
        lambda m, S: {
            "q_norm": m.norm(8, "rms", False),
            "k_norm": m.norm(8, "layer"),
            "rope": m.rope(S, 8),
        },
    ),
    "window-1": Case(settings=lambda m, S: {"window": 1}),
    "window-5": Case(4, 2, settings=lambda m, S: {"window": 5}),
    "window-70": Case(settings=lambda m, S: {"window": 70}),
    "scale": Case(settings=lambda m, S: {"scale": 0.07}),
    "softcap": Case(4, 2, settings=lambda m, S: {"softcap": 1.5, "scale": 0.4}),
    "out-norm": Case(settings=lambda m, S: {"out_norm": m.norm(H, "rms", offset=1)}),
    "only-out-norm": Case(settings=lambda m, S: {"norm": None, "out_norm": m.norm(H, "rms")}),
    "residual-scale": Case(settings=lambda m, S: {"residual_scale": 0.2}),
}


def block(name: str, S: int, p: float, **settings: Any) -> Any:
    case, m = CASES[name], Maker(S)
    given = case.settings(m, S) if case.settings else {}
    widths = [heads * case.D for heads in (case.N, case.K, case.K)]
    qkv = [m.linear(width, H, True) for width in widths]
    packed = m.linear(sum(widths), H, False)
    fields = {
        "qkv": tuple(qkv) if case.separate else packed,
        "out": m.linear(H, case.N * case.D, True),
        "heads": case.N,
        "kv_heads": case.K,
        "norm": m.norm(H, "rms"),
        "causal": True,
        "weights_dropout": Dropout(p, 3),
        "out_dropout": Dropout(p, 5),
    }
    return MultiHeadAttention(**fields | given | settings)


@pytest.mark.parametrize("name", CASES)
def test_parity_of_attention_blocks(arithmetic: str, name: str) -> None:
    for B, S, p, norm_first in ((2, 7, 0.2, True), (1, 65, 0.0, False), (1, 150, 0.0, True)):
        record = block(name, S, p, norm_first=norm_first)
        run, tensors = problem(multi_head_attention, record, Maker(B).tensor(B, S, H))
        assert_parity(run, *tensors, runs=8)


@pytest.mark.parametrize("name", ["rope", "qk-norm-rope", "window-5", "softcap"])
def test_parity_of_packed_sequences(arithmetic: str, name: str) -> None:
    starts = (0, 5, 5, 69, 135)
    record = block(name, 66, 0.2, starts=starts)
    run, tensors = problem(multi_head_attention, record, Maker(1).tensor(135, H))
    assert_parity(run, *tensors)


def test_masks_join_a_window(arithmetic: str) -> None:
    mask = torch.rand(2, 1, 33, 33, generator=torch.Generator().manual_seed(0)) < 0.3
    mask[:, :, 4] = True
    record = block("window-5", 33, 0.2, mask=mask)
    run, tensors = problem(multi_head_attention, record, Maker(1).tensor(2, 33, H))
    assert_parity(run, *tensors)


def test_a_window_hides_what_a_mask_of_its_band_hides() -> None:
    m, S, window = Maker(0), 130, 9
    q, k, v = m.tensor(1, 4, S, 8), m.tensor(1, 2, S, 8), m.tensor(1, 2, S, 8)
    distance = torch.arange(S)[:, None] - torch.arange(S)
    seen = (distance >= 0) & (distance < window)
    expected = F.scaled_dot_product_attention(q, k, v, seen, scale=0.5, enable_gqa=True)
    for implementation in ("cpu", "ref"):
        with use(implementation):
            out = attention(q, k, v, None, True, window=window, scale=0.5)
        assert torch.allclose(out, expected, atol=1e-5)


def test_rotation_by_hand() -> None:
    """A quarter turn at position 1, on the first pair of three."""
    m = Maker(0)
    rope = m.rope(2, 4)._replace(table=torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]]))
    x = torch.tensor([[[[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]] * 2]])
    assert rotate(x, rope)[0, 0].tolist() == [[1, 2, 3, 4, 5, 6], [-3, 2, 1, 4, 5, 6]]
    turned = rotate(x, rope._replace(interleaved=True))[0, 0, 1]
    assert turned.tolist() == [-2, 1, 3, 4, 5, 6]


MLP_AROUND = {
    "out-norm": lambda m: {"out_norm": m.norm(H, "rms", offset=1)},
    "only-out-norm": lambda m: {"norm": None, "out_norm": m.norm(H, "layer")},
    "post-and-out-norm": lambda m: {"norm_first": False, "out_norm": m.norm(H, "rms")},
    "residual-scale": lambda m: {"residual_scale": 0.2},
    "post-and-scale": lambda m: {"norm_first": False, "residual_scale": 3.0},
}


@pytest.mark.parametrize("name", MLP_AROUND)
def test_parity_around_mlps(arithmetic: str, name: str) -> None:
    for rows, p in ((9, 0.2), (70, 0.0)):
        m = Maker(rows)
        record = m.mlp(H, True, p)._replace(
            norm=m.norm(H, "layer"), out_norm=None, residual_scale=1.0
        )
        record = record._replace(**MLP_AROUND[name](m))
        run, tensors = problem(mlp, record, m.tensor(rows, H))
        assert_parity(run, *tensors)


def test_parity_of_an_mlp_with_another_base(arithmetic: str) -> None:
    for rows, p in ((9, 0.2), (70, 0.0)):
        m = Maker(rows)
        run, tensors = problem(mlp, m.mlp(H, True, p), m.tensor(rows, H), m.tensor(rows, H))
        assert_parity(run, *tensors)


@pytest.mark.parametrize("name", ["qk-norm-rope", "window-5", "softcap", "one-kv-head"])
def test_bits_do_not_depend_on_threads(name: str) -> None:
    record = block(name, 70, 0.2)
    run, tensors = problem(multi_head_attention, record, Maker(1).tensor(3, 70, H))
    leaves = [tensor.requires_grad_() for tensor in tensors]

    def results() -> list[Tensor]:
        out = run(*leaves)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    with use("cpu"):
        assert_same_bits(results)


def test_parity_of_40_random_layers_slow(arithmetic: str) -> None:
    """Drawn anew in each run; a failure names its seed, which FASTLLM_TEST_SEED repeats."""
    first = int(os.environ.get("FASTLLM_TEST_SEED", random.randrange(10**6)))
    for seed in range(first, first + 40):
        m = Maker(seed)
        B, S, parallel = m.random.randint(1, 3), m.random.randint(1, 80), m.maybe(True, False)
        p, x = m.maybe(0.2, 0.0), m.tensor(B, S, H)
        bases = [m.tensor(B, S, H)] if parallel else []
        problems = (
            problem(multi_head_attention, m.attention(S, H, parallel, p), x),
            problem(mlp, m.mlp(H, parallel, p), x, *bases),
        )
        try:
            for run, tensors in problems:
                decided_by_more_runs(assert_parity, run, *tensors)
        except AssertionError as error:
            raise AssertionError(f"FASTLLM_TEST_SEED={seed}: {error}") from error
