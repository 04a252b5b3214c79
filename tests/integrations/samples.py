"""Texts and comparisons for the tests of exported models and tokenizers."""

import torch
from torch import Tensor

from fastllm import DecoderModel

# Characters of one to four bytes, some with equal first or last bytes; a combining mark.
CHARACTERS = "abc <PAD>.,!'\n\t\r0129\x00\x7féèéÄßæ—“”…世界丁一😀😁"
TEXT = "He said: “Über 12 cafés — don't!”\n\n\tThe  世界, 😀 and so on... <PAD> ends.\n" * 40


def random_ids(model: DecoderModel, *shape: int) -> Tensor:
    return torch.randint(model.vocab_size, shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: DecoderModel, ids: Tensor) -> Tensor:
    return model(ids)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert (actual - expected).abs().max().item() <= tolerance * max(1, expected.abs().max().item())
