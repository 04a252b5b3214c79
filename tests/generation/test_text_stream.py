import itertools
import random

import pytest
import torch

from fastllm import DecoderModel, SimpleCharacterTokenizer
from fastllm.generation.decoding import generate_batch, generate_tokens
from fastllm.generation.text_stream import (
    Prompt,
    TextStream,
    encode_prompt,
    generate_text,
    generate_texts,
)
from fastllm.ops.sampling import Sampling
from fastllm.tokenization import SubwordTokenizer, Tokenizer
from tests.tokenizer_kinds import TEXT, TOKENIZERS, with_special_tokens

pytest.importorskip("tokenizers", reason="needs the tokenizers library ([hf])")

TOKENIZER = SimpleCharacterTokenizer(["abcdefghij"])


def test_same_seed_same_text(model: DecoderModel) -> None:
    texts = ["".join(generate_text(model, TOKENIZER, "abc", 40, seed=s)) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_text_ends_before_the_stop_text(model: DecoderModel) -> None:
    text = "".join(generate_text(model, TOKENIZER, "ab", 80, seed=5))
    for length in (1, 2, 3):
        stop = text[30 : 30 + length]
        stopped = "".join(generate_text(model, TOKENIZER, "ab", 80, stop, seed=5))
        assert stopped == text[: text.index(stop)]
    assert "".join(generate_text(model, TOKENIZER, "ab", 80, "zz", seed=5)) == text


def test_pieces_of_subword_text_join_to_the_whole() -> None:
    """Characters that span tokens are whole, and spaces between words are kept."""
    text = "Grüße an 世界 and 🙂 the wonderful words of the world. " * 30
    for kind in ("bpe", "wordpiece"):
        tokenizer = SubwordTokenizer.train([text], kind, 300)  # type: ignore[arg-type]
        torch.manual_seed(0)
        model = DecoderModel(tokenizer.vocab_size, 8, 1, 2, 64).eval()
        prompt = tokenizer.encode("the")
        tokens = list(generate_tokens(model, prompt, 200, seed=1))
        pieces = list(generate_text(model, tokenizer, "the", 200, seed=1))
        assert "the" + "".join(pieces) == tokenizer.decode(prompt + tokens)
        assert len(pieces) > 50


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]()


def test_prompt_and_continuation_join_to_the_text_of_all_tokens(tokenizer: Tokenizer) -> None:
    """For prompts that end within a word, after a space or a line, and within a character."""
    source = random.Random(7)
    for _ in range(200):
        start = source.randrange(len(TEXT) - 200)
        given: str | list[int] = TEXT[start : start + source.randint(1, 60)]
        if source.random() < 0.3:
            given = [source.randrange(tokenizer.vocab_size) for _ in range(source.randint(1, 30))]
        prompt = encode_prompt(tokenizer, given)
        tokens = [source.randrange(tokenizer.vocab_size) for _ in range(source.randint(0, 30))]
        if isinstance(given, str) and source.random() < 0.7:
            tokens = tokenizer.encode(TEXT[start + len(given) : start + len(given) + 60])
        whole = tokenizer.decode(prompt.tokens + tokens)
        for echo in (True, False):
            stream = TextStream(tokenizer, [], prompt, echo)
            text = "".join([stream.push(token) for token in tokens]) + stream.end()
            if echo:
                assert prompt.text + text == whole
            elif whole.startswith(prompt.given):
                assert prompt.given + text == whole
            elif not isinstance(given, str):
                assert prompt.text + text == whole


def test_a_prompt_may_end_with_the_space_that_its_tokens_lose() -> None:
    tokenizer = TOKENIZERS["wordpiece"]()
    for given in ("Romeo", "Romeo ", "the\n\nRomeo "):
        prompt = encode_prompt(tokenizer, given)
        shown = {
            stop: text_of(tokenizer, prompt, tokenizer.encode("would smell"), stop)
            for stop in ("", " would", " ")
        }
        space = "" if given.endswith(" ") else " "
        assert shown[""] == space + "would smell"
        assert shown[" would"] == ""
        assert shown[" "] == ("" if space else "would")  # the prompt's own space is no stop text


def text_of(tokenizer: Tokenizer, prompt: Prompt, tokens: list[int], stop: str) -> str:
    stream, text = TextStream(tokenizer, [stop] if stop else [], prompt), ""
    for token in tokens:
        text += stream.push(token)
        if stream.stopped:
            return text
    return text + stream.end()


