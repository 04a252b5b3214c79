import math

import pytest
import torch
from torch import nn

import fastllm
from fastllm import EmbeddingLayer, PositionalEncoding


def test_sinusoidal_by_hand() -> None:
    pe = PositionalEncoding(4, max_seq_len=3).pe
    assert pe.shape == (1, 3, 4)
    expected = [math.sin(2), math.cos(2), math.sin(2 / 100), math.cos(2 / 100)]
    assert torch.allclose(pe[0, 2], torch.tensor(expected))


@pytest.mark.parametrize("learned", [False, True], ids=["sinusoidal", "learned"])
def test_adds_positions_and_knows_its_limits(learned: bool) -> None:
    module = PositionalEncoding(6, max_seq_len=10, dropout_p=0.0, learned=learned)
    table = module.pos_embedding.weight if learned else module.pe[0]
    x = torch.randn(2, 4, 6)
    assert torch.equal(module(x), x + table[:4])
    assert torch.equal(module(x, offset=6), x + table[6:])
    with pytest.raises(ValueError, match="Sequence length 11 exceeds maximum sequence length 10"):
        module(torch.randn(1, 11, 6))
    with pytest.raises(ValueError, match="Sequence length 11 exceeds"):
        module(x, offset=7)


def test_attributes_and_state() -> None:
    module = PositionalEncoding(5, 8, dropout_p=0.3)
    assert (module.hidden_size, module.max_seq_len, module.learned) == (5, 8, False)
    assert module.dropout_p == module.dropout.p == 0.3
    assert isinstance(module.dropout, nn.Dropout)
    assert list(module.state_dict()) == ["pe"]
    learned = PositionalEncoding(5, 8, learned=True)
    assert isinstance(learned.pos_embedding, nn.Embedding)
    assert list(learned.state_dict()) == ["pos_embedding.weight"]


def test_dropout_only_in_training() -> None:
    module = PositionalEncoding(64, 32, dropout_p=0.5)
    x = torch.ones(1, 32, 64)
    assert (module(x) == 0).any()
    assert torch.equal(module.eval()(x), x + module.pe)


def test_embedding_is_scaled_and_starts_small() -> None:
    layer = EmbeddingLayer(1000, 64, max_seq_len=8, dropout_p=0.0, padding_idx=7)
    ids = torch.randint(0, 1000, (2, 8))
    expected = layer.token_embeddings(ids) * 8 + layer.positional_encoding.pe
    assert torch.allclose(layer(ids), expected)
    assert layer.token_embeddings.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(layer.token_embeddings.weight[7], torch.zeros(64))
    assert layer.padding_idx == 7


@pytest.mark.parametrize("implementation", ["auto", "ref"])
def test_embedding_may_stay_unscaled(implementation: str) -> None:
    layer = EmbeddingLayer(50, 64, 8, dropout_p=0.0, scale_embeddings=False)
    ids = torch.randint(0, 50, (2, 8))
    expected = layer.token_embeddings(ids) + layer.positional_encoding.pe
    with fastllm.use(implementation):
        assert torch.equal(layer(ids), expected)
        layer.token_embeddings.register_forward_hook(lambda *_: None)
        assert torch.equal(layer(ids), expected)  # through the modules


def test_padding_row_gets_no_gradient() -> None:
    layer = EmbeddingLayer(5, 4, padding_idx=0)
    layer(torch.tensor([[0, 1, 0]])).sum().backward()
    grad = layer.token_embeddings.weight.grad
    assert grad is not None
    assert torch.equal(grad[0], torch.zeros(4))
    assert grad[1].abs().sum() > 0


@pytest.mark.parametrize("wrong", [-1, 5, 2**40])
def test_ids_out_of_range_are_named(wrong: int) -> None:
    layer = EmbeddingLayer(5, 4)
    with pytest.raises(IndexError, match=f"Token id {wrong} is outside the vocabulary of 5"):
        layer(torch.tensor([[1, wrong, 2]]))


def test_empty_batch() -> None:
    assert EmbeddingLayer(5, 4)(torch.zeros(0, 3, dtype=torch.long)).shape == (0, 3, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("learned", [False, True], ids=["sinusoidal", "learned"])
def test_dtype_reaches_everything(dtype: torch.dtype, learned: bool) -> None:
    layer = EmbeddingLayer(5, 4, pos_encoding_learned=learned, dtype=dtype)
    assert {t.dtype for t in layer.state_dict().values()} == {dtype}
    assert layer(torch.tensor([[1, 2]])).dtype == dtype
