"""Subword tokenizers of the tokenizers library: BPE, WordPiece, or any other tokenizer.json."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from fastllm.files import replace_file
from fastllm.tokenization.base import (
    BETWEEN_WORDS,
    PAD,
    SpecialTokens,
    check_text,
    check_tokens,
    read_json,
    read_text_file,
    smallest_token_dtype,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
PAD_NAMES = (PAD, "[PAD]", "<pad>")
WORDPIECE_SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# Characters of a word, at most, while a vocabulary is learnt: every merge looks at whole words, and
# a line without spaces is one. WordPiece encodes longer words as unknown.
LONGEST_WORD = 100
# Characters per segment. The library encodes a batch's segments in parallel; one of this length
# occupies a thread for some milliseconds, and its tokens need little memory.
SEGMENT = 1 << 15


def _library() -> ModuleType:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "subword tokenizers need the tokenizers library: pip install tokenizers"
        ) from error
    return tokenizers


@contextlib.contextmanager
def _damage_as_value_error(path: object) -> Iterator[None]:
    """Turns the library's errors about a bad file, including Rust panics, into ValueError."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or _is_from_library(error):
            raise ValueError(f"{path} is not a usable tokenizer: {error}") from error
        raise


def _is_from_library(error: BaseException) -> bool:
    """Whether it is an error without a type, or a Rust panic, which has no class to import."""
    return type(error) is Exception or type(error).__name__ == "PanicException"


def _run_interruptibly(call: Callable[[], None]) -> None:
    """Runs `call` in a thread: Ctrl-C ends the wait for it, as the library ignores signals."""
    outcome: Future[None] = Future()

    def run() -> None:
        try:
            call()
        except BaseException as error:
            outcome.set_exception(error)
        else:
            outcome.set_result(None)

    threading.Thread(target=run, daemon=True).start()
    outcome.result()


