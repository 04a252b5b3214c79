"""Models and tokenizers of transformers by name: on the Hugging Face hub, in a folder or a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastllm.command import first_line, is_fault, is_out_of_memory
from fastllm.data.sources import is_local
from fastllm.models import hub

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A tokenizer.json does not say which of its special tokens has which role.
SPECIAL_TOKENS = {
    "eos_token": ("<|endoftext|>", "</s>"),
    "pad_token": ("<PAD>", "[PAD]", "<pad>"),
    "mask_token": ("[MASK]", "<mask>"),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
    "unk_token": ("[UNK]", "<unk>"),
}


def go_offline_if_unreachable(names: Iterable[str]) -> None:
    """`hub.go_offline_if_unreachable` if one of these is on the hub."""
    if not all(map(is_local, names)):
        hub.go_offline_if_unreachable()


def load_config(name: str) -> Any:
    """The configuration of a model.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: it cannot be loaded; the message says why and what to do.
    """
    from transformers import AutoConfig

    refuse_our_own(Path(name))
    location, options = _location(name)
    return _load("model", name, AutoConfig.from_pretrained, location, **options)


def refuse_our_own(path: Path) -> None:
    """Raises a `ValueError` for files that fastllm writes and transformers does not read."""
    advice = "give the folder that `fastllm export --format hf` writes"
    if (path / "config.json").is_file():
        settings = (path / "config.json").read_text(encoding="utf-8", errors="replace")
        if "fastllm_version" in settings:
            if (path / "model").is_dir():
                advice = f"give its model, {path / 'model'}"
            raise ValueError(f"{path} is a run of fastllm; {advice}")
    if path.suffix == ".gguf" and path.is_file():
        from gguf import GGUFReader

        reader = _load("model", str(path), GGUFReader, path)

        def value(name: str) -> Any:
            field = reader.get_field(name)
            return field and field.contents()

        # transformers leaves these at the values of OpenAI's models.
        is_read = value("general.architecture") != "gpt2" or (
            value("gpt2.context_length") == 1024
            and value("gpt2.feed_forward_length") == 4 * value("gpt2.embedding_length")
        )
        if not is_read:
            raise ValueError(
                f"{path} is a GPT-2 of a length or width that transformers does not read from "
                f"GGUF; {advice}"
            )


def load_weights(name: str, model_config: Any, auto_class: Any) -> tuple[Any, set[str] | None]:
    """A model in fp32, and the names of the parameters that its files lack.

    None instead of names if there are no files with weights at all: then all of them are random.

    Args:
        auto_class: which kind of model, such as `AutoModelForCausalLM`.
    """
    from transformers import GgufConfig

    path = Path(name)
    if path.suffix == ".json" or (path.is_dir() and not _has_weights(path)):
        return auto_class.from_config(model_config, dtype=torch.float32), None
    location, options = _location(name)
    if "gguf_file" in options:
        options["quantization_config"] = GgufConfig(dequantize=True)
    model, loading = _load(
        "model",
        name,
        auto_class.from_pretrained,
        location,
        dtype=torch.float32,
        output_loading_info=True,
        **options,
    )
    return model, set(loading["missing_keys"])


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, in a folder or in a tokenizer.json.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: there is no tokenizer; the message says what to give.
    """
    from transformers import AutoTokenizer, GPT2Tokenizer

    location, options = _location(name)
    path = Path(name)
    if path.suffix == ".json" and path.name != "config.json":
        return _load("tokenizer", name, _tokenizer_from_file, path)
    folder = path.parent if path.suffix == ".json" else path
    if folder.is_dir():
        location, files = str(folder), {each.name for each in folder.iterdir()}
        if "tokenizer.json" in files and "tokenizer_config.json" not in files:
            return _load("tokenizer", name, _tokenizer_from_file, folder / "tokenizer.json")
        if not files & {"tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model"}:
            raise ValueError(f"{folder} has no tokenizer; give one by --tokenizer")
        if "vocab.json" in files and not files & {"tokenizer_config.json", "config.json"}:
            return _load("tokenizer", name, GPT2Tokenizer.from_pretrained, location)
    return _load("tokenizer", name, AutoTokenizer.from_pretrained, location, **options)


def _tokenizer_from_file(file: Path) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file))
    vocabulary = tokenizer.get_vocab()
    for role, candidates in SPECIAL_TOKENS.items():
        token = next((each for each in candidates if each in vocabulary), None)
        if token is not None:
            tokenizer.add_special_tokens({role: token})
    return tokenizer


def _location(name: str) -> tuple[str, dict[str, Any]]:
    """The arguments of `from_pretrained` for a model's name."""
    path = Path(name)
    if is_local(name) and not path.exists():
        raise FileNotFoundError(f"{name} does not exist")
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    return (str(path) if path.exists() else name), {}


def _load(kind: str, name: str, load: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`load(...)`, with errors that say what was looked for, why it failed and what to do."""
    try:
        return load(*args, **kwargs)
    except BaseException as error:
        # Files that are not what they should be raise whatever the libraries stumble over.
        if not is_fault(error) or is_out_of_memory(error):
            raise
        reason = first_line(error)
        if "ignore_mismatched_sizes" in reason:  # it points to a report that is not printed
            reason = "its weights have other shapes than its configuration says"
        if is_local(name):
            raise ValueError(f"the {kind} in {name} cannot be loaded: {reason}") from error
        raise ValueError(
            f"{kind} {name} is not a folder here, and the hub does not provide it: {reason} On a "
            f"machine with a network, run `hf download {name} --local-dir DIR`; then give "
            f"--{kind} DIR"
        ) from error
