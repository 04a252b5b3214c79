"""Export a trained model: `fastllm export --checkpoint DIR --format gguf`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import field_validator, model_validator

from fastllm.command import command, errors_in_one_line, log, parse_settings
from fastllm.files import writing_aside
from fastllm.flags import CommandSettings, Format, Quantization

if TYPE_CHECKING:
    from fastllm.training.trained_model import TrainedModel

CARD = "README.md"


class ExportConfig(CommandSettings):
    """Write a trained model for transformers, ONNX or llama.cpp, with a model card."""

    examples: ClassVar = """
fastllm export --checkpoint runs/book --format gguf
fastllm export --checkpoint runs/book --format hf --out book-model
"""

    checkpoint: Path
    """A run of train or finetune, or a checkpoint in it; a folder in Hugging Face's format, a name
    on its hub, or a GGUF file."""
    format: Format
    """hf for transformers, onnx for onnxruntime and others, gguf for llama.cpp."""
    out: Path | None = None
    """Folder to write, or a file NAME.onnx or NAME.gguf. Default: a folder in the run's folder,
    named after the format."""
    quantize: Quantization | None = None
    """gguf: the type of the numbers in matrices, fp32 unless given. Embeddings and head have 8 bits
    at least; rows that are no multiples of 32 numbers become f16."""
    license: str = "unknown"
    """The model's licence for its card, as Hugging Face spells it: mit, cc-by-4.0, other."""

    @field_validator("license")
    @classmethod
    def _check_license(cls, license: str) -> str:
        if not license or not set(license) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-"):
            raise ValueError("must be spelt as Hugging Face does: mit, cc-by-4.0, other")
        return license

    @model_validator(mode="after")
    def _check_quantize(self) -> "ExportConfig":
        if self.quantize and self.format != "gguf":
            raise ValueError("--quantize needs --format gguf")
        return self


@command
def main(arguments: list[str]) -> None:
    config = parse_settings(ExportConfig, arguments)
    # After the flags: help and their errors need not wait for PyTorch.
    from fastllm.integrations.any_model import load_trained_model
    from fastllm.integrations.formats import ExportError, check_packages
    from fastllm.training.checkpoint import CheckpointError

    with errors_in_one_line(CheckpointError, ExportError, OSError, ValueError, ImportError):
        check_packages(config.format)
        trained = load_trained_model(config.checkpoint)
        check_not_exported(config, trained)
        folder, files = choose_files(config, trained.run_dir)
        difference = export(config, trained, folder, files)
    for file in files.values():
        log(f"{file.stat().st_size:14,} bytes  {file}")
    log(f"largest difference of a logit, on random tokens: {difference:.1e}")


def export(
    config: ExportConfig, trained: "TrainedModel", folder: Path, files: dict[str, Path]
) -> float:
    """Writes all files, or none of them; returns the largest difference of a logit."""
    from fastllm.integrations.formats import check_expressible, write_model
    from fastllm.integrations.model_card import model_card

    model, tokenizer = trained.model.eval(), trained.tokenizer
    check_expressible(model, tokenizer, config.format)
    with writing_aside(folder) as aside:
        difference = write_model(
            model, tokenizer, config.format, aside, trained.name, config.quantize
        )
        model_file = files.get(f"model.{config.format}", trained.run_dir).name
        text = model_card(config.format, config.license, model_file, trained, difference)
        (aside / CARD).write_text(text, encoding="utf-8")
        for written, file in files.items():
            (aside / written).rename(aside / file.name)
    return difference


def check_not_exported(config: ExportConfig, trained: "TrainedModel") -> None:
    """Raises a `ValueError` if the model has the wanted format already."""
    from fastllm.tokenization.pretrained import read_json_object

    if config.format != "hf" or trained.weights.suffix != ".safetensors":
        return
    if "model_type" in read_json_object(trained.folder / "config.json"):
        raise ValueError(
            f"{trained.folder} is already in the format of Hugging Face's transformers; copy it as "
            "it is"
        )


def choose_files(config: ExportConfig, run_dir: Path) -> tuple[Path, dict[str, Path]]:
    """The folder to write to, and the final path of each file.

    Raises:
        ValueError: a file exists already, or `--out` names a file of another format.
    """
    from fastllm.integrations.formats import FILES

    if config.out is None and not config.checkpoint.exists():
        raise ValueError("give an --out for a model of the hub")
    folder = config.out or run_dir / config.format
    names = {name: name for name in [*FILES[config.format], CARD]}
    if folder.suffix in (".onnx", ".gguf"):
        if folder.suffix != f".{config.format}":
            raise ValueError(f"--format {config.format} does not write {folder.suffix}: {folder}")
        names[f"model.{config.format}"] = folder.name
        names[CARD] = f"{folder.stem}.md"
        folder = folder.parent
    files = {written: folder / name for written, name in names.items()}
    for file in files.values():
        if file.exists():
            raise ValueError(f"{file} exists already; give another --out, or remove it")
    return folder, files


if __name__ == "__main__":
    main(sys.argv[1:])
