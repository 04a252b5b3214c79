"""Gradients of large parameters, whose memory is reused from step to step."""

import pytest
import torch
from torch import Tensor

from fastllm import DecoderModel, use
from fastllm.ops import extension, memory
from fastllm.ops.decoder import Dropout, Embedding, Linear, Mlp, MultiHeadAttention, Norm
from fastllm.ops.embedding import embedding
from fastllm.ops.linear_cross_entropy import linear_cross_entropy
from fastllm.ops.mlp import mlp
from fastllm.ops.multi_head_attention import multi_head_attention
from fastllm.ops.norm import norm
from tests.conftest import assert_parity, needs_extension

pytestmark = needs_extension


@pytest.fixture
def everything_large(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Handles every gradient like a large one, and records their sizes."""
    sizes: list[int] = []
    original = extension.kernels.Memory
    monkeypatch.setattr(extension.kernels, "Memory", lambda n: sizes.append(n) or original(n))
    monkeypatch.setattr(memory, "LARGE", 4)
    return sizes


def test_parity(everything_large: list[int]) -> None:
    """Old contents of reused memory do not affect the results."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 9, (3, 7), generator=generator)
    sizes = ((3, 7, 24), (36, 24), (24, 36), (72, 24), (24, 24), (9, 24), (7, 24), (24,), (24,))
    x, w1, w2, qkv, out, table, positions, weight, bias = (
        torch.randn(size, generator=generator) / 5 for size in sizes
    )
    for _ in range(3):
        assert_parity(
            lambda x, w1, w2, w, b: mlp(
                x,
                Mlp(
                    Linear(w1, None),
                    Linear(w2, None),
                    norm=Norm(w, b, 1e-5),
                    hidden_dropout=Dropout(0.1, 3),
                ),
            ),
            *(x, w1, w2, weight, bias),
        )
        assert_parity(
            lambda x, qkv, out: multi_head_attention(
                x, MultiHeadAttention(Linear(qkv, None), Linear(out, None), 3)
            ),
            *(x, qkv, out),
        )
        assert_parity(lambda x, w, b: norm(x, Norm(w, b, 1e-5)), x, weight, bias)
        assert_parity(lambda t, p: embedding(ids, Embedding(t, p)), table, positions)
        assert_parity(lambda x, t: linear_cross_entropy(x, Linear(t, None), ids), x, table)
    assert len(everything_large) == 3 * (5 + 3 + 3 + 2 + 2)


def test_memory_is_reused_and_live_gradients_do_not_change(everything_large: list[int]) -> None:
    torch.manual_seed(0)
    model = DecoderModel(11, 16, 1, 2, 8)
    batches = [torch.randint(0, 11, (32, 8)) for _ in range(4)]

    def gradients(ids: Tensor) -> list[Tensor]:
        torch.manual_seed(1)
        with use("cpu"):
            loss = model.loss(ids, ids)
        return list(torch.autograd.grad(loss, list(model.parameters())))

    def addresses(tensors: list[Tensor]) -> set[int]:
        return {tensor.data_ptr() for tensor in tensors}

    # While several steps' gradients are alive, each keeps its own memory.
    alive = [gradients(ids) for ids in batches]
    copies = [[grad.clone() for grad in step] for step in alive]
    places = [addresses(step) for step in alive]
    assert len(set.union(*places)) == sum(map(len, places))
    again = [gradients(ids) for ids in batches]
    for grads, copied, repeated in zip(alive, copies, again, strict=True):
        for grad, copy, repeat in zip(grads, copied, repeated, strict=True):
            assert torch.equal(grad, copy) and torch.equal(repeat, copy)

    # A view keeps the whole block alive.
    view, rest = alive[0][0][3], alive[0][0].data_ptr()
    expected = view.clone()
    del alive, again, grads, repeated, grad, repeat, copy
    for ids in batches:
        assert rest not in addresses(gradients(ids))
    assert torch.equal(view, expected)

    # If no more memory is idle than one step needs, all steps use the same.
    extension.kernels.Memory(12_345)  # no idle block has this size, so all are freed
    seen = addresses(gradients(batches[1]))
    assert addresses(gradients(batches[2])) == seen
    assert addresses(gradients(batches[3])) == seen
