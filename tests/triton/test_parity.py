"""The Triton kernels against the reference: in Triton's interpreter, or on a GPU."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

import fastllm
from fastllm import DecoderModel
from fastllm.models.config import DecoderConfig
from fastllm.ops import dispatch, implementations
from fastllm.ops.attention import attention
from fastllm.ops.decoder import (
    ACTIVATIONS,
    Dropout,
    Embedding,
    Linear,
    Mlp,
    MultiHeadAttention,
    Norm,
    Rope,
)
from fastllm.ops.dropout import dropout, keep_mask
from fastllm.ops.embedding import embedding
from fastllm.ops.linear_cross_entropy import linear_cross_entropy
from fastllm.ops.mlp import mlp
from fastllm.ops.multi_head_attention import multi_head_attention
from fastllm.ops.norm import norm
from fastllm.ops.rope import rotate
from fastllm.optim import Adam, AdamW
from tests import TRITON_DEVICE, TRITON_OPERATIONS
from tests.conftest import (
    BAD,
    LAYOUTS,
    MASKS,
    assert_as_accurate,
    named_sizes,
    poisoned_memory,
    shape_name,
    stacked,
)

with fastllm.use("triton"):
    REASON = dispatch.why_not_triton()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return DTYPES[request.param]


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    torch.set_default_device(TRITON_DEVICE)
    yield
    torch.set_default_device(None)


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(sum(shape) + seed)
    return torch.randn(shape, generator=generator, device="cpu").to(TRITON_DEVICE)


def assert_parity(function: Callable[..., Tensor], dtype: torch.dtype, *tensors: Tensor) -> None:
    """Output and every gradient are as accurate as plain PyTorch's in the same type.

    16-bit results may be right by luck, so their errors are the largest of several runs.
    """
    factors = [1.0] if dtype is torch.float32 else [1 + i / 50 for i in range(4)]

    def run(implementation: str, kind: torch.dtype, factor: float) -> list[Tensor]:
        inputs = [(t.to(dtype) * factor).to(kind).requires_grad_() for t in tensors]
        poison = poisoned_memory() if implementation == "triton" else nullcontext()
        with fastllm.use(implementation), poison:
            out = function(*inputs)
            grad = randn(*out.shape, seed=1).to(dtype).to(kind)
            return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    kinds = (("triton", dtype), ("ref", dtype), ("ref", torch.float64))
    results = (stacked([run(*kind, factor) for factor in factors]) for kind in kinds)
    for i, (actual, plain, oracle) in enumerate(zip(*results, strict=True)):
        assert actual.dtype is dtype
        assert_as_accurate(actual, plain, oracle, f"gradient {i}" if i else "output")


# B, N, S, T, D
ATTENTION = [(2, 3, 7, 7, 20), (1, 1, 65, 65, 64), (1, 1, 5, 70, 16), (1, 2, 70, 50, 3)]


@pytest.mark.parametrize(
    ("dropout_p", "is_causal"),
    [(0.0, False), (0.0, True), (0.3, True)],
    ids=["all", "causal", "causal-dropout"],
)
@pytest.mark.parametrize("shape", ATTENTION, ids=shape_name("BNSTD"))
def test_attention(
    dtype: torch.dtype, shape: tuple[int, ...], dropout_p: float, is_causal: bool
) -> None:
    B, N, S, T, D = shape
    tensors = randn(B, N, S, D), randn(B, N, T, D, seed=1), randn(B, N, T, D, seed=2)
    assert_parity(
        lambda *qkv: attention(*qkv, None, is_causal, dropout_p, 2**62 + 5), dtype, *tensors
    )


# B, N, K, S, T, D
SHARED = [(2, 6, 2, 7, 7, 20), (1, 4, 1, 5, 70, 16), (1, 4, 2, 70, 50, 3)]


@pytest.mark.parametrize(
    ("window", "softcap"), [(None, 1.5), (1, None), (20, 1.5)], ids=["capped", "one", "both"]
)
@pytest.mark.parametrize("shape", SHARED, ids=shape_name("BNKSTD"))
def test_attention_of_shared_heads(
    dtype: torch.dtype, shape: tuple[int, ...], window: int | None, softcap: float | None
) -> None:
    """With dropout, and a scale of its own; to one key, gradients of queries are rounding alone."""
    B, N, K, S, T, D = shape
    q, k, v = randn(B, N, S, D), randn(B, K, T, D, seed=1), randn(B, K, T, D, seed=2)
    settings = None, True, 0.2, 5, window, 0.3, softcap
    if window == 1:
        assert_parity(lambda v: attention(q.to(v), k.to(v), v, *settings), dtype, v)
    else:
        assert_parity(lambda *qkv: attention(*qkv, *settings), dtype, q, k, v)


@pytest.mark.parametrize("window", [5, 32, 33, 64, 150])
@pytest.mark.parametrize(("S", "T"), [(150, 150), (40, 150), (150, 110)])
def test_attention_in_a_window_of_many_blocks(window: int, S: int, T: int) -> None:
    tensors = randn(1, 2, S, 8), randn(1, 1, T, 8, seed=3), randn(1, 1, T, 8, seed=4)
    mask = randn(S, T) < -1
    assert_parity(lambda *qkv: attention(*qkv, mask, True, window=window), torch.float32, *tensors)


@pytest.mark.parametrize("operation", ["forward", "backward"])
def test_attention_skips_blocks_outside_the_window(operation: str) -> None:
    """Hidden keys would be read as NaN, and 0 times NaN is not 0."""
    S, window = 256, 8
    q, k, v = (randn(1, 1, S, 8, seed=i).requires_grad_() for i in range(3))
    with torch.no_grad():
        k[:, :, :64], v[:, :, :64] = math.nan, math.nan
    with fastllm.use("triton"):
        out = attention(q, k, v, None, True, window=window)
        result = out if operation == "forward" else torch.autograd.grad(out.sum(), q)[0]
    assert result[:, :, 192:].isfinite().all()


def test_gradients_of_keys_skip_queries_outside_the_window() -> None:
    q, k, v = (randn(1, 1, 256, 8, seed=i).requires_grad_() for i in range(3))
    with torch.no_grad():
        q[:, :, 192:] = math.nan
    with fastllm.use("triton"):
        out = attention(q, k, v, None, True, window=8)
        grads = torch.autograd.grad(out.sum(), (k, v))
    for grad in grads:
        assert grad[:, :, :128].isfinite().all() and grad[:, :, 200:].isnan().all()


@pytest.mark.parametrize("softcap", [1e-3, 1.0, 50.0, 1e4])
def test_soft_caps_far_above_and_below_the_scores(softcap: float) -> None:
    tensors = [randn(1, 1, 40, 8, seed=i) for i in range(3)]
    assert_parity(lambda *qkv: attention(*qkv, softcap=softcap), torch.float32, *tensors)


def test_attention_of_heads_in_fp32_under_autocast() -> None:
    """As norms of queries and keys give them; the values come from a product."""
    q, k = randn(1, 2, 3, 128), randn(1, 1, 3, 128, seed=1)
    v = randn(1, 1, 3, 128, seed=2).bfloat16()
    with torch.autocast(TRITON_DEVICE, torch.bfloat16), fastllm.use("triton"):
        out = attention(q, k, v)
    with fastllm.use("triton"):
        assert torch.equal(out, attention(q.bfloat16(), k.bfloat16(), v))


def test_attention_to_one_key(dtype: torch.dtype) -> None:
    """Gradients of queries and keys are 0 up to the rounding of their terms."""
    q, k, v = (randn(1, 2, 1, 8, seed=i).to(dtype).requires_grad_() for i in range(3))
    with fastllm.use("triton"):
        out = attention(q, k, v)
        grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert torch.equal(out, v) and torch.equal(grads[2], torch.ones_like(v))
    assert max(float(grad.abs().max()) for grad in grads[:2]) < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("mask", MASKS)
def test_attention_masks(mask: str) -> None:
    B, N, S = 2, 3, 9
    attn_mask = randn(*named_sizes(mask, B=B, N=N, S=S, T=S)) < -0.7
    tensors = [randn(B, N, S, 16, seed=i) for i in range(3)]
    assert_parity(lambda *qkv: attention(*qkv, attn_mask, True, 0.2, 7), torch.float32, *tensors)


@pytest.mark.parametrize(
    ("D", "dtype"),
    [(100, torch.bfloat16), (200, torch.bfloat16), (256, torch.float16)],
)
def test_attention_of_wide_heads(dtype: torch.dtype, D: int) -> None:
    tensors = randn(1, 2, 33, D), randn(1, 1, 33, D, seed=3), randn(1, 1, 33, D, seed=4)
    assert_parity(lambda *qkv: attention(*qkv, None, True, 0.1, 3), dtype, *tensors)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_layouts(layout: str) -> None:
    tensors = [randn(2, 2, 8, 8, seed=i) for i in range(3)]

    def run(*qkv: Tensor) -> Tensor:
        return attention(*(LAYOUTS[layout](x) for x in qkv), None, True)

    assert_parity(run, torch.float32, *tensors)


@pytest.mark.parametrize("block_t", [32, 64, 128])
def test_attention_tiles(block_t: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every width in which dropout draws random numbers."""
    from fastllm.ops import attention_triton as kernels

    for kernel in (kernels.attention_fwd, kernels.attention_bwd_q, kernels.attention_bwd_kv):
        monkeypatch.setattr(kernel, "configs", [kernels.config(16, block_t, 4)])
    tensors = [randn(1, 2, 150, 8, seed=i) for i in range(3)]
    assert_parity(lambda *qkv: attention(*qkv, None, True, 0.3, 7), torch.float32, *tensors)


