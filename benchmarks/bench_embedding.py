"""From token ids to hidden states: lookup, scale, position and dropout."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.benchmarking.shapes import CONFIGS, Letter
from fastllm.ops.decoder import Dropout, Embedding
from fastllm.ops.dropout import draw_seed
from fastllm.ops.embedding import embedding


# pytest benchmarks/bench_embedding.py --benchmark-only
@pytest.mark.parametrize("letter", CONFIGS)
def test_embedding(race_operation: Callable[..., None], letter: Letter) -> None:
    c = CONFIGS[letter]
    ids, scale = c.random_ids(), c.H**0.5
    weight = torch.randn(c.V, c.H, requires_grad=True)
    positions = torch.randn(c.S, c.H, requires_grad=True)

    def ours(p: float) -> Tensor:
        dropout = Dropout(p, draw_seed() if p else 0)
        return embedding(ids, Embedding(weight, positions, scale, dropout=dropout))

    def eager(p: float) -> Tensor:
        return F.dropout(F.embedding(ids, weight) * scale + positions, p)

    race_operation(
        f"embedding {letter}",
        ours,
        {"eager": eager},
        (weight, positions),
        c.dropout,
        bytes_moved=2 * 4 * ids.numel() * c.H,  # a row of the table is read and a row written
    )
