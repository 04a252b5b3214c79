import math
from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor

import fastllm
from fastllm.ops import sampling
from fastllm.ops.sampling import Sampling, sample
from tests.conftest import needs_extension

SAMPLINGS = [
    Sampling(0),
    Sampling(),
    Sampling(0.7, top_k=5),
    Sampling(1.5, top_p=0.8),
    Sampling(1.0, min_p=0.1),
    Sampling(0.9, 40, 0.9, 0.02, 1.3),
]


def tokens(implementation: str, *arguments: object) -> list[int]:
    with fastllm.use(implementation):
        return sample(*arguments).tolist()  # type: ignore[arg-type]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("V", [1, 2, 15, 16, 17, 66, 1500, 50_257])
def test_parity(isa: str, V: int, sampling: Sampling) -> None:
    """The reference's tokens, also with equal logits and with excluded tokens."""
    generator = torch.Generator().manual_seed(V)
    for step in range(5):
        logits = 3 * torch.randn(3, V, generator=generator)
        if step == 1:
            logits = logits.round()
        if step == 2:
            logits[:, 1::2] = -math.inf
        if step == 3:
            logits *= 1e4
        seen = torch.rand(3, V, generator=generator) < 0.3
        arguments = (logits, sampling, [5, 6, 2**63], step, seen)
        assert tokens("cpu", *arguments) == tokens("ref", *arguments)


ROWS = st.lists(st.floats(-30, 30, width=32) | st.just(-math.inf) | st.sampled_from([0.0, -0.0]))


@needs_extension
@given(
    ROWS.filter(lambda row: any(map(math.isfinite, row))),
    st.builds(
        Sampling,
        st.sampled_from([0.0, 1e-46, 1e-6, 0.5, 1.0, 1e6, 1e300]),
        st.integers(0, 9),
        st.sampled_from([1e-9, 0.3, 0.9, 1.0]),
        st.sampled_from([0.0, 0.1, 1.0]),
        st.sampled_from([0.5, 1.0, 1.7]),
    ),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**63 - 1),
)
# Weights that differ from min_p by less than fp32 can tell.
@example([0.0, 0.0, 0.0, 0.015625], Sampling(1e6, 0, 0.3, 1.0), 0, 0)
# Temperatures that fp32 cannot hold.
@example([0.0, 0.0, 0.0, 2.0**-149], Sampling(1e-46, 0, 0.3), 0, 0)
@example([0.0, 3e38], Sampling(1e39, 0, 0.55), 0, 0)
@settings(deadline=None, max_examples=300, derandomize=True)
def test_any_settings(row: list[float], sampling: Sampling, seed: int, step: int) -> None:
    """For any numbers, the token is the reference's, and no rule excludes it."""
    logits = torch.tensor([row])
    seen = torch.zeros_like(logits, dtype=torch.bool)
    (token,) = tokens("cpu", logits, sampling, [seed], step, seen)
    assert row[token] > -math.inf
    if sampling.temperature == 0 or sampling.top_p == 1e-9 or sampling.top_k == 1:
        assert token == row.index(max(row))
    if sampling.top_k:
        assert sum(score > row[token] for score in row) < sampling.top_k
    assert tokens("ref", logits, sampling, [seed], step, seen) == [token]


def drawn(logits: Tensor, sampling: Sampling, steps: int = 20_000) -> Tensor:
    """How often each token was drawn."""
    counts = torch.zeros(logits.numel())
    rows = logits.expand(100, -1).contiguous()
    for step in range(steps // 100):
        chosen = sample(rows, sampling, range(100), step)
        counts += torch.bincount(chosen, minlength=len(counts))
    return counts


@pytest.mark.parametrize("implementation", ["cpu", "ref"])
@pytest.mark.parametrize("V", [66, 1500])
def test_each_sequence_has_its_own_settings_and_step(isa: str, V: int, implementation: str) -> None:
    generator = torch.Generator().manual_seed(9)
    logits = 3 * torch.randn(len(SAMPLINGS), V, generator=generator)
    seen = torch.rand(logits.shape, generator=generator) < 0.3
    seeds, steps = range(6), [5, 0, 2**62, 7, 1, 3]
    together = tokens(implementation, logits, SAMPLINGS, seeds, steps, seen)
    for b, own in enumerate(SAMPLINGS):
        row = slice(b, b + 1)
        alone = tokens(implementation, logits[row], own, seeds[row], steps[b], seen[row])
        assert alone == together[row]
    for wrong in ((SAMPLINGS[:5], steps), (SAMPLINGS, steps[:5])):
        with pytest.raises(ValueError, match="do not match 6 seeds"):
            sample(logits, wrong[0], seeds, wrong[1], seen)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_probabilities(temperature: float) -> None:
    """Pearson's chi-squared: with 19 degrees of freedom, 43.8 is exceeded once in a thousand."""
    logits = torch.randn(20, generator=torch.Generator().manual_seed(1))
    expected = 20_000 * (logits / temperature).softmax(0)
    counts = drawn(logits, Sampling(temperature))
    assert float(((counts - expected) ** 2 / expected).sum()) < 43.8


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99])
def test_the_nucleus_has_its_mass_and_no_token_too_many(top_p: float) -> None:
    logits = 2 * torch.randn(30, generator=torch.Generator().manual_seed(2))
    probabilities = logits.double().softmax(0)
    nucleus = drawn(logits, Sampling(top_p=top_p)) > 0
    assert probabilities[nucleus].min() > probabilities[~nucleus].max()
    assert probabilities[nucleus].sum() - probabilities[nucleus].min() < top_p
    # An unlikely token of the nucleus may never have been drawn.
    assert probabilities[nucleus].sum() >= top_p - 1e-3