def rotary(S: int, R: int, interleaved: bool = False) -> Rope:
    angles = torch.arange(S)[:, None] / 7 ** (torch.arange(R // 2) / R)
    return Rope(1.2 * torch.cat((angles.cos(), angles.sin()), -1), interleaved)


# B, N, S, D, R
ROPE = [(2, 3, 7, 20, 20), (1, 1, 1, 2, 2), (2, 5, 33, 64, 16), (1, 2, 9, 12, 6)]


@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize("shape", ROPE, ids=shape_name("BNSDR"))
def test_rope(dtype: torch.dtype, shape: tuple[int, ...], interleaved: bool) -> None:
    """Of heads strided like a projection's."""
    B, N, S, D, R = shape
    rope = rotary(S, R, interleaved)
    assert_parity(lambda x: rotate(x.transpose(1, 2), rope), dtype, randn(B, S, N, D))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rope_layouts(layout: str) -> None:
    rope = rotary(12, 8)
    later = rope._replace(table=rope.table[4:])
    assert_parity(lambda x: rotate(LAYOUTS[layout](x), later), torch.float32, randn(2, 2, 8, 8))


def test_a_rotary_table_of_another_length_is_not_the_kernels() -> None:
    with (
        fastllm.use("triton"),
        pytest.raises(dispatch.ImplementationError, match="the table is .9, 8."),
    ):
        rotate(randn(1, 1, 8, 8), rotary(9, 8))


@pytest.mark.parametrize("name", ["llama", "gemma", "neox"])
def test_multi_head_attention(dtype: torch.dtype, name: str) -> None:
    N, K, S, D, H = 4, 2, 9, 16, 24

    def run(x: Tensor, qkv: Tensor, out: Tensor, *weights: Tensor) -> Tensor:
        layer, q, k = (Norm(w, None, 1e-6, "rms", 1.0) for w in weights)
        heads = MultiHeadAttention(Linear(qkv, None), Linear(out, None), N, layer, causal=True)
        settings = {
            "llama": {"kv_heads": K, "rope": rotary(S, D)},
            "gemma": {
                "kv_heads": K, "rope": rotary(S, D), "q_norm": q, "k_norm": k, "window": 4,
                "scale": 0.3, "softcap": 2.0,
            },
            "neox": {"rope": rotary(S, 4)},
        }[name]  # fmt: skip
        unused = 0 * sum(w.sum() for w in weights)
        return multi_head_attention(x, heads._replace(**settings)) + unused

    rows = (N + 2 * (N if name == "neox" else K)) * D
    tensors = randn(2, S, H), randn(rows, H) / 4, randn(H, N * D) / 8
    assert_parity(run, dtype, *tensors, randn(H) / 4, randn(D) / 4, randn(D, seed=1) / 4)


@pytest.mark.parametrize("norm", ["none", "pre", "post"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp(dtype: torch.dtype, activation: str, norm: str) -> None:
    H, I = 20, 64
    tensors = [randn(3, 3, H), randn(I, H) / 4, randn(I), randn(H, I) / 8, randn(H)]
    tensors += [1 + randn(H) / 4, randn(H, seed=5)]

    def run(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *n: Tensor) -> Tensor:
        which = Norm(*n, 1e-5) if norm != "none" else None
        layers = Linear(w1, b1), Linear(w2, b2)
        dropouts = Dropout(0.3, 11), Dropout(0.2, 13)
        out = mlp(x, Mlp(*layers, activation, which, norm == "pre", *dropouts))
        return out if which else out + 0 * sum(t.sum() for t in n)

    assert_parity(run, dtype, *tensors)


@pytest.mark.parametrize("biases", [True, False], ids=["biases", ""])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_mlp(dtype: torch.dtype, activation: str, biases: bool) -> None:
    H, I = 20, 64
    tensors = [randn(3, 3, H), randn(I, H) / 4, randn(H, I) / 8, randn(I, H, seed=2) / 4]
    tensors += [randn(I), randn(H), randn(I, seed=3)] if biases else []

    def run(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, *vectors: Tensor) -> Tensor:
        b1, b2, b3 = vectors if biases else (None, None, None)
        layers = Linear(w1, b1), Linear(w2, b2)
        dropout = Dropout(0.3, 11)
        return mlp(x, Mlp(*layers, activation, hidden_dropout=dropout, up=Linear(w3, b3)))

    assert_parity(run, dtype, *tensors)


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre", "post"])
def test_mlp_between_norms_of_another_base(dtype: torch.dtype, norm_first: bool) -> None:
    """As in Gemma, scaled as in Granite, and beside the attention as in GPT-NeoX."""
    H, I = 20, 64
    tensors = [randn(3, 3, H), randn(I, H) / 4, randn(H, I) / 8, randn(I, H, seed=2) / 4]
    tensors += [randn(H) / 4, randn(H, seed=3) / 4, randn(3, 3, H, seed=4)]

    def run(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, *rest: Tensor) -> Tensor:
        before, after = (Norm(w, None, 1e-6, "rms", 1.0) for w in rest[:2])
        gate, up, out = (Linear(w, None) for w in (w1, w3, w2))
        record = Mlp(gate, out, "gelu_tanh", before, norm_first, out_dropout=Dropout(0.2, 3))
        record = record._replace(up=up, out_norm=after, residual_scale=0.3)
        if norm_first:
            return mlp(x, record, rest[2])
        return mlp(x, record) + 0 * rest[2]

    assert_parity(run, dtype, *tensors)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2], ids=["", "dropout"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (70, 33, 100), (3, 40, 192)], ids=shape_name("RHI"))
def test_mlp_shapes(
    dtype: torch.dtype, shape: tuple[int, ...], dropout_p: float, bias: bool
) -> None:
    """Including rows that groups of random numbers straddle."""
    R, H, I = shape
    tensors = [randn(R, H), randn(I, H) / math.sqrt(H), randn(H, I) / math.sqrt(I)]
    biases = [randn(I), randn(H)] if bias else []

    def run(x: Tensor, w1: Tensor, w2: Tensor, *b: Tensor) -> Tensor:
        b1, b2 = b or (None, None)
        dropout = Dropout(dropout_p, 2**40)
        return mlp(x, Mlp(Linear(w1, b1), Linear(w2, b2), hidden_dropout=dropout))

    assert_parity(run, dtype, *tensors, *biases)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mlp_layouts(layout: str) -> None:
    """Layouts of weights and biases as well."""
    lay = LAYOUTS[layout]
    tensors = [randn(6, 16), randn(64, 16) / 4, randn(64), randn(16, 64) / 8, randn(16)]

    def run(*inputs: Tensor) -> Tensor:
        x, w1, b1, w2, b2 = map(lay, inputs)
        dropout = Dropout(0.2, 5)
        return mlp(x, Mlp(Linear(w1, b1), Linear(w2, b2), hidden_dropout=dropout))

    # bf16 covers our own product, too; "offset" makes everything fp32.
    for dtype in [torch.float32] if layout == "offset" else [torch.float32, torch.bfloat16]:
        assert_parity(run, dtype, *tensors)


# Of one number, the gradient of an RMS norm is 0 but for eps: rounding alone would be compared.
NORM_SHAPES = {"layer": [(1, 1), (2, 1), (30, 17), (5, 2500)], "rms": [(1, 2), (30, 17), (5, 2500)]}


@pytest.mark.parametrize("residual", [True, False], ids=["sum", ""])
@pytest.mark.parametrize(
    ("kind", "shape"), [(kind, shape) for kind in NORM_SHAPES for shape in NORM_SHAPES[kind]]
)
def test_norm(
    dtype: torch.dtype,
    kind: str,
    shape: tuple[int, int],
    residual: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With several rows per program."""
    from fastllm.ops import norm_triton as kernels

    monkeypatch.setattr(kernels, "PROGRAMS", 8)
    R, H = shape
    tensors = [randn(R, H) + 1, 1 + randn(H) / 4, randn(H)]
    tensors += [randn(R, H, seed=3)] if residual else []

    def run(x: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
        return norm(x, Norm(weight, bias, 1e-5, kind), *rest)

    assert_parity(run, dtype, *tensors)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_without_weight_or_bias(dtype: torch.dtype, kind: str, offset: float) -> None:
    settings = (1e-5, kind, offset)
    x, weight, bias = randn(6, 17) + 1, randn(17) / 4, randn(17)
    assert_parity(lambda x, w: norm(x, Norm(w, None, *settings)), dtype, x, weight)
    assert_parity(lambda x, b: norm(x, Norm(None, b, *settings)), dtype, x, bias)
    assert_parity(lambda x: norm(x, Norm(None, None, *settings)), dtype, x)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 7, 20, 30), (2, 40, 64, 5)], ids=str)
def test_embedding(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    B, S, H, V = shape
    ids = (randn(B, S).abs() * V).int() % V

    def run(weight: Tensor, positions: Tensor) -> Tensor:
        return embedding(ids, Embedding(weight, positions, H**0.5, 0, Dropout(0.25, 77)))

    assert_parity(run, dtype, randn(V, H), randn(S, H))


def test_embedding_without_positions(dtype: torch.dtype) -> None:
    ids = (randn(3, 7).abs() * 30).int() % 30

    def run(weight: Tensor) -> Tensor:
        return embedding(ids, Embedding(weight, None, 4.0, 0, Dropout(0.25, 77)))

    assert_parity(run, dtype, randn(30, 20))


@pytest.mark.parametrize("softcap", [1e-3, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("shape", [(19, 20, 66), (5, 8, 5000)], ids=shape_name("RHV"))
def test_capped_linear_cross_entropy(shape: tuple[int, ...], softcap: float) -> None:
    """With caps far above and far below the logits, and an ignored row."""
    R, H, V = shape
    targets = (randn(R).abs() * 10 * V).long() % V
    targets[1] = -100

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(x, Linear(weight, None), targets, softcap=softcap)

    assert_parity(run, torch.float32, randn(R, H), randn(V, H) / 4)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
@pytest.mark.parametrize("shape", [(1, 1, 2), (19, 20, 66), (5, 8, 5000)], ids=shape_name("RHV"))
def test_linear_cross_entropy(
    dtype: torch.dtype, shape: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of a few rows, some of which are ignored."""
    from fastllm.ops import linear_cross_entropy_triton as kernels

    R, H, V = shape
    monkeypatch.setattr(kernels, "LOGITS", 4 * V)
    targets = (randn(R).abs() * 10 * V).long() % V
    targets[1::5] = -100
    tensors = [randn(R, H), randn(V, H) / 4, *([randn(V)] if bias else [])]

    def run(x: Tensor, weight: Tensor, *biases: Tensor) -> Tensor:
        return linear_cross_entropy(x, Linear(weight, *biases or [None]), targets)

    assert_parity(run, dtype, *tensors)


def test_linear_cross_entropy_without_targets_and_with_impossible_tokens() -> None:
    weight = randn(8000, 4).requires_grad_()
    with fastllm.use("triton"):
        nothing = linear_cross_entropy(randn(3, 4), Linear(weight, None), torch.full((3,), -100))
        bias = torch.zeros(8000).index_fill(0, torch.arange(5000), -math.inf)
        loss = linear_cross_entropy(randn(3, 4), Linear(weight, bias), torch.full((3,), 6000))
    assert nothing.isnan()
    assert loss.isfinite()


@pytest.mark.parametrize("p", [0.0001, 0.5, 0.9])
@pytest.mark.parametrize("size", [1, 63, 64, 5000])
def test_dropout_draws_the_same_mask(size: int, p: float) -> None:
    ones = torch.ones(size)
    with fastllm.use("triton"):
        kept = dropout(ones, p, 2**63 - 1, 3) > 0
    assert torch.equal(kept, keep_mask(ones.shape, p, 2**63 - 1, 3, TRITON_DEVICE))


def test_dropout(dtype: torch.dtype) -> None:
    assert_parity(lambda x: dropout(x, 0.3, 5, 2), dtype, randn(7, 30))


def bad_cases() -> Iterator[tuple[str, Callable[..., Tensor], list[Tensor]]]:
    H = 16
    layer_norm = Norm(torch.ones(H), torch.zeros(H), 1e-5)
    layers = Linear(randn(64, H), None), Linear(randn(H, 64), None)
    yield "attention", lambda x: attention(x, x, x, None, True), [randn(1, 1, 8, H)]
    layer = Mlp(*layers, hidden_dropout=Dropout(0.5, 3))
    yield "mlp", lambda x: mlp(x, layer), [randn(8, H)]
    yield "norm", lambda x: norm(x, layer_norm), [randn(8, H)]
    yield "dropout", lambda x: dropout(x, 0.5, 3), [randn(8, H)]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_not_a_number_and_infinity_come_out(bad: float) -> None:
    for name, function, (x,) in bad_cases():
        x[..., 3, 5] = bad
        with fastllm.use("triton"):
            actual = function(x).isfinite()
        with fastllm.use("ref"):
            expected = function(x).isfinite()
        assert torch.equal(actual, expected), name
        assert not actual.all(), name


def test_infinitely_unlikely_keys_are_not_hidden_ones() -> None:
    """A row whose scores are all -inf is 0 / 0; a fully masked row is 0."""
    q, k = torch.full((1, 1, 2, 8), math.inf), torch.full((1, 1, 2, 8), -1.0)
    mask = torch.tensor([[True, True], [False, True]])
    for attn_mask in (None, mask):
        for is_causal in (False, True):
            results = []
            for implementation in ("triton", "ref"):
                with fastllm.use(implementation):
                    results.append(attention(q, k, torch.ones_like(k), attn_mask, is_causal))
            assert torch.equal(results[0].isnan(), results[1].isnan())
            assert results[0].isnan().any()
            assert torch.equal(results[0].nan_to_num(), results[1].nan_to_num())


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32])
def test_ids_of_every_integer_type(kind: torch.dtype) -> None:
    ids, positions = torch.tensor([[0, 2, 1]]), randn(3, 4)

    def run(ids: Tensor) -> tuple[Tensor, Tensor]:
        weight = randn(3, 4).requires_grad_()
        with fastllm.use("triton"):
            out = embedding(ids, Embedding(weight, positions, 2.0))
        return out, torch.autograd.grad(out.square().sum(), weight)[0]

    for actual, expected in zip(run(ids.to(kind)), run(ids), strict=True):
        assert torch.equal(actual, expected)


def test_small_probabilities_reach_fp16_gradients() -> None:
    """With 50,257 equally likely tokens and many rows."""
    V, R = 50_257, 40
    x, weight = torch.ones(R, 4), torch.zeros(V, 4)
    targets = torch.zeros(R, dtype=torch.long)

    def grad(implementation: str, dtype: torch.dtype) -> Tensor:
        head = weight.to(dtype).requires_grad_()
        with fastllm.use(implementation):
            loss = linear_cross_entropy(x.to(dtype), Linear(head, None), targets)
        (loss * 2.0**14).backward()  # the trainer's scale
        assert head.grad is not None
        return head.grad[1:].double()

    expected = grad("ref", torch.float64)
    assert torch.allclose(grad("triton", torch.float16), expected, rtol=2e-3)


@pytest.mark.parametrize("optimizer", [Adam, AdamW])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5, 1e9], ids=["", "clipped", "kept"])
def test_adam(optimizer: type[Adam], max_grad_norm: float | None) -> None:
    shapes = [(3,), (1025,), (), (40, 60)]

    def run(implementation: str, dtype: torch.dtype) -> list[Tensor]:
        params = [randn(*shape).to(dtype).requires_grad_() for shape in shapes]
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.1, "weight_decay": 0.2}]
        steps = optimizer(groups, 0.01, weight_decay=0.05, max_grad_norm=max_grad_norm)
        with fastllm.use(implementation):
            for i in range(3):
                for p in params:
                    p.grad = randn(*p.shape, seed=i).to(dtype)
                steps.step()
        norm = torch.tensor([steps.grad_norm or 0.0])
        return [norm, *(p.detach() for p in params)]

    kinds = (("triton", torch.float32), ("ref", torch.float32), ("ref", torch.float64))
    for results in zip(*(run(*kind) for kind in kinds), strict=True):
        assert_as_accurate(*results)


