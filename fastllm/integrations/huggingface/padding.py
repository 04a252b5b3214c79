"""Leaving the padding of a batch out of the layers, if nobody reads their output there."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import sdpa_mask


class Unpadded(NamedTuple):
    """The positions of a padded batch that are not padding.

    It travels as an attribute, `unpadded`, of the mask that all layers share.

    Attributes:
        rows: indices of these positions among all B S.
        starts: where each sequence begins among these rows, and where the last one ends.
        is_causal: whether the mask hides later positions as well.
        window: the number of keys, its own included, that a query sees at most; None for all.
    """

    rows: Tensor
    starts: tuple[int, ...]
    is_causal: bool
    window: int | None


def unpad(mask: Tensor, window: int | None) -> Unpadded | None:
    """The unpadded positions of a mask [B, 1, S, T], True where a query sees a key.

    None if the mask hides more than padding and, perhaps, later positions and those before a
    window, or if there is padding within a sequence, which counts in a window.
    """
    B, _, S, T = mask.shape
    seen = mask[:, 0].any(1)
    if window is not None and has_gaps(seen):
        return None
    for is_causal in (False, True):
        padding_only = seen[:, None].expand(B, S, T)
        if is_causal:
            padding_only = padding_only.tril()
            if window is not None:
                padding_only = padding_only.triu(1 - window)
        if S == T and torch.equal(mask[:, 0], padding_only):
            starts = tuple(accumulate(seen.sum(1).tolist(), initial=0))
            return Unpadded(
                seen.flatten().nonzero().flatten(), starts, is_causal, window if is_causal else None
            )
    return None


def has_gaps(seen: Tensor) -> bool:
    """Whether positions that are False in [B, S] stand between others of their sequence."""
    begins = seen[:, 1:] & ~seen[:, :-1]
    return bool((seen[:, 0].long() + begins.sum(1) > 1).any())


_padding_is_skipped: ContextVar[bool] = ContextVar("padding_is_skipped", default=False)


@contextmanager
def skip_padding(enabled: bool) -> Iterator[None]:
    """Inside, fused layers compute nothing for padding if `enabled`, and output zeros there."""
    token = _padding_is_skipped.set(enabled)
    try:
        yield
    finally:
        _padding_is_skipped.reset(token)


def attention_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """For transformers' `AttentionMaskInterface`: its "sdpa" mask, with `unpadded` if wanted."""
    mask = sdpa_mask(*args, **kwargs)
    if mask is not None and _padding_is_skipped.get():
        mask.unpadded = unpad(mask, kwargs.get("local_size"))  # type: ignore[attr-defined]
    return mask
