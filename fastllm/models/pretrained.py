"""Models in Hugging Face's format: a folder with config.json and model.safetensors."""

import json
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastllm.files import replace_file
from fastllm.models.config import DecoderConfig
from fastllm.models.hub import download, may_be_on_hub
from fastllm.models.huggingface import Architecture, read_settings, write_settings
from fastllm.tokenization.base import read_json

if TYPE_CHECKING:
    from fastllm.models.decoder import DecoderModel  # which imports this module

# Causal masks and rotary tables that older versions of transformers saved among the weights, and
# what a language model that also sees has besides.
OTHERS = re.compile(
    r".*\.(attn|attention)\.(masked_)?bias|.*\.rotary_emb\.inv_freq"
    r"|.*\.(vision_tower|multi_modal_projector)\..*"
)


def load_pretrained(
    model_class: "type[DecoderModel]",
    source: str | os.PathLike[str],
    padding_idx: int | None = None,
    device: Any = None,
    dtype: Any = None,
) -> "DecoderModel":
    """See `DecoderModel.from_pretrained`."""
    folder = find_folder(source)
    architecture, config = read_config(folder / "config.json", padding_idx)
    with SafeTensors(folder, architecture) as tensors:
        return load_model(model_class, tensors, architecture, config, device, dtype)


def find_folder(source: str | os.PathLike[str]) -> Path:
    """The folder of a model, which is downloaded if it is on the hub; a run of `finetune` keeps its
    model in a folder of its own.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the hub does not provide it, or it is a run of `train`.
    """
    folder = Path(source)
    if not folder.exists() and may_be_on_hub(source):
        return download(str(source))
    if not (folder / "config.json").is_file():
        raise missing(folder / "config.json" if folder.is_dir() else folder)
    settings = read_json(folder / "config.json")
    if not isinstance(settings, dict) or "fastllm_version" not in settings:
        return folder
    if (folder / "model").is_dir():
        return folder / "model"
    raise ValueError(f"{folder} is a model of fastllm's own; load it with fastllm.load_model")


def missing(path: Path) -> FileNotFoundError:
    """The error for a path that is no folder, or a config.json that does not exist."""
    problem = "is not a folder" if path.exists() else "does not exist"
    return FileNotFoundError(
        f"{path} {problem}; give a folder with config.json and model.safetensors, "
        "such as `hf download distilbert/distilgpt2 --local-dir distilgpt2` creates, or with the "
        "package huggingface_hub a name on the hub"
    )


def read_config(path: Path, padding_idx: int | None) -> tuple[Architecture, DecoderConfig]:
    """The architecture and the configuration in a config.json.

    Raises:
        ValueError: it is damaged, or asks for what cannot be computed; the message names the key.
    """
    try:
        return read_settings(read_json(path), padding_idx)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


class Tensors(Protocol):
    """The tensors of a model by their names in Hugging Face's format."""

    def check(self, model: "DecoderModel", names: Mapping[str, list[str]]) -> None:
        """Raises a `ValueError` unless the tensors are exactly those of the model, which is on the
        meta device."""

    def read(self, name: str) -> Tensor:
        """The tensor of this name."""


def load_model(
    model_class: "type[DecoderModel]",
    tensors: Tensors,
    architecture: Architecture,
    config: DecoderConfig,
    device: Any,
    dtype: Any,
) -> "DecoderModel":
    """A model of the configuration with these tensors."""
    # Compare shapes before allocating: a config.json of other weights may ask for terabytes.
    model = model_class.from_config(config, device="meta", dtype=dtype)
    names = names_in(architecture, model)
    tensors.check(model, names)
    model.to_empty(device=torch.get_default_device() if device is None else device)
    state = model.state_dict()
    with torch.no_grad():
        for theirs, ours in names.items():
            parts = architecture.layout_of(theirs).to_ours(tensors.read(theirs), config)
            for name, part in zip(ours, parts, strict=True):
                state[name].copy_(part)
    return model


def names_in(architecture: Architecture, model: "DecoderModel") -> dict[str, list[str]]:
    """For each tensor of theirs, the model's tensors that it holds; a tied head is left out."""
    state = model.state_dict()
    if model.tie_word_embeddings:
        del state["lm_head.weight"]
    names: dict[str, list[str]] = {}
    for ours, theirs in architecture.tensors_of(model.config).items():
        if ours in state:
            names.setdefault(theirs, []).append(ours)
    return names


