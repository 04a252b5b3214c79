"""A small tokenizer of each kind that `train` makes or that folders of other projects bring."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fastllm.tokenization import SimpleCharacterTokenizer, SubwordTokenizer, Tokenizer
from fastllm.tokenization.base import SpecialTokens

TEXT = (
    "Grüße an 世界 and 🙂: the wonderful words, of the world's end. What's in a name?\n"
    "That which we call a rose by any other word would smell as sweet; so Romeo would.\n\n"
) * 20


def _trained(tokenizer: Any, trainer: Any) -> SubwordTokenizer:
    tokenizer.train_from_iterator([TEXT], trainer)
    return SubwordTokenizer(tokenizer)


def bert_uncased() -> SubwordTokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[PAD]", "[UNK]"], show_progress=False
    )
    return _trained(tokenizer, trainer)


def unigram() -> SubwordTokenizer:
    """T5's kind: Unigram with Metaspace."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    return _trained(tokenizer, trainer)


def byte_fallback() -> SubwordTokenizer:
    """Llama's kind: BPE that spells unknown characters in bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
        limit_alphabet=40,
        show_progress=False,
    )
    return _trained(tokenizer, trainer)


def end_of_word() -> SubwordTokenizer:
    """The first GPT's kind: BPE that marks the ends of words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=200,
        special_tokens=["<unk>"],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    return _trained(tokenizer, trainer)


def with_special_tokens(
    tokenizer: SubwordTokenizer, start: Sequence[int], end: Iterable[int]
) -> SubwordTokenizer:
    """The same tokenizer, whose model expects `start` before prompts, and ends texts by `end`."""
    from tokenizers import Tokenizer

    special = SpecialTokens(tokenizer.pad_token_id, start, frozenset(end))
    return SubwordTokenizer(Tokenizer.from_str(tokenizer.to_json()), special)


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "character": lambda: SimpleCharacterTokenizer([TEXT]),
    "bpe": lambda: SubwordTokenizer.train([TEXT], "bpe", 300),
    "wordpiece": lambda: SubwordTokenizer.train([TEXT], "wordpiece", 200),
    "bert_uncased": bert_uncased,
    "unigram": unigram,
    "byte_fallback": byte_fallback,
    "end_of_word": end_of_word,
}
