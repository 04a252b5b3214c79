from functools import partial

import pytest
import torch
from torch import Tensor

from fastllm.ops.decoder import Dropout, Embedding
from fastllm.ops.embedding import embedding
from tests.conftest import BAD, LAYOUTS, assert_parity, assert_same_bits, bits, shape_name

SIZES = [
    (1, 1, 8, 3),
    (3, 7, 20, 9),
    (2, 2, 5, 9),
    (2, 31, 64, 66),
    (1, 63, 40, 66),
    (3, 64, 16, 5),
    (2, 65, 17, 66),
    (1, 130, 96, 300),
    (1, 257, 33, 2),
    (1, 9, 8, 50_257),
]


def random_inputs(B: int, S: int, H: int, V: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids, weight, positions."""
    generator = torch.Generator().manual_seed(B * 1000 + S * 100 + H * 10 + V)
    ids = torch.randint(0, V, (B, S), generator=generator)
    return (ids, *(torch.randn(rows, H, generator=generator) for rows in (V, S)))


@pytest.mark.parametrize("size", SIZES, ids=shape_name("BSHV"))
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_parity(isa: str, size: tuple[int, int, int, int], p: float) -> None:
    ids, weight, positions = random_inputs(*size)
    for padding_idx in (None, 1):
        settings = (3.0, padding_idx, Dropout(p, 9))
        assert_parity(lambda *t, s=settings: embedding(ids, Embedding(*t, *s)), weight, positions)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parity_of_any_layout(isa: str, layout: str) -> None:
    ids, weight, positions = random_inputs(4, 9, 21, 12)
    weight, positions = LAYOUTS[layout](weight), LAYOUTS[layout](positions)
    settings = (0.5, 3, Dropout(0.3, 5))

    def run(ids: Tensor, *tables: Tensor) -> Tensor:
        return embedding(ids, Embedding(*tables, *settings))

    for some_ids in (ids, ids.int(), ids.t().contiguous().t(), torch.cat((ids, ids), 1)[:, ::2]):
        assert_parity(partial(run, some_ids), weight, positions)
    # The incoming gradient is transposed.
    assert_parity(lambda *t: run(ids, *t).mT, weight, positions)


def test_long_sums(isa: str) -> None:
    """All tokens are equal, so one row's gradient is the sum over all of them."""
    _, weight, positions = random_inputs(8, 300, 24, 4)
    ids = torch.full((8, 300), 2)
    settings = (4.0, None, Dropout(0.1, 7))
    assert_parity(lambda *t: embedding(ids, Embedding(*t, *settings)), weight, positions)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("which", range(2), ids=["weight", "positions"])
def test_not_a_number_and_infinity_as_in_the_reference(isa: str, bad: float, which: int) -> None:
    ids, *inputs = random_inputs(3, 7, 37, 5)
    inputs[which][2, 36] = bad
    for p in (0.0, 0.5):
        settings = (2.0, 1, Dropout(p, 3))
        # The gradient contains NaN or infinity as well.
        assert_parity(lambda *t, s=settings: embedding(ids, Embedding(*t, *s)).square(), *inputs)


def test_same_bits(isa: str, threads: None) -> None:
    ids, weight, positions = random_inputs(5, 33, 40, 9)
    settings = (2.0, 1, Dropout(0.2, 3))
    assert_same_bits(bits(lambda *t: embedding(ids, Embedding(*t, *settings)), weight, positions))


@pytest.mark.parametrize("wrong", [-1, 9])
def test_an_id_outside_the_vocabulary_is_named(wrong: int) -> None:
    ids, weight, positions = random_inputs(2, 3, 8, 9)
    ids[1, 1] = wrong
    with pytest.raises(IndexError, match=f"Token id {wrong} is outside the vocabulary of 9"):
        embedding(ids, Embedding(weight, positions))
