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

# Longer windows come in smaller batches, so that a batch's activations fit into memory.
TOKENS_AT_A_TIME = 2**15
NOTHING_TO_PREDICT = "the text has no token to predict: it needs two tokens at least"


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
        raise ValueError(NOTHING_TO_PREDICT)
    return Evaluation(total / count, int(count))


@torch.no_grad()
def evaluate_windows(model: DecoderModel, dataset: TextDataset, batch_size: int) -> Evaluation:
    """Mean loss over the tokens of `dataset`, each predicted once but for the first.

    The sequences of the dataset are windows on its text. All but the first predict only the tokens
    after their overlap with the one before, so that each has at least this many before it.

    Args:
        dataset: with an overlap of at least 1.
        batch_size: sequences in a forward; fewer if these are longer than `TOKENS_AT_A_TIME`.

    Raises:
        ValueError: there is no token to predict.
    """
    device = next(model.parameters()).device
    model.eval()
    window, overlap = dataset.max_seq_len, dataset.overlap
    rows = max(1, min(batch_size, TOKENS_AT_A_TIME // window))
    total, count = 0.0, 0
    for first in range(0, len(dataset), rows):
        indices = range(first, min(first + rows, len(dataset)))
        ids = collate(dataset.__getitems__(indices))["input_ids"]
        index, place = torch.tensor(indices)[:, None], torch.arange(window)
        is_new = (index == 0) | (place >= overlap)
        is_text = index * (window - overlap) + place < len(dataset.tokens)
        labels = ids.masked_fill(~(is_new & is_text), -100).to(device)
        predicted = int((model.targets(labels) != -100).sum())
        if predicted:
            total += float(model.loss(ids.to(device), labels)) * predicted
            count += predicted
    if not count:
        raise ValueError(NOTHING_TO_PREDICT)
    return Evaluation(total / count, count)


class Bits(NamedTuple):
    """A loss in bits per character and per byte in UTF-8 of the text."""

    per_character: float
    per_byte: float


def bits_of_text(nats: float, dataset: TextDataset) -> Bits | None:
    """Converts a loss in nats per token of the dataset; None for lossy tokenizers."""
    tokenizer = cast(Tokenizer, dataset.tokenizer)
    if not tokenizer.is_lossless:
        return None
    pieces = np.array_split(dataset.tokens, len(dataset.tokens) // 1_000_000 + 1)
    characters = bytes = 0
    for piece in pieces:
        text = tokenizer.decode(piece.tolist())
        characters += len(text)
        bytes += len(text.encode("utf-8", "surrogatepass"))
    bits = nats / math.log(2) * len(dataset.tokens)
    return Bits(bits / characters, bits / bytes)
