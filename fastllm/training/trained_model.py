"""A trained model with all that its files say about it."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from fastllm.models.decoder import DecoderModel
from fastllm.tokenization import Tokenizer
from fastllm.training.checkpoint import Progress
from fastllm.training.config import TrainConfig


class TrainedModel(NamedTuple):
    """A model, whatever wrote it.

    Attributes:
        name: of its run, its folder or its file.
        model: on the CPU, in training mode.
        folder: a checkpoint of `train`, a folder in Hugging Face's format, or that of a file.
        run_dir: of the run that trained it, if there is one; else `folder`.
        weights: the file that holds the weights, or the first of several.
        settings: of the run of `train`.
        progress: how far that run was.
        sampling: fields of a `Sampling` that its files set.
    """

    name: str
    model: DecoderModel
    tokenizer: Tokenizer
    folder: Path
    run_dir: Path
    weights: Path
    settings: TrainConfig | None = None
    progress: Progress | None = None
    sampling: Mapping[str, float] = {}
