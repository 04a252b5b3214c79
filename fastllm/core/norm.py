"""RMS norms besides PyTorch's."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastllm.core.fusible import FORWARDS


class OffsetRMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` times `offset + weight`; the product starts at 1, as in Gemma.

    Args:
        hidden_size: H, of the last dimension.
        eps: added to the mean of the squares.
        offset: added to the weight.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        offset: float = 1.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        self.offset = offset
        super().__init__(hidden_size, eps=eps, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 1 - self.offset)

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes x [..., H]."""
        return F.rms_norm(x, self.normalized_shape, self.offset + self.weight, self.eps)


FORWARDS[OffsetRMSNorm] = OffsetRMSNorm.forward


class AllHeadsRMSNorm(nn.RMSNorm):
    """An RMS norm over all heads of a position together, with a weight of [N D] (OLMo 2)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes x [B, N, S, D]."""
        positions = super().forward(x.transpose(1, 2).flatten(2))
        return positions.unflatten(-1, x.shape[1::2]).transpose(1, 2)