def test_adam_where_a_group_has_no_gradients() -> None:
    frozen, trained = (torch.ones(3, requires_grad=True) for _ in range(2))
    trained.grad = torch.ones(3)
    with fastllm.use("triton"):
        Adam([{"params": [frozen]}, {"params": [trained]}], 0.1, max_grad_norm=1.0).step()
        Adam([frozen], 0.1).step()
    assert torch.allclose(trained, torch.full((3,), 0.9))
    assert torch.equal(frozen, torch.ones(3))


def test_gradients_of_huge_norm_are_clipped_and_nan_is_reported() -> None:
    param = torch.ones(5, requires_grad=True)
    optimizer = Adam([param], 0.1, max_grad_norm=1.0)
    with fastllm.use("triton"):
        param.grad = torch.full((5,), 1e30)
        optimizer.step()
        assert optimizer.grad_norm == pytest.approx(math.sqrt(5) * 1e30)
        assert torch.allclose(param, torch.full((5,), 0.9))
        param.grad[2] = math.nan
        optimizer.step()
    assert math.isnan(optimizer.grad_norm or 0) and param.isnan().all()


SETTINGS: dict[str, dict[str, Any]] = {
    "pre": {"padding_idx": 3},
    "post": {"norm_first": False, "mlp_activation": "silu"},
    "learned": {"pos_encoding_learned": True, "mlp_activation": "gelu_tanh", "qkv_bias": False},
    "tied": {"tie_word_embeddings": True, "lm_head_bias": False, "scale_embeddings": False},
}

