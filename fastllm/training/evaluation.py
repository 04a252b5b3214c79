"""How well a model predicts a text."""

import math
from collections.abc import Callable
from typing import NamedTuple, cast

import numpy as np
import torch
from torch.utils.data import DataLoader

from fastllm.data.loader import TextDataset, collate
from fastllm.models.decoder import DecoderModel
from fastllm.tokenization import Tokenizer
from fastllm.training.distributed import SINGLE
from fastllm.training.engine import Engine, dummy_sequence


class Evaluation(NamedTuple):
    """Loss over a text: `loss` in nats per token, over `tokens` predictions."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss), or infinity if that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def evaluate(
    model: DecoderModel,
    dataset: TextDataset,
    batch_size: int,
    engine: Engine | None = None,
    before_batch: Callable[[], object] = lambda: None,
) -> Evaluation:
    """Mean loss over every sequence of `dataset`; every predicted token has the same weight.

    Args:
        batch_size: sequences in a forward.
        engine: of the model's training. All of its ranks call this together, each takes a shard of
            the sequences, and all get the same result.
        before_batch: called before each batch.

    Raises:
        ValueError: there is no token to predict.
    """
    loss = engine.loss if engine else lambda ids: model.loss(ids, ids)
    data_group, in_step = (engine.data_group, engine.in_step) if engine else (SINGLE, False)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    starts = range(0, len(dataset), batch_size)
    rows = (data_group.shard(range(len(dataset))[i : i + batch_size]) for i in starts)
    total, count = 0.0, 0.0
    for batch in DataLoader(dataset, batch_sampler=rows, collate_fn=collate):
        before_batch()
        ids = batch["input_ids"].to(device)
        predicted = int((model.targets(ids) != -100).sum())
        if predicted or in_step:
            total += float(loss(ids if predicted else dummy_sequence(ids, model))) * predicted
            count += predicted
    model.train(was_training)
    total, count = data_group.all_reduce(total, count)
    if not count:
        raise ValueError("the text has no token to predict: it needs two tokens at least")
    return Evaluation(total / count, int(count))


def bits_per_character(loss: float, dataset: TextDataset) -> float | None:
    """Converts a loss in nats per token into bits per character of the dataset's text.

    None for lossy tokenizers.
    """
    tokenizer = cast(Tokenizer, dataset.tokenizer)
    if not tokenizer.is_lossless:
        return None
    pieces = np.array_split(dataset.tokens, len(dataset.tokens) // 1_000_000 + 1)
    characters = sum(len(tokenizer.decode(piece.tolist())) for piece in pieces)
    return loss / math.log(2) * len(dataset.tokens) / characters
