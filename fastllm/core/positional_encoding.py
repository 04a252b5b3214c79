"""Absolute positions, added to the token embeddings."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.core.dropout import Dropout
from fastllm.core.fusible import FORWARDS


class PositionalEncoding(nn.Module):
    """Adds a vector for each position, then dropout.

    Sinusoidal as in Vaswani et al. 2017, section 3.5, held in the buffer `pe` [1, max_seq_len, H];
    or learned, in `pos_embedding`.

    Args:
        hidden_size: H.
        max_seq_len: the longest sequence, in tokens.
        dropout_p: probability of dropping an element of the sum.
        learned: learn the vectors instead of computing them.
        positions: add vectors; without them, only dropout and the limit of the length are left.
    """

    pe: Tensor

    def __init__(
        self,
        hidden_size: int,
        max_seq_len: int = 512,
        dropout_p: float = 0.1,
        learned: bool = False,
        device: Any = None,
        dtype: Any = None,
        positions: bool = True,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.max_seq_len = max_seq_len
        self.learned = learned and positions
        self.positions = positions
        self.dropout_p = dropout_p
        self.dropout = Dropout(dropout_p)
        if self.learned:
            self.pos_embedding = nn.Embedding(max_seq_len, hidden_size, device=device, dtype=dtype)
            nn.init.normal_(self.pos_embedding.weight, std=0.02)
        elif positions:
            steps = torch.arange(max_seq_len, dtype=torch.float64)[:, None]
            exponents = torch.arange(0, hidden_size, 2, dtype=torch.float64) / hidden_size
            angles = steps * torch.exp(-math.log(10000) * exponents)
            pe = torch.zeros(1, max_seq_len, hidden_size, dtype=torch.float64)
            pe[0, :, 0::2] = angles.sin()
            pe[0, :, 1::2] = angles.cos()[:, : hidden_size // 2]
            pe = pe.to(device=device, dtype=dtype or torch.get_default_dtype())
            self.register_buffer("pe", pe)

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        """Adds the positions `offset` to `offset + S - 1`.

        Args:
            x: [B, S, H].
            offset: the number of earlier positions, if they are in a cache.

        Raises:
            ValueError: the positions end beyond `max_seq_len`.
        """
        end = offset + x.size(1)
        self.check_length(end)
        if self.learned:
            x = x + self.pos_embedding(torch.arange(offset, end, device=x.device))
        elif self.positions:
            x = x + self.pe[0, offset:end]
        return self.dropout(x)

    def check_length(self, length: int) -> None:
        """Raises a `ValueError` if there are fewer positions than `length`."""
        if length > self.max_seq_len:
            raise ValueError(
                f"Sequence length {length} exceeds maximum sequence length {self.max_seq_len}"
            )


FORWARDS[PositionalEncoding] = PositionalEncoding.forward