def test_streamed_text_is_never_taken_back(tokenizer: Tokenizer) -> None:
    """For sensible and random tokens, and for any stop texts."""
    source = random.Random(5)
    sensible = tokenizer.encode(TEXT)
    for _ in range(300):
        tokens = [source.randrange(tokenizer.vocab_size) for _ in range(source.randrange(60))]
        at = source.randrange(len(sensible) - 60)
        tokens = source.choice([tokens, sensible[at : at + 40], tokens + sensible[at : at + 20]])
        whole = tokenizer.decode(tokens)
        stream = TextStream(tokenizer)
        pieces = [stream.push(token) for token in tokens]
        assert "".join(pieces) + stream.end() == whole
        assert stream.length == stream.shown == len(whole) and not stream.stopped
        for number in (1, 2, 4):
            stops = [
                whole[at : at + source.randint(1, 5)] or "x"
                for at in (source.randrange(len(whole) + 1) for _ in range(number))
            ]
            ends = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops]
            expected = whole[: min((e for e in ends if e[1] >= 0), default=(0, len(whole)))[1]]
            stream, shown = TextStream(tokenizer, stops), ""
            for token in tokens:
                shown += stream.push(token)
                assert expected.startswith(shown) and stream.shown == len(shown)
                if stream.stopped:
                    break
            else:
                shown += stream.end()
            assert shown == expected


def test_empty_prompt_and_unknown_characters(model: DecoderModel) -> None:
    with pytest.raises(ValueError, match="the prompt is empty"):
        list(generate_text(model, TOKENIZER, "", 5))
    with pytest.raises(KeyError, match="Character 'z' not found"):
        generate_text(model, TOKENIZER, "abz", 5)


def test_texts_are_the_same_in_batches_of_any_size(model: DecoderModel) -> None:
    prompts = ["a", "bcd", "abcdefghij", "a", "jj"]
    settings = Sampling(0.8, top_k=7), 3
    expected = [
        "".join(
            generate_text(model, TOKENIZER, prompt, 30, "b", temperature=0.8, top_k=7, seed=seed)
        )
        for seed, prompt in enumerate(prompts, 3)
    ]
    for size in (1, 2, 5, 16):
        texts = generate_texts(model, TOKENIZER, prompts, 30, "b", *settings, batch_size=size)
        assert list(texts) == expected
    assert list(generate_texts(model, TOKENIZER, prompts, 0)) == [""] * 5


@pytest.mark.parametrize("kind", ["bpe", "byte_fallback"])
def test_special_tokens_surround_the_text_and_are_not_part_of_it(kind: str) -> None:
    """What the tokens between them decode to is the text, whatever the model sees before it."""
    plain = TOKENIZERS[kind]()
    assert isinstance(plain, SubwordTokenizer)
    torch.manual_seed(0)
    model = DecoderModel(plain.vocab_size, 32, 2, 2, 64).eval()
    for p in model.parameters():  # the logits of an untrained model are nearly uniform
        p.data *= 3
    start = [7, 3]
    prompts = ["the wor", "a", "rose by", ""]
    drawn = [
        list(generate_tokens(model, [*start, *plain.encode(prompt)], 40, seed=b))
        for b, prompt in enumerate(prompts)
    ]
    end = drawn[0][20], drawn[1][9]
    tokenizer = with_special_tokens(plain, start, end)
    expected = []
    for prompt, tokens in zip(prompts, drawn, strict=True):
        kept = list(itertools.takewhile(lambda token: token not in end, tokens))
        expected.append(plain.decode(plain.encode(prompt) + kept))
    assert len(expected[1]) < len(plain.decode(plain.encode(prompts[1]) + drawn[1]))
    for b, prompt in enumerate(prompts):
        pieces = generate_text(model, tokenizer, prompt, 40, echo=True, seed=b)
        assert "".join(pieces) == expected[b]
    assert list(generate_texts(model, tokenizer, prompts, 40, echo=True)) == expected
    # Given as ids, a prompt is taken as it is.
    assert encode_prompt(tokenizer, [5]).tokens == [5]


def test_a_batch_stops_when_all_of_its_texts_have_ended(model: DecoderModel) -> None:
    tokenizer = SimpleCharacterTokenizer(["abcdefghij"])
    steps = list(generate_batch(model, [[0], [1]], 60, Sampling(), 3))
    tokenizer.end_tokens = frozenset((steps[5][0], steps[9][1]))
    decoded: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda *_: decoded.append(1))
    try:
        list(generate_texts(model, tokenizer, ["a", "b"], 60, seed=3))
    finally:
        hook.remove()
    # Both sequences in every step; neither text is longer than to its marked token.
    assert 2 <= len(decoded) <= 2 * 10
