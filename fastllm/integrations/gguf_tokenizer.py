"""Tokenizers in GGUF files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fastllm.command import first_line
from fastllm.integrations.hf_tokenizer import (
    begin_and_end,
    character_tokenizer_json,
    check_utf8,
    tokenizer_json,
)
from fastllm.models.gguf_file import GgufFile
from fastllm.tokenization import SimpleCharacterTokenizer, Tokenizer
from fastllm.tokenization.base import PAD
from fastllm.tokenization.subword_tokenizer import BYTE_TOKEN

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from tokenizers import Tokenizer as LibraryTokenizer


class Vocabulary(NamedTuple):
    """The tables of a tokenizer in llama.cpp.

    Attributes:
        tokens, types: of each id.
        merges: of a byte-level BPE, in order; empty for SentencePiece's.
        pre: how a byte-level BPE finds words; see `WORDS`.
        scores: of each id, for SentencePiece's BPE.
        space_first: whether a text gets a space before it.
    """

    tokens: list[str]
    types: Sequence[int]
    merges: list[str]
    pre: str = "gpt-2"
    scores: Sequence[float] = ()
    space_first: bool = False


class SavedTokenizer(NamedTuple):
    """The tokenizer of a model.

    Attributes:
        library: encodes and decodes texts, without special tokens around them.
        pad: fills up sequences; None if the file names none.
        start: ids that the model expects before a text.
        end: any of these ids ends a text.
    """

    library: LibraryTokenizer
    pad: int | None
    start: list[int]
    end: frozenset[int]


class Words(NamedTuple):
    """How a byte-level BPE finds the words whose bytes it joins.

    Attributes:
        patterns: each cuts the pieces that the ones before left; none for GPT-2's own pattern.
        digits: every digit is a word.
        whole: a word that is a token is not built from its parts.
        starts: a text begins with a special token unless the file denies it.
    """

    patterns: tuple[str, ...] = ()
    digits: bool = False
    whole: bool = False
    starts: bool = False

    def pre_tokenizer(self) -> Any:
        """The tokenizers library's part."""
        from tokenizers import Regex
        from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

        parts: list[Any] = [Split(Regex(pattern), "isolated") for pattern in self.patterns]
        parts += [Digits(individual_digits=True)] if self.digits else []
        parts += [ByteLevel(add_prefix_space=False, use_regex=not self.patterns)]
        return Sequence(parts) if len(parts) > 1 else parts[0]


