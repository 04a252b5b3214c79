"""Drawing the next token from its logits."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastllm.ops.sampling import Sampling, sample


def by_sorting(logits: Tensor, s: Sampling) -> Tensor:
    """Sampling as it is usually written."""
    scores = logits / s.temperature
    if s.top_k:
        scores[scores < scores.topk(s.top_k).values[:, -1:]] = -torch.inf
    if s.top_p < 1:
        ordered, ids = scores.sort(descending=True)
        probabilities = ordered.softmax(-1)
        out = probabilities.cumsum(-1) - probabilities >= s.top_p
        scores = scores.scatter(-1, ids, ordered.masked_fill(out, -torch.inf))
    return torch.multinomial(scores.softmax(-1), 1)


# pytest benchmarks/bench_sampling.py --benchmark-only
@pytest.mark.parametrize("B", [1, 16])
@pytest.mark.parametrize("V", [66, 50_257])
@pytest.mark.parametrize("s", [Sampling(0.8), Sampling(0.8, 40), Sampling(0.8, top_p=0.9)], ids=str)
def test_sampling(race: Callable[..., None], V: int, B: int, s: Sampling) -> None:
    logits = 2 * torch.randn(B, V)
    steps = iter(range(10**9))
    settings = " ".join(f"{name}={value}" for name, value in s._asdict().items() if value)
    race(
        f"sampling V={V} B={B} {settings}",
        lambda: sample(logits, s, range(B), next(steps)),
        {"eager": lambda: by_sorting(logits, s)},
    )
