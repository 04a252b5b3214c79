"""From token ids to hidden states."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.core.fusible import FORWARDS, all_are, is_plain
from fastllm.core.positional_encoding import PositionalEncoding
from fastllm.ops import decoder as records
from fastllm.ops.dropout import fresh_seeds
from fastllm.ops.embedding import check_token_ids, embedding
from fastllm.ops.torch_private import submodules


class EmbeddingLayer(nn.Module):
    """Token embeddings times a scale, plus positions.

    Args:
        vocab_size: V.
        hidden_size: H.
        max_seq_len: the longest sequence, in tokens.
        pos_encoding_learned: learned positions instead of sinusoidal ones.
        dropout_p: probability of dropping an element of the sum.
        padding_idx: the token whose embedding is zero and stays zero.
        scale_embeddings: scale by sqrt(H) (Vaswani et al. 2017, section 3.4) rather than 1.
        scale: another factor.
        positions: add positions to the tokens.
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
        scale_embeddings: bool = True,
        scale: float | None = None,
        positions: bool = True,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        if scale is None:
            scale = math.sqrt(hidden_size) if scale_embeddings else 1.0
        self.scale = scale
        self.token_embeddings = nn.Embedding(
            vocab_size, hidden_size, padding_idx=padding_idx, device=device, dtype=dtype
        )
        self.padding_idx = self.token_embeddings.padding_idx
        # PyTorch's N(0, 1), times sqrt(H), would drown out the positions: it raises validation
        # loss by 0.4 on a character model.
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
            positions=positions,
        )

    def forward(self, input_ids: Tensor, offset: int = 0) -> Tensor:
        """Hidden states [B, S, H] of `input_ids` [B, S].

        Args:
            input_ids: integers in [0, V).
            offset: the number of earlier positions, if they are in a cache.

        Raises:
            IndexError: an id is outside the vocabulary.
            ValueError: the sequence is too long.
        """
        record = self.record(offset, input_ids.size(1))
        if record is not None:
            return embedding(input_ids, record.with_seeds(fresh_seeds()))
        if isinstance(self.token_embeddings, nn.Embedding):  # a replacement may have more tokens
            check_token_ids(input_ids, self.token_embeddings.num_embeddings)
        x = self.token_embeddings(input_ids) * self.scale
        if offset == 0:
            return self.positional_encoding(x)
        return self.positional_encoding(x, offset)

    def record(self, offset: int, length: int) -> records.Embedding | None:
        """Parameters and settings for the operation at positions `offset` to `offset + length`, the
        seed not drawn yet; None if the modules must run.

        Raises:
            ValueError: the positions end beyond `max_seq_len`.
        """
        tokens, encoding = submodules(self, "token_embeddings", "positional_encoding")
        if not all_are(nn.Embedding, tokens) or not all_are(PositionalEncoding, encoding):
            return None
        (dropout,) = submodules(encoding, "dropout")
        if not is_plain(tokens, encoding, dropout):
            return None
        if encoding.learned and not is_plain(encoding.pos_embedding):
            return None
        if tokens.max_norm is not None or tokens.scale_grad_by_freq or tokens.sparse:
            return None
        encoding.check_length(offset + length)
        table = self.position_table()
        return records.Embedding(
            tokens.weight,
            None if table is None else table[offset : offset + length],
            self.scale,
            tokens.padding_idx,
            records.Dropout(dropout.active_p()),
        )

    def position_table(self) -> Tensor | None:
        """A vector for each position, [max_seq_len, H], if positions are added."""
        (encoding,) = submodules(self, "positional_encoding")
        if not encoding.positions:
            return None
        return encoding.pos_embedding.weight if encoding.learned else encoding.pe[0]


FORWARDS[EmbeddingLayer] = EmbeddingLayer.forward
