"""The record of a run: metrics.jsonl, the curves in loss.png, and validation."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader

from fastllm.data.loader import TextDataset, collate
from fastllm.files import replace_file
from fastllm.models.decoder import DecoderModel
from fastllm.tokenization import Tokenizer
from fastllm.training.engine import Engine, something_to_predict
from fastllm.training.processes import ALONE

# Where `read_metrics` looks for a step: what is shorter is read through.
BISECTED_BYTES = 2**16


class Evaluation(NamedTuple):
    """Loss over a text: `loss` in nats per token, over `tokens` predictions."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def evaluate(
    model: DecoderModel, dataset: TextDataset, batch_size: int, engine: Engine | None = None
) -> Evaluation:
    """Mean loss over every chunk of `dataset`, each predicted token weighted alike.

    Args:
        batch_size: sequences that are computed at once.
        engine: of the model's training. Its processes call this together, share the work out, and
            get the same.

    Raises:
        ValueError: there is nothing to predict.
    """
    loss = engine.loss if engine else lambda ids: model.loss(ids, ids)
    readers, in_step = (engine.readers, engine.in_step) if engine else (ALONE, False)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    starts = range(0, len(dataset), batch_size)
    rows = (readers.share(range(len(dataset))[i : i + batch_size]) for i in starts)
    total, count = 0.0, 0.0
    for batch in DataLoader(dataset, batch_sampler=rows, collate_fn=collate):
        ids = batch["input_ids"].to(device)
        predicted = int((model.targets(ids) != -100).sum())
        if predicted or in_step:
            total += float(loss(ids if predicted else something_to_predict(ids, model))) * predicted
            count += predicted
    model.train(was_training)
    total, count = readers.sum(total, count)
    if not count:
        raise ValueError("the text has no token to predict: it needs two tokens at least")
    return Evaluation(total / count, int(count))


def bits_per_character(loss: float, dataset: TextDataset) -> float | None:
    """What a loss in nats per token is in bits per character of the dataset's text.

    None for a tokenizer that does not give its text back, so that nobody knows how long it was.
    """
    tokenizer = cast(Tokenizer, dataset.tokenizer)
    if not tokenizer.is_lossless:
        return None
    pieces = np.array_split(dataset.tokens, len(dataset.tokens) // 1_000_000 + 1)
    characters = sum(len(tokenizer.decode(piece.tolist())) for piece in pieces)
    return loss / math.log(2) * len(dataset.tokens) / characters


class MetricsLog:
    """metrics.jsonl: one JSON object a line, appended as the run goes.

    Args:
        path: the file.
        first_step: lines of this step and later ones are dropped: a resumed run writes them again.
    """

    def __init__(self, path: Path, first_step: int = 0) -> None:
        kept = [line for line in read_metrics(path) if line["step"] < first_step]
        with replace_file(path) as file:
            file.writelines(json.dumps(line).encode() + b"\n" for line in kept)
        # Without a buffer, so that nothing is left to be written when the run ends.
        self._file = path.open("ab", buffering=0)

    def write(self, **values: Any) -> None:
        try:
            self._file.write(json.dumps(values).encode() + b"\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from error

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path, after: int = -1) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl; none where there is no file. A line cut off ends them.

    Args:
        after: only those of later steps, which takes no longer for a long file.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        begin, end = 0, path.stat().st_size
        while after >= 0 and end - begin > BISECTED_BYTES:
            middle = (begin + end) // 2
            file.seek(middle)
            file.readline()
            line = _parsed(file.readline())
            if line is None or line["step"] > after:
                end = middle
            else:
                begin = middle
        file.seek(begin)
        if begin:
            file.readline()
        while line := _parsed(file.readline()):
            if line["step"] > after:
                yield line


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        values: dict[str, Any] = json.loads(line)
        values["step"] + 0
    except (ValueError, TypeError, KeyError):
        return None
    return values


def resident_mb() -> float:
    """Resident memory of this process, in MiB."""
    return float(psutil.Process().memory_info().rss / 2**20)


def plot_losses(metrics: Path, picture: Path) -> None:
    """Draws the training and validation loss of metrics.jsonl by step."""
    # Imported here: it takes half a second, and most commands draw nothing.
    from matplotlib.figure import Figure

    lines = list(read_metrics(metrics))
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for key, label in (("loss", "training"), ("val_loss", "validation")):
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        if points:
            marker = "o" if key == "val_loss" else ""
            axes.plot(*zip(*points, strict=True), label=label, marker=marker)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    if lines:
        axes.legend()
    figure.savefig(picture, dpi=120)