def test_min_p_and_top_k_keep_the_right_tokens() -> None:
    logits = torch.tensor([0.5, 0.24, 0.051, 0.049, 0.16]).log()
    assert (drawn(logits, Sampling(min_p=0.1)) > 0).tolist() == [True, True, True, False, True]
    assert (drawn(logits, Sampling(top_k=2)) > 0).tolist() == [True, True, False, False, False]
    equal = torch.zeros(5)
    assert (drawn(equal, Sampling(top_k=3)) > 0).tolist() == [True, True, True, False, False]


def test_the_penalty_applies_to_seen_tokens() -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0], [-1.0, -1.1, -9.0]])
    seen = torch.tensor([[True, False, False], [True, False, False]])
    assert sample(logits, Sampling(0), [0, 0], 0).tolist() == [0, 0]
    assert sample(logits, Sampling(0, repetition_penalty=1.2), [0, 0], 0, seen).tolist() == [1, 1]
    assert torch.equal(logits[0], torch.tensor([2.0, 1.9, -1.0]))  # unchanged


def test_a_draw_is_a_function_of_seed_and_step(threads: None) -> None:
    logits = torch.randn(8, 2000, generator=torch.Generator().manual_seed(3))
    together = sample(logits, Sampling(), range(8), 5).tolist()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert sample(logits, Sampling(), range(8), 5).tolist() == together
    alone = [sample(logits[b : b + 1], Sampling(), [b], 5).item() for b in range(8)]
    assert alone == together
    assert sample(logits, Sampling(), range(8), 6).tolist() != together
    assert sample(logits, Sampling(), range(1, 9), 5).tolist() != together


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(-1), "temperature must be a number from 0 on, got -1"),
        (Sampling(math.nan), "temperature must be"),
        (Sampling(top_k=-1), "top_k must be an integer from 0 on, got -1"),
        (Sampling(top_k=1.5), "top_k must be an integer from 0 on, got 1.5"),  # type: ignore[arg-type]
        (Sampling(top_p=0), r"top_p must be in \(0, 1\], got 0"),
        (Sampling(min_p=1.1), r"min_p must be in \[0, 1\], got 1.1"),
        (Sampling(repetition_penalty=0), "repetition_penalty must be above 0, in fp32, got 0"),
        (Sampling(repetition_penalty=1e-46), "repetition_penalty must be above 0, in fp32"),
        (Sampling(repetition_penalty=1e39), "repetition_penalty must be above 0, in fp32"),
    ],
    ids=str,
)
def test_settings_out_of_range(sampling: Sampling, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(torch.zeros(1, 3), sampling, [0], 0)


@pytest.mark.parametrize("implementation", ["auto", "ref"])
@pytest.mark.parametrize(
    "row", [[math.nan, 1.0], [1.0, math.nan], [-math.inf, -math.inf], [math.inf, 1.0]], ids=str
)
def test_logits_that_give_no_probabilities(implementation: str, row: Sequence[float]) -> None:
    with (
        fastllm.use(implementation),
        pytest.raises(ValueError, match="nothing can be drawn. The model's weights may be damaged"),
    ):
        sample(torch.tensor([[0.0, 1.0], row]), Sampling(), [0, 0], 0)


def test_mismatched_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="a repetition_penalty other than 1 needs `seen`"):
        sample(torch.zeros(1, 3), Sampling(repetition_penalty=1.1), [0], 0)
    with pytest.raises(ValueError, match=r"logits \[2, 3\] and 1 seeds do not match"):
        sample(torch.zeros(2, 3), Sampling(), [0], 0)
    for seen, got in (
        (torch.ones(3, dtype=torch.bool), r"torch.bool \[3\] on cpu"),
        (torch.ones(1, 3), r"torch.float32 \[1, 3\] on cpu"),
        (torch.ones(1, 3, dtype=torch.bool, device="meta"), r"torch.bool \[1, 3\] on meta"),
    ):
        with pytest.raises(ValueError, match=rf"seen must be bool \[1, 3\] on cpu, got {got}"):
            sample(torch.zeros(1, 3), Sampling(), [0], 0, seen)
    for seed in (-1, 2**64, 1.0):
        with pytest.raises(ValueError, match=r"seeds must be integers in \[0, 2\*\*64\), got"):
            sample(torch.zeros(1, 3), Sampling(), [seed], 0)  # type: ignore[list-item]
    for step in (-1, 2**63, 0.5):
        with pytest.raises(ValueError, match=r"step must be an integer in \[0, 2\*\*63\), got"):
            sample(torch.zeros(1, 3), Sampling(), [0], step)  # type: ignore[arg-type]


@needs_extension
def test_reasons() -> None:
    columns = torch.zeros(3, 2).t()
    for logits, seen, reason in (
        (columns, None, "the logits are not contiguous"),
        (torch.zeros(2, 3), columns.bool(), "`seen` is not contiguous"),
        (torch.zeros(2, 3).double(), None, "a tensor is torch.float64"),
    ):
        arguments = (logits, Sampling(repetition_penalty=1.1), [0, 1], 0, seen)
        assert str(sampling.why_not_cpu(*arguments)).startswith(reason)
        if seen is not None:
            assert tokens("auto", *arguments) == tokens("ref", *arguments)