GEMMA: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1,
    "head_dim": 16, "max_seq_len": 20, "norm": "rms", "norm_offset": 1.0, "norm_order": "sandwich",
    "mlp": "geglu_tanh", "pos_encoding": "rope", "qk_norm": "weight", "window": 5,
    "window_pattern": (True, False), "attn_softcap": 20.0, "head_softcap": 30.0,
    "attn_dropout_p": 0.1, "embedding_dropout_p": 0.1, "mlp_dropout_p": 0.1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "precision"),
    [("pre", "fp32"), ("post", "bf16"), ("learned", "bf16"), ("tied", "fp32"), ("gemma", "bf16")],
)
def test_training_steps(kind: str, precision: str, calls: list[str]) -> None:
    """A whole model has the reference's losses, dropout included, and every part runs a kernel."""

    def losses(implementation: str) -> list[float]:
        torch.manual_seed(0)
        if kind == "gemma":
            model = DecoderModel.from_config(DecoderConfig(**GEMMA))
        else:
            model = DecoderModel(40, 32, 1, 2, 20, 64, **SETTINGS[kind])
        model = model.to(TRITON_DEVICE)
        optimizer = AdamW(model.parameters(), 1e-2, max_grad_norm=1.0)
        ids = torch.randint(0, 40, (2, 12), device="cpu").to(TRITON_DEVICE)
        result = []
        with fastllm.use(implementation):
            for _ in range(3):
                with torch.autocast(TRITON_DEVICE, torch.bfloat16, enabled=precision == "bf16"):
                    loss = model.loss(ids, ids)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                result.append(loss.item())
        return result

    expected = losses("ref")
    calls.clear()
    actual = losses("triton")
    assert set(calls) == set(TRITON_OPERATIONS) - ({"rope"} if kind != "gemma" else set())
    assert actual[-1] < actual[0]
    assert actual == pytest.approx(expected, rel=1e-5 if precision == "fp32" else 1e-2)


def test_implementations_on_a_gpu_are_triton_or_the_reference() -> None:
    with fastllm.use("triton"):
        answer = implementations("cuda")
    for operation in (*TRITON_OPERATIONS, "multi_head_attention"):
        assert answer[operation]["triton"] == "chosen"
    assert answer["sampling"] == {"cpu": "not for cuda", "ref": "chosen"}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operations whose kernels were launched."""
    seen: list[str] = []

    def watch(operation: str) -> None:
        module = import_module(f"fastllm.ops.{operation}_triton")
        original = getattr(module, f"{operation}_triton")

        def run(*arguments: Any) -> Any:
            seen.append(operation)
            return original(*arguments)

        monkeypatch.setattr(module, f"{operation}_triton", run)

    for operation in TRITON_OPERATIONS:
        watch(operation)
    return seen
