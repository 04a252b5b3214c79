"""Prompts to start from, in the manner of the text that a model was trained on."""

from pathlib import Path

from fastllm.data.tokens import map_tokens, read_header
from fastllm.tokenization import Tokenizer

COUNT = 4
# Characters of an example, cut between words where there are any.
MIN_LENGTH, MAX_LENGTH = 8, 32
# Tokens in which to look for the beginning of a line.
WINDOW = 1000
# For models whose training text is not there.
COMMON = ("Once upon a time", "It was a", "The", "In the beginning")


def example_prompts(run_dir: Path, tokenizer: Tokenizer) -> list[str]:
    """Beginnings of lines of the training text, or common ones that the tokenizer can encode."""
    found = [line for line in _beginnings(run_dir / "tokens.bin", tokenizer) if line]
    return list(dict.fromkeys(found)) or [text for text in COMMON if _encodes(tokenizer, text)]


def _beginnings(token_file: Path, tokenizer: Tokenizer) -> list[str]:
    header = read_header(token_file)
    if header is None or header.tokenizer != tokenizer.fingerprint:
        return []
    try:
        tokens = map_tokens(token_file, header)
    except (OSError, ValueError):  # training has just replaced it
        return []
    starts = [header.count * i // COUNT for i in range(COUNT)]
    texts = [tokenizer.decode(tokens[start : start + WINDOW].tolist()) for start in starts]
    texts[0] = "\n" + texts[0]  # only there the first line is whole
    return [_beginning(text) for text in texts]


def _beginning(text: str) -> str:
    """The beginning of the first whole line that is long enough."""
    lines = text.split("\n")[1:] or [text.partition(" ")[2] or text]
    line = next((line.strip() for line in lines if len(line.strip()) >= MIN_LENGTH), "")
    if len(line) <= MAX_LENGTH:
        return line
    return line[: MAX_LENGTH + 1].rpartition(" ")[0] or line[:MAX_LENGTH]


def _encodes(tokenizer: Tokenizer, text: str) -> bool:
    try:
        return bool(tokenizer.encode(text))
    except (KeyError, ValueError):
        return False
