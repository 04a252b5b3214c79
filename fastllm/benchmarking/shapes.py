"""The shapes that are measured: configurations A to E."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Letter = Literal["A", "B", "C", "D", "E"]
MeasuredPrecision = Literal["fp32", "bf16"]
# Stock PyTorch, written in several ways.
Rival = Literal["eager", "tuned", "chunked", "autocast", "compile"]


class StepShape(NamedTuple):
    """The shape of a training step."""

    H: int  # hidden size
    L: int  # layers
    N: int  # heads
    S: int  # sequence length
    B: int  # sequences in a batch
    V: int  # vocabulary
    dropout: float

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix products in one step.

        Attention counts in full, though causality needs only half of it; the backward counts as
        two forwards.
        """
        H, L, _, S, B, V, _ = self
        return 3 * (L * (2 * B * S * 12 * H * H + 4 * B * S * S * H) + 2 * B * S * H * V)

    def random_ids(self) -> Tensor:
        """A batch of uniformly random token ids [B, S]."""
        import torch

        return torch.randint(self.V, (self.B, self.S))


CONFIGS: dict[Letter, StepShape] = {
    "A": StepShape(64, 2, 2, 32, 16, 66, 0.1),  # the defaults of train's flags
    "B": StepShape(128, 3, 4, 64, 32, 66, 0.1),  # a character model for a megabyte of text
    "C": StepShape(128, 4, 4, 64, 12, 66, 0.0),  # nanoGPT's recipe for a CPU
    "D": StepShape(384, 6, 6, 256, 8, 66, 0.1),  # nanoGPT's "baby GPT"
    "E": StepShape(768, 6, 12, 256, 2, 50257, 0.1),  # DistilGPT-2
}