_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SYMBOLS_AND_SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS_WITH_SLASHES = _SYMBOLS_AND_SPACES.replace(r"[\r\n]*", r"[\r\n/]*")
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+ENDING"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*ENDING"
)
_GPT2 = Words()
_SMOLLM = Words(digits=True)
_QWEN2 = Words((rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_SYMBOLS_AND_SPACES}",))
_DBRX = Words((rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_SYMBOLS_AND_SPACES}",))
_LLAMA3 = _DBRX._replace(whole=True, starts=True)
_GPT4O = Words(
    (_CASED.replace("ENDING", f"{_CONTRACTIONS}?") + rf"|\p{{N}}{{1,3}}|{_SYMBOLS_WITH_SLASHES}",)
)
_TEKKEN = Words(
    (_CASED.replace("ENDING", "") + rf"|\p{{N}}|{_SYMBOLS_WITH_SLASHES}",), whole=True, starts=True
)
# By llama.cpp's name, `tokenizer.ggml.pre`; a tokenizer is saved under the first that fits.
WORDS = {
    "gpt-2": _GPT2, "phi-2": _GPT2, "mpt": _GPT2, "olmo": _GPT2,
    "smollm": _SMOLLM, "starcoder": _SMOLLM, "refact": _SMOLLM, "command-r": _SMOLLM,
    "codeshell": _SMOLLM,
    "qwen2": _QWEN2, "stablelm2": _QWEN2, "deepseek-r1-qwen": _QWEN2, "megrez": _QWEN2,
    "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "falcon3": _LLAMA3,
    "pixtral": _LLAMA3,
    "dbrx": _DBRX, "smaug-bpe": _DBRX,
    "gpt-4o": _GPT4O,
    "tekken": _TEKKEN,
}  # fmt: skip


def read_tokenizer(file: GgufFile) -> SavedTokenizer:
    """The tokenizer in a GGUF file.

    Raises:
        ValueError: it is of an unknown kind, or damaged; the message names the file and the key.
        ImportError: the tokenizers library is not installed.
    """
    try:
        return _read_tokenizer(file)
    except ImportError:
        raise
    except Exception as error:  # the library has no error of its own for a damaged vocabulary
        raise ValueError(f"{file.path}: {first_line(error)}") from error


def _read_tokenizer(file: GgufFile) -> SavedTokenizer:
    kind = file.get("tokenizer.ggml.model", str)
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"tokenizer.ggml.model must be gpt2 or llama, not {kind}")
    tokens = file.get("tokenizer.ggml.tokens", list)
    ids = {token: id for id, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        raise ValueError("tokenizer.ggml.tokens has the same token twice")
    if kind == "gpt2":
        library, starts = _byte_level_bpe(file, ids)
    else:
        library, starts = _sentencepiece(file, ids), True
    _add_special_tokens(file, library, tokens)
    named = {}
    for name in ("bos", "eos", "eot", "padding"):
        id = file.get(f"tokenizer.ggml.{name}_token_id", int, -1)
        if not -1 <= id < len(tokens):
            raise ValueError(f"tokenizer.ggml.{name}_token_id {id} is not a token")
        named[name] = id
    starts = file.get("tokenizer.ggml.add_bos_token", bool, starts) and named["bos"] >= 0
    return SavedTokenizer(
        library,
        None if named["padding"] < 0 else named["padding"],
        [named["bos"]] if starts else [],
        frozenset({named["eos"], named["eot"]} - {-1}),
    )


def _byte_level_bpe(file: GgufFile, ids: dict[str, int]) -> tuple[LibraryTokenizer, bool]:
    """The tokenizer, and whether a text begins with a special token by default."""
    from tokenizers import Tokenizer as LibraryTokenizer
    from tokenizers import decoders, models

    name = file.get("tokenizer.ggml.pre", str, "default")
    if name not in WORDS:
        known = ", ".join(WORDS)
        raise ValueError(f"tokenizer.ggml.pre must be one of {known}, not {name}")
    if (characters := _characters(ids)) is not None:
        return characters, False
    merges = []
    for merge in file.get("tokenizer.ggml.merges", list):
        first, _, second = merge.partition(" ")
        if first in ids and second in ids and first + second in ids:  # as in llama.cpp
            merges.append((first, second))
    library = LibraryTokenizer(models.BPE(ids, merges, ignore_merges=WORDS[name].whole))
    library.pre_tokenizer = WORDS[name].pre_tokenizer()
    library.decoder = decoders.ByteLevel()
    return library, WORDS[name].starts


def _characters(ids: dict[str, int]) -> LibraryTokenizer | None:
    """The tokenizer if the vocabulary is that of a `SimpleCharacterTokenizer`.

    The bytes of its characters are no tokens, without which the library cannot join them.
    """
    from tokenizers import Tokenizer as LibraryTokenizer
    from tokenizers.decoders import ByteLevel

    decode = ByteLevel().decode
    *chars, pad = [token if token == PAD else decode([token]) for token in ids] or [""]
    if pad != PAD or not all(len(char) == 1 for char in chars):
        return None
    tokenizer = SimpleCharacterTokenizer(["".join(chars)])
    if tokenizer.chars != [*chars, pad]:
        return None
    return LibraryTokenizer.from_str(character_tokenizer_json(tokenizer))


def _sentencepiece(file: GgufFile, ids: dict[str, int]) -> LibraryTokenizer:
    """SentencePiece's BPE: neighbours are joined to the token of the highest score."""
    from tokenizers import Tokenizer as LibraryTokenizer
    from tokenizers import decoders, models, normalizers

    scores = _of_tokens(file, "scores", len(ids))
    merges = [
        (-score, (token[:end], token[end:]))
        for (token, id), score in zip(ids.items(), scores, strict=True)
        for end in range(1, len(token))
        if token[:end] in ids and token[end:] in ids
    ]
    merges.sort(key=lambda merge: merge[0])
    unknown = file.get("tokenizer.ggml.unknown_token_id", int, 0)
    library = LibraryTokenizer(
        models.BPE(
            ids,
            [pair for _, pair in merges],
            unk_token=next((token for token, id in ids.items() if id == unknown), None),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces: list[Any] = [normalizers.Replace(" ", "▁")]
    parts: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.get("tokenizer.ggml.add_space_prefix", bool, True):
        spaces.insert(0, normalizers.Prepend("▁"))
        parts.append(decoders.Strip(" ", 1, 0))
    library.normalizer = normalizers.Sequence(spaces)
    library.decoder = decoders.Sequence(parts)
    return library


def _of_tokens(file: GgufFile, name: str, count: int, default: Any = None) -> list[Any]:
    """A list with a number for each token."""
    values: list[Any] = file.get(f"tokenizer.ggml.{name}", list, default)
    if len(values) != count:
        raise ValueError(f"tokenizer.ggml.{name} must have a number for each token")
    return values


def _add_special_tokens(file: GgufFile, library: LibraryTokenizer, tokens: list[str]) -> None:
    """Declares the tokens that are found in a text before it is cut into words."""
    from gguf import TokenType
    from tokenizers import AddedToken

    types = _of_tokens(file, "token_type", len(tokens), [TokenType.NORMAL] * len(tokens))
    added = [
        AddedToken(token, special=type == TokenType.CONTROL, normalized=False)
        for token, type in zip(tokens, types, strict=True)
        if token and type in (TokenType.CONTROL, TokenType.USER_DEFINED)
    ]
    library.add_tokens(added)


def write_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Writes the settings of a tokenizer."""
    begin, end = begin_and_end(tokenizer)
    settings: dict[str, Any] = {
        "model": "llama" if vocabulary.scores else "gpt2",
        "pre": "default" if vocabulary.scores else vocabulary.pre,
        "tokens": vocabulary.tokens,
        "scores": list(vocabulary.scores),
        "token_type": [int(type) for type in vocabulary.types],
        "merges": vocabulary.merges,
        "add_space_prefix": vocabulary.space_first,
        # Without these two, llama.cpp takes a token of GPT-2's or Llama's for them.
        "bos_token_id": begin,
        "eos_token_id": end[0],
        "padding_token_id": tokenizer.pad_token_id,
        "add_bos_token": bool(tokenizer.start_tokens),
        "add_eos_token": False,
    }
    if len(end) > 1:
        settings["eot_token_id"] = end[1]
    for key, value in settings.items():
        add_setting(writer, f"tokenizer.ggml.{key}", value)


def add_setting(writer: GGUFWriter, key: str, value: Any) -> None:
    """Writes a setting with the type that llama.cpp expects; an empty list is left out."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value:
        writer.add_array(key, value)


def gguf_vocabulary(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """The tokenizer in llama.cpp, which encodes every text to the same ids.

    Each character of a character tokenizer becomes a token of all its bytes, whose merges join them
    from first to last. No byte that begins a character in UTF-8 occurs inside another one, so
    nothing else is joined. llama.cpp skips characters without a token, for which this package
    raises an error.

    Args:
        size: the model's number of ids, which may exceed the tokenizer's.

    Raises:
        ValueError: llama.cpp has no such tokenizer; the message gives the reason.
        ImportError: the tokenizers library is not installed.
    """
    from gguf import TokenType

    if tokenizer.vocab_size > size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids, and the model only {size}")
    if isinstance(tokenizer, SimpleCharacterTokenizer):
        check_utf8(tokenizer)
        vocabulary = _character_vocabulary(tokenizer)
    else:
        data = tokenizer_json(tokenizer)
        vocabulary = _subword_vocabulary(data, tokenizer.vocab_size, tokenizer.pad_token_id)
    unused = range(len(vocabulary.tokens), size)
    return vocabulary._replace(
        tokens=[*vocabulary.tokens, *(f"[unused{id}]" for id in unused)],
        types=[*vocabulary.types, *[TokenType.UNUSED] * len(unused)],
        scores=vocabulary.scores and [*vocabulary.scores, *[0.0] * len(unused)],
    )


def _character_vocabulary(tokenizer: SimpleCharacterTokenizer) -> Vocabulary:
    from gguf import TokenType
    from tokenizers.pre_tokenizers import ByteLevel

    as_bytes = ByteLevel(add_prefix_space=False, use_regex=False)
    *chars, pad = tokenizer.chars
    spelt = [as_bytes.pre_tokenize_str(char)[0][0] for char in chars]
    merges = {
        f"{token[:end]} {token[end]}": None for token in spelt for end in range(1, len(token))
    }
    # llama.cpp requires a merge; this one never applies, because nothing produces its parts.
    return Vocabulary(
        [*spelt, pad],
        [TokenType.NORMAL] * len(chars) + [TokenType.CONTROL],
        [*merges] or [f"{pad} {pad}"],
    )


def _subword_vocabulary(data: dict[str, Any], vocab_size: int, pad_token_id: int) -> Vocabulary:
    from gguf import TokenType

    kind = _kind_of(data)
    texts, types = {}, {}
    for token, id in data["model"]["vocab"].items():
        texts[id], types[id] = token, TokenType.NORMAL
        if kind == "llama" and BYTE_TOKEN.fullmatch(token):
            types[id] = TokenType.BYTE
    for token in data["added_tokens"]:
        texts[token["id"]] = token["content"]
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    merges = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in data["model"]["merges"]
    ]
    ids = range(vocab_size)
    vocabulary = Vocabulary(
        [texts.get(id, f"[unused{id}]") for id in ids],
        [types.get(id, TokenType.UNUSED) for id in ids],
        merges or [f"{texts[pad_token_id]} {texts[pad_token_id]}"],
        kind,
    )
    if kind != "llama":
        return vocabulary
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    scores = [-float(ranks.get(token, len(ranks))) for token in vocabulary.tokens]
    space_first = "normalizers" in data["normalizer"] and len(data["normalizer"]["normalizers"]) > 1
    return vocabulary._replace(merges=[], scores=scores, space_first=space_first)


def _kind_of(data: dict[str, Any]) -> str:
    """The name in `WORDS` of a byte-level BPE, or "llama" for SentencePiece's.

    Args:
        data: the content of its tokenizer.json.

    Raises:
        ValueError: llama.cpp has neither; the message gives the reason.
    """
    reason, model = _why_unknown(data), data["model"]
    if reason is None and _has_spaces_as_sentencepiece(data):
        return "llama"
    if reason is None:
        cuts, whole = _cuts(data["pre_tokenizer"]), bool(model.get("ignore_merges"))
        fitting = {
            name: words
            for name, words in WORDS.items()
            if _cuts(json.loads(words.pre_tokenizer().__getstate__())) == cuts
        }
        for name, words in fitting.items():
            if words.whole == whole:
                return name
        reason = "the tokenizer does not split text into words as GPT-2 or another model does"
        if fitting:
            reason = f"it has no such words with ignore_merges {str(whole).lower()}"
    raise ValueError(f"llama.cpp cannot reproduce this tokenizer: {reason}")


def _why_unknown(data: dict[str, Any]) -> str | None:
    """Why llama.cpp has no BPE like the one in a tokenizer.json, whatever its words, or None."""
    model = data["model"]
    if model["type"] == "WordPiece":
        return "it has WordPiece only for BERT, in lower case"
    if model["type"] != "BPE":
        return f"it has no counterpart of a {model['type']} tokenizer"
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            return f"its BPE has no {option}"
    for token in data["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            return f"the token {token['content']!r} depends on the surrounding white space"
    if model.get("byte_fallback"):
        spaces = _has_spaces_as_sentencepiece(data)
        return None if spaces else "the tokenizer does not treat spaces as SentencePiece does"
    if any(part.get("add_prefix_space") for part in _cuts(data["pre_tokenizer"])):
        return "the tokenizer puts a space before every text"
    if data["normalizer"] not in (None, {"type": "NFC"}):  # most texts are composed already
        return "the tokenizer normalizes texts first"
    return None


def _cuts(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The parts of a pre_tokenizer, without what does not matter for the ids."""
    if pre_tokenizer is None:
        return []
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return [{key: each for key, each in part.items() if key != "trim_offsets"} for part in parts]


def _has_spaces_as_sentencepiece(data: dict[str, Any]) -> bool:
    """Whether a BPE with a token for each byte replaces spaces, and nothing else."""
    normalizer = data["normalizer"] or {}
    parts = normalizer.get("normalizers", [normalizer])
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    return bool(data["model"].get("byte_fallback")) and parts in ([replace], [prepend, replace])
