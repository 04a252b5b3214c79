"""The tokenizer in the folder of a model in Hugging Face's format.

tokenizer.json says how texts become ids, and what comes before a prompt. Which of the tokens are
special is spread over tokenizer_config.json, special_tokens_map.json, generation_config.json and
config.json, which are read as transformers reads them.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastllm.tokenization import (
    SimpleCharacterTokenizer,
    SubwordTokenizer,
    Tokenizer,
    exported_characters,
)
from fastllm.tokenization.base import SpecialTokens, read_json
from fastllm.tokenization.subword_tokenizer import (
    PAD_NAMES,
    read_gpt2_files,
    read_tokenizer_json,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer as LibraryTokenizer

ROLES = "bos_token eos_token unk_token sep_token pad_token cls_token mask_token".split()
# Models whose vocab.json and merges.txt are all that there is to know.
LIKE_GPT2 = ("gpt2", "gpt_neo")
CONVERSION = (
    "make one with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
)


def load_pretrained_tokenizer(folder: Path, model_vocab_size: int) -> Tokenizer:
    """The tokenizer of the model in a folder, with its special tokens.

    Args:
        model_vocab_size: the model's number of ids, which may exceed the tokenizer's.

    Raises:
        FileNotFoundError: the folder has no tokenizer of a known kind; the message says what to do.
        ValueError: a file is damaged.
        ImportError: the tokenizers library is not installed.
    """
    settings = read_json_object(folder / "special_tokens_map.json")
    settings |= read_json_object(folder / "tokenizer_config.json")
    end = _end_tokens(folder, model_vocab_size)
    file = folder / "tokenizer.json"
    if file.exists():
        data = read_json(file)
        chars = exported_characters(data) if isinstance(data, dict) else None
        if chars is not None:
            characters = SimpleCharacterTokenizer(chars)
            characters.end_tokens = end or frozenset()
            return characters
        library = read_tokenizer_json(file)
    else:
        _check_gpt2(folder, settings)
        file = folder / "vocab.json"
        library = read_gpt2_files(file, folder / "merges.txt")
    added = {token.content for token in library.get_added_tokens_decoder().values()}
    special = {role: _content(settings.get(role)) for role in ROLES}
    library.add_special_tokens(
        [
            token
            for token in special.values()
            if token and token not in added and library.token_to_id(token) is not None
        ]
    )
    library.encode_special_tokens = bool(settings.get("split_special_tokens"))
    ids = {role: library.token_to_id(token) for role, token in special.items() if token}
    if end is None:
        eos = ids.get("eos_token")
        end = frozenset(() if eos is None else (eos,))
    pads = [ids.get("pad_token"), *map(library.token_to_id, PAD_NAMES), *sorted(end), 0]
    pad = next(id for id in pads if id is not None)
    special_tokens = SpecialTokens(pad, _start_ids(library), end)
    return SubwordTokenizer.checked(library, file, special_tokens, model_vocab_size)


def read_json_object(file: Path) -> dict[str, Any]:
    """The content of a JSON file, empty if there is no such file.

    Raises:
        ValueError: it is not JSON, or not an object.
    """
    settings = read_json(file) if file.exists() else {}
    if not isinstance(settings, dict):
        raise ValueError(f"{file} is damaged: it is not a JSON object")
    return settings


def _content(token: Any) -> str | None:
    """A special token's text; files have it alone, or with the token's properties."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _end_tokens(folder: Path, model_vocab_size: int) -> frozenset[int] | None:
    """The ids that end a text, by the first file that names any; None if none does.

    Ids that the model does not have are left out: configurations with another vocabulary often keep
    those of the architecture's own.
    """
    for file in (folder / "generation_config.json", folder / "config.json"):
        given = read_json_object(file).get("eos_token_id")
        ids = given if isinstance(given, list) else [given]
        if given is None:
            continue
        if not all(type(id) is int for id in ids):
            raise ValueError(f"{file}: eos_token_id must be a token id or a list, not {given!r}")
        return frozenset(ids) & frozenset(range(model_vocab_size))
    return None


def _start_ids(library: LibraryTokenizer) -> list[int]:
    """What the library puts before a text, padding left out."""
    library.no_padding()  # its tokens are marked as well
    encoding = library.encode("a")
    marked = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
    return [id for id, _ in itertools.takewhile(lambda pair: pair[1], marked)]


def _check_gpt2(folder: Path, settings: dict[str, Any]) -> None:
    """Raises a `FileNotFoundError` unless vocab.json and merges.txt make a tokenizer like GPT-2."""
    if not (folder / "vocab.json").exists():
        others = ("tokenizer.model", "spiece.model", "vocab.txt")
        found = next((name for name in others if (folder / name).exists()), None)
        if found:
            raise FileNotFoundError(f"{folder} has {found} but no tokenizer.json; {CONVERSION}")
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json; copy it from where the model comes from"
        )
    kind = str(settings.get("tokenizer_class") or "GPT2Tokenizer")
    model_type = read_json_object(folder / "config.json").get("model_type")
    if not kind.startswith("GPT2Tokenizer") or model_type not in LIKE_GPT2:
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json, and its vocab.json is not of GPT-2's kind; "
            f"{CONVERSION}"
        )