class SubwordTokenizer:
    """A tokenizer of the tokenizers library, with the interface of the character tokenizer.

    Use `train`, `from_file` or `from_gpt2` to make one, `load_pretrained_tokenizer` for that of a
    model that others trained. Texts are never truncated or padded and get no special tokens around
    them, even if the file asks for it. A special token spelt out in a text
    ("<|endoftext|>") becomes that token. With byte-level BPE, `decode(encode(text))` returns every
    text unchanged; WordPiece loses the white space.

    Attributes:
        vocab_size: the number of ids, padding included (one more than the largest id).
        pad_token_id: the id of "<PAD>", "[PAD]" or "<pad>"; "<PAD>" is added if
            all are missing.
        token_dtype: the smallest integer type that holds every id.
        unknown_token_id: the id of what the vocabulary cannot spell, if it has one.
        is_lossless: whether decoding restores texts, white space included.
        may_be_cut: whether a text cut between words encodes to the same ids, piece by piece.

    Raises:
        ImportError: the tokenizers library is not installed.
        ValueError: two tokens share an id, or an id is far larger than the vocabulary.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        special: SpecialTokens | None = None,
        model_vocab_size: int = 0,
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if special is None:
            if not any(tokenizer.token_to_id(pad) is not None for pad in PAD_NAMES):
                tokenizer.add_special_tokens([PAD])
            ids = map(tokenizer.token_to_id, PAD_NAMES)
            special = SpecialTokens(next(id for id in ids if id is not None))
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self._tokenizer = tokenizer
        self.pad_token_id, self.start_tokens, self.end_tokens = special
        self._ids = frozenset(vocabulary.values())
        has_bytes = "ByteFallback" in repr(tokenizer.decoder)
        self._byte_of = {
            i: int(token[3:5], 16)
            for token, i in vocabulary.items()
            if has_bytes and BYTE_TOKEN.fullmatch(token)
        }
        self.vocab_size = max(self._ids) + 1
        if len(self._ids) != len(vocabulary):
            raise ValueError("two tokens of the vocabulary have the same id")
        # A few unused ids are harmless rows of an embedding; one stray huge id makes it huge.
        if self.vocab_size > 2 * len(vocabulary):
            raise ValueError(
                f"token id {self.vocab_size - 1} in a vocabulary of {len(vocabulary)} tokens"
            )
        self._ids |= frozenset(range(model_vocab_size))
        self.vocab_size = max(self.vocab_size, model_vocab_size)
        self.token_dtype = smallest_token_dtype(self.vocab_size)
        unknown = getattr(tokenizer.model, "unk_token", None)
        self.unknown_token_id = None if unknown is None else vocabulary.get(unknown)
        # Some models mark the first word of every input, so their texts must stay whole.
        self.may_be_cut = all(
            self._encode_batch([a + b]) == self._encode_batch([a, b])
            for a, b in (("ab", " ab"), ("ab\n", "ab"))
        )
        sample = " Two  words,\n\té 世."
        self.is_lossless = tokenizer.decode(self._encode_batch([sample])) == sample

    @classmethod
    def train(
        cls,
        pieces: Iterable[str],
        model: Literal["bpe", "wordpiece"],
        vocab_size: int,
        show_progress: bool = False,
    ) -> SubwordTokenizer:
        """Learns a vocabulary of at most `vocab_size` tokens, padding included.

        "bpe" is GPT-2's kind: it works on bytes and starts from all 256 of them, so no text is
        unknown. "wordpiece" is BERT's kind, with case preserved and BERT's special tokens; words of
        more than `LONGEST_WORD` characters are unknown to it.

        Args:
            pieces: the text; each piece is released before the next one is requested.
            show_progress: draw progress bars on a terminal.

        Raises:
            ValueError: `model` is unknown, `vocab_size` is too small for the single characters, or
                the library fails.
            KeyboardInterrupt: Ctrl-C; the library may go on in the background.
        """
        library = _library()
        models, decoders = library.models, library.decoders
        pre_tokenizers, trainers = library.pre_tokenizers, library.trainers
        if model == "bpe":
            smallest = 256 + 1
            if vocab_size < smallest:
                raise ValueError(
                    f"vocab_size is {vocab_size}, but byte-level BPE needs at least {smallest}: "
                    "256 bytes and padding"
                )
            tokenizer = library.Tokenizer(models.BPE())
            words = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            trainer = trainers.BpeTrainer(
                vocab_size=vocab_size,
                special_tokens=[PAD],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=show_progress,
            )
        elif model == "wordpiece":
            tokenizer = library.Tokenizer(models.WordPiece(unk_token="[UNK]"))
            tokenizer.normalizer = library.normalizers.BertNormalizer(lowercase=False)
            words = pre_tokenizers.BertPreTokenizer()
            tokenizer.decoder = decoders.WordPiece()
            trainer = trainers.WordPieceTrainer(
                vocab_size=vocab_size,
                special_tokens=WORDPIECE_SPECIALS,
                show_progress=show_progress,
            )
        else:
            raise ValueError(f'model must be "bpe" or "wordpiece", not {model!r}')
        short_words = pre_tokenizers.Split(library.Regex(f".{{1,{LONGEST_WORD}}}"), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, short_words])
        interrupted = threading.Event()

        def segments() -> Iterator[str]:
            for piece in pieces:
                if interrupted.is_set():
                    raise KeyboardInterrupt
                yield from _segments(piece)

        try:
            _run_interruptibly(lambda: tokenizer.train_from_iterator(segments(), trainer))
        except BaseException as error:
            interrupted.set()
            if _is_from_library(error):
                raise ValueError(f"a {model} tokenizer cannot be learnt: {error}") from error
            raise
        tokenizer.pre_tokenizer = words
        trained = cls(tokenizer)
        if trained.vocab_size > vocab_size:
            raise ValueError(
                f"vocab_size is {vocab_size}, but the single characters of this text need "
                f"{trained.vocab_size} tokens; use a larger vocab_size, or bpe"
            )
        return trained

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> SubwordTokenizer:
        """Loads the library's own format, tokenizer.json.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is not a tokenizer, or is damaged.
        """
        return cls.checked(read_tokenizer_json(path), path)

    @classmethod
    def from_gpt2(
        cls, vocab_path: str | os.PathLike[str], merges_path: str | os.PathLike[str]
    ) -> SubwordTokenizer:
        """Loads GPT-2's format: a JSON file with the id of each token, and a text of merges.

        Raises:
            FileNotFoundError: one of the files is missing.
            ValueError: a file is damaged, or the two do not belong together.
        """
        return cls.checked(read_gpt2_files(vocab_path, merges_path), vocab_path)

    @classmethod
    def checked(
        cls,
        tokenizer: Tokenizer,
        path: object,
        special: SpecialTokens | None = None,
        model_vocab_size: int = 0,
    ) -> SubwordTokenizer:
        """A tokenizer from a file, `path`, which need not be sound.

        Raises:
            ValueError: it cannot encode or decode.
        """
        # Some damage shows only in use, such as an unknown token missing from the vocabulary.
        with _damage_as_value_error(path):
            checked = cls(tokenizer, special, model_vocab_size)
            sample = "A word, 12 more;\n\tÜbung 世界 \U0001f600 \U0010fffd" + 300 * "x"
            checked.decode(checked.encode(sample))
        return checked

    def encode(self, text: str) -> list[int]:
        """The ids of the tokens of `text`.

        Raises:
            TypeError: `text` is not a string.
            ValueError: `text` has a lone surrogate, which is not a valid character, or the library
                cannot encode it.
        """
        check_text(text)
        segments = _segments(text) if self.may_be_cut else [text]
        try:
            return self._encode_batch(list(segments))
        except TypeError as error:
            raise ValueError(
                "the text has a lone surrogate, which is not a valid character; "
                'text.encode("utf-8", "replace").decode() replaces it'
            ) from error

    def _encode_batch(self, texts: list[str]) -> list[int]:
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except BaseException as error:
            if _is_from_library(error):
                raise ValueError(f"the tokenizer cannot encode the text: {error}") from error
            raise
        return [i for encoding in encodings for i in encoding.ids]

    def encode_array(self, text: str) -> npt.NDArray[Any]:
        """Like `encode`, but returns an array [number of tokens] of `token_dtype`."""
        return np.array(self.encode(text), dtype=self.token_dtype)

    def decode(self, tokens: list[int]) -> str:
        """The text of a list of ids; special tokens are spelt out.

        Raises:
            TypeError: `tokens` is not a list of integers.
            KeyError: an id is not in the vocabulary.
        """
        check_tokens(tokens)
        unknown = set(tokens) - self._ids
        if unknown:
            raise KeyError(
                f"Token ID '{min(unknown)}' not found; the ids of this tokenizer are "
                f"0 to {self.vocab_size - 1}"
            )
        if self._byte_of.keys().isdisjoint(tokens):
            return self._tokenizer.decode(tokens, skip_special_tokens=False)
        # The library turns a whole run of bytes into replacement characters if it ends within a
        # character. Here, as in byte-level BPE, the characters before that stay.
        texts: list[str] = []
        for is_byte, run in itertools.groupby(tokens, self._byte_of.__contains__):
            if is_byte:
                texts.append(bytes(self._byte_of[i] for i in run).decode("utf-8", "replace"))
            else:
                texts += (self._tokenizer.id_to_token(int(i)) or "" for i in run)
        return self._tokenizer.decoder.decode(texts)

    def to_json(self) -> str:
        """The content of the library's own tokenizer.json."""
        return self._tokenizer.to_str()

    @property
    def fingerprint(self) -> str:
        """A digest that is equal only for tokenizers that encode every text alike."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the library's own tokenizer.json; an existing file is replaced atomically."""
        with replace_file(path) as file:
            file.write(self._tokenizer.to_str(pretty=True).encode())


