from pathlib import Path

import pytest

from fastllm import SimpleCharacterTokenizer
from fastllm.data.sources import find_texts
from fastllm.data.tokens import map_texts
from fastllm.serving.examples import COMMON, COUNT, MAX_LENGTH, example_prompts
from fastllm.tokenization import SubwordTokenizer, Tokenizer

LINES = "".join(f"Line {i} of a text that is long enough to be cut.\n\nshort\n" for i in range(400))


@pytest.mark.parametrize("kind", ["char", "bpe", "wordpiece"])
@pytest.mark.parametrize("text", [LINES, "ACGT" * 3000, "世界和平" * 3000, "a b\n" * 900])
def test_examples_begin_lines_of_the_text(tmp_path: Path, kind: str, text: str) -> None:
    tokenizer: Tokenizer
    if kind == "char":
        tokenizer = SimpleCharacterTokenizer([text])
    else:
        tokenizer = SubwordTokenizer.train([text], kind, 300)
    file = tmp_path / "text.txt"
    file.write_text(text)
    map_texts(find_texts(file), tokenizer, tmp_path / "tokens.bin")
    examples = example_prompts(tmp_path, tokenizer)
    assert len(set(examples)) == len(examples) <= COUNT
    for example in examples:
        assert 0 < len(example) <= MAX_LENGTH and tokenizer.encode(example)
    if text is LINES and kind != "wordpiece":  # whose tokens hold no line breaks
        assert len(examples) == COUNT
        assert all(f"\n{example} " in "\n" + text for example in examples)


def test_without_the_text_examples_are_common_ones_that_can_be_encoded(tmp_path: Path) -> None:
    assert example_prompts(tmp_path, SimpleCharacterTokenizer(["The end"])) == ["The"]
    assert example_prompts(tmp_path, SimpleCharacterTokenizer(["xyz"])) == []
    assert example_prompts(tmp_path, SubwordTokenizer.train([LINES], "bpe", 300)) == [*COMMON]
    (tmp_path / "tokens.bin").write_bytes(b"damaged")
    assert example_prompts(tmp_path, SimpleCharacterTokenizer(["The end"])) == ["The"]
