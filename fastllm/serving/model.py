"""The model that a server serves, and what is known about it."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from fastllm.device import Device, Precision
from fastllm.generation.decoding import prepare_for_decoding
from fastllm.models.decoder import DecoderModel
from fastllm.tokenization import Tokenizer
from fastllm.training.checkpoint import find_checkpoint, load_model, read_progress
from fastllm.training.config import TrainConfig


class ServedModel(NamedTuple):
    """A model with its description.

    Attributes:
        name: how requests refer to it.
        precision: what it decodes in.
        run_dir: the folder that may hold its metrics.jsonl.
        progress: its checkpoint's record of the training: step, tokens, losses.
        created: when its weights were written, in seconds since the epoch.
    """

    name: str
    model: DecoderModel
    tokenizer: Tokenizer
    config: TrainConfig
    precision: str
    run_dir: Path
    progress: dict[str, Any]
    created: int

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


def load_served_model(
    run: Path, device: Device, precision: Precision, quantize: str | None
) -> ServedModel:
    """Loads a run's latest checkpoint, or the given one.

    Raises:
        CheckpointError: there is no usable checkpoint.
    """
    checkpoint = find_checkpoint(run)
    model, tokenizer, config = load_model(checkpoint)
    decoding_precision = prepare_for_decoding(model, device, precision, quantize)
    progress = read_progress(checkpoint)
    run_dir = checkpoint.resolve()
    if run_dir.parent.name == "checkpoints":
        run_dir = run_dir.parent.parent
    return ServedModel(
        run_dir.name,
        model,
        tokenizer,
        config,
        decoding_precision,
        run_dir,
        {} if progress is None else asdict(progress),
        int((checkpoint / "model.safetensors").stat().st_mtime),
    )
