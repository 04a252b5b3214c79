"""From token ids to hidden states."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.core.positional_encoding import PositionalEncoding
from fastllm.ops import dispatch


class EmbeddingLayer(nn.Module):
    """Token embeddings times sqrt(H), plus positions.

    Args:
        vocab_size: V.
        hidden_size: H.
        max_seq_len: the longest sequence, in tokens.
        pos_encoding_learned: learned positions instead of sinusoidal ones.
        dropout_p: probability of dropping an element of the sum.
        padding_idx: the token whose embedding is zero and stays so.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        max_seq_len: int = 512,
        pos_encoding_learned: bool = False,
        dropout_p: float = 0.1,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.token_embeddings = nn.Embedding(
            vocab_size, hidden_size, padding_idx=padding_idx, device=device, dtype=dtype
        )
        self.padding_idx = self.token_embeddings.padding_idx
        # PyTorch's own N(0, 1), times sqrt(H), would drown the positions and costs 0.4 of
        # validation loss on a character model.
        nn.init.normal_(self.token_embeddings.weight, std=0.02)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.token_embeddings.weight[self.padding_idx].zero_()
        self.positional_encoding = PositionalEncoding(
            hidden_size,
            max_seq_len,
            dropout_p,
            learned=pos_encoding_learned,
            device=device,
            dtype=dtype,
        )

    def forward(self, input_ids: Tensor, offset: int = 0) -> Tensor:
        """Hidden states [B, S, H] of `input_ids` [B, S].

        Args:
            input_ids: integers in [0, V).
            offset: how many positions came before, when they are in a cache.

        Raises:
            IndexError: an id is outside the vocabulary.
            ValueError: the sequence is too long.
        """
        if isinstance(
            self.token_embeddings, nn.Embedding
        ):  # what stands in its place may know more
            check_token_ids(input_ids, self.token_embeddings.num_embeddings)
        x = self.token_embeddings(input_ids) * math.sqrt(self.hidden_size)
        if offset == 0:
            return self.positional_encoding(x)
        return self.positional_encoding(x, offset)


def check_token_ids(ids: Tensor, vocab_size: int) -> None:
    """Raises an `IndexError` that names an id outside [0, vocab_size), where values can be seen."""
    if ids.numel() == 0 or ids.is_meta or dispatch.inside_torch_func():
        return
    lowest, highest = torch.aminmax(ids)
    if lowest < 0 or highest >= vocab_size:
        wrong = int(lowest if lowest < 0 else highest)
        raise IndexError(f"Token id {wrong} is outside the vocabulary of {vocab_size} tokens")
