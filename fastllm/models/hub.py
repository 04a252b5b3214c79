"""Models on the Hugging Face hub."""

import os
import re
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

from fastllm.command import first_line, log

# OWNER/NAME or NAME; the names of folders here may begin with a point or a slash.
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def go_offline_if_unreachable() -> None:
    """If the hub does not answer, makes the libraries use earlier downloads alone.

    Otherwise they would retry for 20 seconds per file. They read the variable when they are
    imported, so call this first.
    """
    if os.environ.get("HF_HUB_OFFLINE"):
        return
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(hub, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except OSError as error:
        log(f"warning: {hub} cannot be reached ({error}); using earlier downloads")
        os.environ["HF_HUB_OFFLINE"] = "1"


def may_be_on_hub(source: str | os.PathLike[str]) -> bool:
    """Whether a path that does not exist is a name on the hub, rather than misspelt."""
    path = Path(source)
    is_name = HUB_NAME.fullmatch(str(source)) is not None and path.suffix != ".gguf"
    is_in_a_folder = len(path.parts) == 2 and path.parent.exists()
    return is_name and not is_in_a_folder and find_spec("huggingface_hub") is not None


def download(name: str) -> Path:
    """The folder of a model on the hub: configuration, weights in safetensors and tokenizer.

    Raises:
        ImportError: huggingface_hub is not installed.
        ValueError: the hub does not provide it; the message says what to do.
    """
    go_offline_if_unreachable()
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns="*/*"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} is not a folder here, and the hub does not provide it: {first_line(error)} "
            f"On a machine with a network, run `hf download {name} --local-dir DIR`; then give DIR"
        ) from error
