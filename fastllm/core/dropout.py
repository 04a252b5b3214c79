"""Dropout as a module, with reproducible masks."""

from torch import Tensor, nn

from fastllm.core.fusible import FORWARDS
from fastllm.ops.dropout import draw_seed, dropout


class Dropout(nn.Dropout):
    """`nn.Dropout` whose mask is the same on every device and for any number of threads.

    Each forward draws one seed from PyTorch's default generator, so `torch.manual_seed` governs
    it and activation checkpointing repeats it. See `dropout`.
    """

    def forward(self, input: Tensor) -> Tensor:
        p, seed = self.draw()
        return dropout(input, p, seed)

    def draw(self) -> tuple[float, int]:
        """The probability in effect, and a fresh seed unless that is 0."""
        p = self.active_p()
        return p, draw_seed() if p else 0

    def active_p(self) -> float:
        """The probability in effect: 0 in evaluation mode."""
        return self.p if self.training else 0.0


FORWARDS[Dropout] = Dropout.forward
