"""The next token of each sequence, drawn from its logits."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastllm.ops import dispatch, extension
from fastllm.ops.dropout import philox
from fastllm.ops.memory import address


class Sampling(NamedTuple):
    """How a token is chosen; the steps follow the order of Hugging Face's `generate`.

    Attributes:
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: choose among this many likeliest tokens (Fan et al. 2018); 0 for all.
        top_p: choose among the fewest likeliest tokens that together have this probability
            (Holtzman et al. 2020).
        min_p: choose among tokens with at least this fraction of the likeliest one's probability
            (Nguyen et al. 2024).
        repetition_penalty: divides the positive and multiplies the negative logits of tokens that
            occurred before, as the first step (Keskar et al. 2019).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def check(self) -> None:
        """Raises a `ValueError` that names a setting out of range."""
        for name, good, wanted in (
            ("temperature", 0 <= self.temperature < math.inf, "a number from 0 on"),
            ("top_k", _is_integer(self.top_k, 63), "an integer from 0 on"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", 1e-37 < self.repetition_penalty < 1e38, "above 0, in fp32"),
        ):
            if not good:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)}")


def _is_integer(number: object, bits: int) -> bool:
    return isinstance(number, int) and 0 <= number < 2**bits


def sample_ref(
    logits: Tensor,
    samplings: Sequence[Sampling],
    seeds: Sequence[int],
    steps: Sequence[int],
    seen: Tensor | None,
) -> Tensor:
    rows = zip(logits.split(1), samplings, seeds, steps, strict=True)
    return torch.cat(
        [_sample_row(*row, None if seen is None else seen[b]) for b, row in enumerate(rows)]
    )


def _sample_row(
    logits: Tensor, sampling: Sampling, seed: int, step: int, seen: Tensor | None
) -> Tensor:
    if seen is not None:
        penalty = sampling.repetition_penalty
        logits = torch.where(
            seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits
        )
    top = logits.amax(-1, keepdim=True)
    if not top.isfinite().all():
        raise ValueError(NO_PROBABILITIES)
    # A stable sort keeps equal logits in the order of their ids.
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    if sampling.temperature == 0:
        return ids[:, 0]
    weights = ((ordered - top).double() / sampling.temperature).exp()
    if sampling.top_k:
        weights[:, sampling.top_k :] = 0
    # A token is kept if those before it fall short of top_p, so the likeliest always is.
    before = weights.cumsum(-1) - weights
    weights[before >= sampling.top_p * weights.sum(-1, keepdim=True)] = 0
    weights[weights < sampling.min_p] = 0
    below = torch.zeros_like(weights).scatter(-1, ids, weights).cumsum(-1)
    return (below <= _uniform(seed, step) * below[:, -1:]).sum(-1)


NO_PROBABILITIES = (
    "the logits of a sequence are not numbers, or all of them are -inf: nothing can be drawn. The "
    "model's weights may be damaged, or its training diverged"
)


def _uniform(seed: int, step: int) -> float:
    """A number in [0, 1) with 53 random bits."""
    x0, x1, _, _ = (int(word) for word in philox(torch.tensor(step), seed, 0))
    return float((x0 >> 5) * 2**26 + (x1 >> 6)) / 2**53


def sample_cpu(
    logits: Tensor,
    samplings: Sequence[Sampling],
    seeds: Sequence[int],
    steps: Sequence[int],
    seen: Tensor | None,
) -> Tensor:
    B, V = logits.shape
    tokens = torch.empty(B, dtype=torch.long, device="cpu")
    sampled = extension.kernels.sample(
        tokens=tokens.data_ptr(),
        logits=logits.data_ptr(),
        B=B,
        V=V,
        samplings=[extension.kernels.Sampling(**each._asdict()) for each in samplings],
        seen=address(seen),
        seeds=seeds,
        steps=steps,
        threads=torch.get_num_threads(),
    )
    if not sampled:
        raise ValueError(NO_PROBABILITIES)
    return tokens


def why_not_cpu(
    logits: Tensor,
    samplings: Sequence[Sampling],
    seeds: Sequence[int],
    steps: Sequence[int],
    seen: Tensor | None,
) -> str | None:
    if not logits.is_contiguous():
        return "the logits are not contiguous"
    if seen is not None and not seen.is_contiguous():
        return "`seen` is not contiguous"
    return dispatch.why_not_cpu(logits)


IMPLEMENTATIONS = [dispatch.cpu(sample_cpu, why_not_cpu), dispatch.reference(sample_ref)]


def sample(
    logits: Tensor,
    sampling: Sampling | Sequence[Sampling],
    seeds: Sequence[int],
    step: int | Sequence[int],
    seen: Tensor | None = None,
) -> Tensor:
    """A token for each row of logits.

    Args:
        logits: [B, V]; -inf for a token that must not be drawn.
        sampling: see `Sampling`; one for all sequences, or one per sequence.
        seeds: one for each sequence, in [0, 2**64): the same seed and step give the same draw,
            whatever else is in the batch.
        step: the number of the draw, in [0, 2**63); one for all sequences, or one per sequence.
        seen: bool [B, V], which tokens occurred before; needed for a repetition penalty.

    Returns:
        [B], int64. Of equally likely tokens, the lower id counts as the likelier one.

    Raises:
        ValueError: a setting, a seed or the step is out of range; shapes or devices do not match;
            or the logits of a sequence are NaN or all -inf.
    """
    samplings = [sampling] * len(seeds) if isinstance(sampling, Sampling) else sampling
    steps = step if isinstance(step, Sequence) else [step] * len(seeds)
    for each in set(samplings):
        each.check()
    if logits.ndim != 2 or len(seeds) != logits.size(0) or logits.size(1) == 0:
        raise ValueError(f"logits {list(logits.shape)} and {len(seeds)} seeds do not match: [B, V]")
    if not len(samplings) == len(seeds) == len(steps):
        raise ValueError(
            f"{len(samplings)} samplings and {len(steps)} steps do not match {len(seeds)} seeds"
        )
    if not all(_is_integer(seed, 64) for seed in seeds):
        raise ValueError(f"seeds must be integers in [0, 2**64), got {list(seeds)}")
    if not all(_is_integer(each, 63) for each in steps):
        raise ValueError(f"step must be an integer in [0, 2**63), got {step}")
    if seen is not None and (
        seen.shape != logits.shape or seen.dtype is not torch.bool or seen.device != logits.device
    ):
        raise ValueError(
            f"seen must be bool {list(logits.shape)} on {logits.device}, "
            f"got {seen.dtype} {list(seen.shape)} on {seen.device}"
        )
    if all(each.repetition_penalty == 1 for each in samplings):
        seen = None
    elif seen is None:
        raise ValueError("a repetition_penalty other than 1 needs `seen`, the earlier tokens")
    arguments = (logits, samplings, seeds, steps, seen)
    return dispatch.choose("sampling", IMPLEMENTATIONS, *arguments).run(*arguments)