class SafeTensors:
    """The tensors in model.safetensors, or in its shards, each read when it is needed.

    Use as a context manager.
    """

    def __init__(self, folder: Path, architecture: Architecture) -> None:
        self.folder, self.architecture = folder, architecture
        self._open = ExitStack()
        self._files: dict[str, tuple[Any, str]] = {}  # the file and the name there, by `short`

    def __enter__(self) -> "SafeTensors":
        with self._open:
            for path in tensor_files(self.folder):
                try:
                    file = self._open.enter_context(safe_open(path, "pt"))
                except (OSError, SafetensorError, ValueError) as error:
                    problem = f"{path} cannot be read as safetensors: {error}"
                    raise ValueError(problem) from error
                for name in file.keys():  # noqa: SIM118
                    if not OTHERS.fullmatch(f".{name}"):
                        self._files[self.short(name)] = file, name
            self._open = self._open.pop_all()
        return self

    def __exit__(self, *_: Any) -> None:
        self._open.close()

    def short(self, name: str) -> str:
        """The name without the prefix, which files of a model without its head lack, and without
        that of the language model in one that also sees."""
        name = re.sub(r"^(model\.)?language_model\.", "", name)
        return name.removeprefix(self.architecture.prefix)

    def read(self, name: str) -> Tensor:
        """The tensor of this name, with or without its prefix."""
        file, name = self._files[self.short(name)]
        return file.get_tensor(name)

    def check(self, model: "DecoderModel", names: Mapping[str, list[str]]) -> None:
        """Raises a `ValueError` unless the tensors are exactly those of the model, which is on the
        meta device."""
        state, config = model.state_dict(), model.config
        expected = {}
        for theirs, ours in names.items():
            layout = self.architecture.layout_of(theirs)
            tensor = layout.to_theirs([state[name] for name in ours], config)
            expected[self.short(theirs)] = list(tensor.shape)
        found = {
            short: file.get_slice(name).get_shape() for short, (file, name) in self._files.items()
        }
        if model.tie_word_embeddings:
            self._check_tied_head(found, config)
        for name in [*expected, *sorted(found)]:
            if found.get(name) != expected.get(name):
                raise ValueError(
                    f"{self.folder}: the weights do not fit config.json: '{name}' is "
                    f"{found.get(name, 'missing')}, expected {expected.get(name, 'nothing')}"
                )

    def _check_tied_head(self, found: dict[str, list[int]], config: DecoderConfig) -> None:
        """Removes from `found` a head that repeats the embeddings."""
        names = self.architecture.tensors_of(config)
        head = self.short(names["lm_head.weight"])
        embeddings = self.short(names["embedding_layer.token_embeddings.weight"])
        if found.pop(head, None) is None or embeddings not in found:
            return
        if not torch.equal(self.read(head), self.read(embeddings)):
            raise ValueError(
                f"{self.folder}: '{head}' differs from '{embeddings}', but config.json says "
                "tie_word_embeddings; set it to false there to keep both"
            )


def tensor_files(folder: Path) -> list[Path]:
    """The files with the weights in a folder."""
    file, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if file.exists():
        return [file]
    if not index.exists():
        raise FileNotFoundError(
            f"{folder} has neither model.safetensors nor {index.name}; transformers' "
            "save_pretrained converts a pytorch_model.bin"
        )
    try:
        files = [folder / shard for shard in sorted(set(read_json(index)["weight_map"].values()))]
    except (LookupError, TypeError, AttributeError):
        raise ValueError(f"{index} has no weight_map from names to files") from None
    for file in files:
        if not file.exists():
            raise FileNotFoundError(
                f"{file} does not exist, but {index.name} lists it; download it"
            )
    return files


def save_pretrained(
    model: "DecoderModel", folder: str | os.PathLike[str], **token_ids: int | list[int] | None
) -> None:
    """See `DecoderModel.save_pretrained`."""
    architecture, settings = write_settings(model.config)
    write_model(model, folder, architecture, {**settings, **token_ids})


def write_model(
    model: "DecoderModel",
    folder: str | os.PathLike[str],
    architecture: Architecture,
    settings: Mapping[str, Any],
) -> None:
    """Writes both files.

    Args:
        settings: for config.json.
    """
    state, tensors = model.state_dict(), {}
    for theirs, ours in names_in(architecture, model).items():
        parts = [state[name].detach().cpu() for name in ours]
        tensor = architecture.layout_of(theirs).to_theirs(parts, model.config)
        tensors[theirs] = tensor.contiguous()
    # Without these, transformers takes the tokens of some model's vocabulary.
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": model.padding_idx}
    content = {
        "architectures": [architecture.class_name],
        "dtype": str(model.lm_head.weight.dtype).removeprefix("torch."),
        **tokens,
        **settings,
    }
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Both files are complete before either replaces its predecessor.
    with (
        replace_file(folder / "config.json") as config_file,
        replace_file(folder / "model.safetensors") as weights_file,
    ):
        config_file.write(text.encode())
        mode = os.fstat(weights_file.fileno()).st_mode
        save_file(tensors, weights_file.name, metadata={"format": "pt"})
        os.chmod(weights_file.name, mode)  # safetensors writes files that only the owner can read
