"""An RMS norm that learns the difference of its weight from a constant."""

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
