"""The model that a server serves, and its description."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from fastllm.device import Device, Precision
from fastllm.generation.decoding import prepare_for_decoding
from fastllm.models.decoder import DecoderModel
from fastllm.serving.examples import example_prompts
from fastllm.tokenization import SimpleCharacterTokenizer, Tokenizer
from fastllm.training.trained_model import TrainedModel


class ServedModel(NamedTuple):
    """The description of a model. The weights are not part of it: packed, they live elsewhere.

    Attributes:
        name: how requests refer to it.
        settings: those of its run, or the model's own if it was saved by `save_model`.
        precision: what it decodes in.
        parameters: the number of weights.
        max_seq_len: tokens of a sequence that it sees.
        run_dir: the folder that may hold its metrics.jsonl.
        progress: its checkpoint's record of the training: step, tokens, losses.
        created: when its weights were written, in seconds since the epoch.
        examples: prompts to start from.
        sampling: fields of a `Sampling` for requests that leave them out.
    """

    name: str
    tokenizer: Tokenizer
    settings: dict[str, Any]
    precision: str
    parameters: int
    max_seq_len: int
    run_dir: Path
    progress: dict[str, Any]
    created: int
    examples: Sequence[str] = ()
    sampling: Mapping[str, float] = {}

    @property
    def step(self) -> int | None:
        """The training step of the weights; None if it is unknown."""
        return self.progress.get("step")

    @property
    def fingerprint(self) -> str | None:
        """Another one means that the same request may get another answer."""
        return None if self.step is None else f"step-{self.step}"

    @property
    def characters(self) -> str | None:
        """All characters that a prompt may consist of; None for every one."""
        if isinstance(self.tokenizer, SimpleCharacterTokenizer):
            return "".join(self.tokenizer.chars[:-1])
        return None


def prepare_served_model(
    trained: TrainedModel,
    device: Device,
    precision: Precision,
    quantize: str | None,
    longest: int | None = None,
) -> tuple[ServedModel, DecoderModel]:
    """A model ready for decoding, and its description.

    Args:
        longest: tokens of a sequence that it is to see, if that is fewer than it can.
    """
    model = trained.model
    decoding_precision = prepare_for_decoding(model, device, precision, quantize)
    settings = trained.settings
    served = ServedModel(
        trained.name,
        trained.tokenizer,
        model.settings if settings is None else settings.model_dump(mode="json"),
        decoding_precision,
        sum(parameter.numel() for parameter in model.parameters()),
        min(model.max_seq_len, longest or model.max_seq_len),
        trained.run_dir,
        {} if trained.progress is None else asdict(trained.progress),
        int(trained.weights.stat().st_mtime),
        example_prompts(trained.run_dir, trained.tokenizer),
        trained.sampling,
    )
    return served, model