def read_tokenizer_json(path: str | os.PathLike[str]) -> Tokenizer:
    """The library's tokenizer in a tokenizer.json; raises like `SubwordTokenizer.from_file`."""
    library = _library()
    text = read_text_file(path)
    with _damage_as_value_error(path):
        return library.Tokenizer.from_str(text)


def read_gpt2_files(
    vocab_path: str | os.PathLike[str], merges_path: str | os.PathLike[str]
) -> Tokenizer:
    """The library's tokenizer of two files; raises like `SubwordTokenizer.from_gpt2`."""
    library = _library()
    vocabulary, merges_text = read_json(vocab_path), read_text_file(merges_path)
    if not isinstance(vocabulary, dict) or not all(
        type(i) is int and 0 <= i < 2**31 for i in vocabulary.values()
    ):
        raise ValueError(f"{vocab_path} is not a GPT-2 vocabulary: each token needs an id")
    missing = set(library.pre_tokenizers.ByteLevel.alphabet()) - vocabulary.keys()
    if missing:
        raise ValueError(
            f"{vocab_path} is not a complete GPT-2 vocabulary: no token for {min(missing)!r}"
        )
    merges = []
    for number, line in enumerate(merges_text.split("\n"), start=1):
        line = line.rstrip("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or not all(pair):
            raise ValueError(f"{merges_path} is damaged: line {number} is not two tokens")
        for token in (*pair, "".join(pair)):
            if token not in vocabulary:
                raise ValueError(
                    f"{merges_path} is damaged, or does not belong to {vocab_path}: "
                    f"line {number} needs the token {token!r}, which has no id"
                )
        merges.append((pair[0], pair[1]))
    with _damage_as_value_error(vocab_path):
        tokenizer = library.Tokenizer(library.models.BPE(vocabulary, merges))
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        if "<|endoftext|>" in vocabulary:
            tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def _segments(text: str) -> Iterator[str]:
    start = 0
    while True:
        cut = BETWEEN_WORDS.search(text, start + SEGMENT)
        if cut is None:
            break
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]
