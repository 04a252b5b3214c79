"""Rotary positions as a module."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastllm.core.fusible import FORWARDS
from fastllm.ops.decoder import Rope
from fastllm.ops.rope import rotate


class RotaryEncoding(nn.Module):
    """Rotates pairs of a head's elements by angles in proportion to the position.

    The table is fp32 whatever the model's type, and not part of the state dict. Attentions with
    equal settings share one module.

    Args:
        angles: of each of the R / 2 pairs, in radians per position.
        max_seq_len: the longest sequence, in tokens.
        factor: of the rotated elements.
        interleaved: pairs are elements 2 i and 2 i + 1 rather than i and i + R / 2.
    """

    table: Tensor

    def __init__(
        self,
        angles: Sequence[float],
        max_seq_len: int,
        factor: float = 1.0,
        interleaved: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.angles = tuple(angles)
        self.max_seq_len = max_seq_len
        self.factor = factor
        self.interleaved = interleaved
        self.register_buffer("table", self._make_table(device), persistent=False)

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        """Rotates x [B, N, S, D], whose first position is `offset`."""
        return rotate(x, Rope(self.table[offset : offset + x.size(2)], self.interleaved))

    def record(self) -> Rope:
        """Table and setting for the operations."""
        return Rope(self.table, self.interleaved)

    def _make_table(self, device: torch.device | str | None) -> Tensor:
        device = torch.get_default_device() if device is None else torch.device(device)
        if device.type == "meta":
            return torch.empty(self.max_seq_len, 2 * len(self.angles), device=device)
        # A position of 10^5 times an angle in fp32 would be wrong by hundredths of a radian.
        positions = torch.arange(self.max_seq_len, dtype=torch.float64, device="cpu")
        angles = torch.tensor(self.angles, dtype=torch.float64, device="cpu")
        products = torch.outer(positions, angles)
        table = torch.cat((products.cos(), products.sin()), -1) * self.factor
        return table.to(device, torch.float32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryEncoding":
        # Only a change of the device applies to the table, not one of the type, nor `to_empty`.
        device = fn(self.table[:0]).device
        if device != self.table.device:
            self.table = self._make_table(device) if self.table.is_meta else self.table.to(device)
        return self


FORWARDS[RotaryEncoding] = RotaryEncoding.forward
