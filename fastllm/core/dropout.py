"""Dropout as a module, with reproducible masks."""

from torch import Tensor, nn

from fastllm.ops.dropout import draw_seed, dropout


class Dropout(nn.Dropout):
    """`nn.Dropout` whose mask is the same on every device and for any number of threads.

    Each forward draws one seed from PyTorch's default generator, so `torch.manual_seed` governs
    it and activation checkpointing repeats it. See `dropout`.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        return dropout(input, self.p, draw_seed())
