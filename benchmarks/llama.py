"""Prompts and tokens per second of generation, against llama.cpp with the same weights.

    pip install llama-cpp-python gguf tokenizers
    python benchmarks/llama.py C E F
    OMP_NUM_THREADS=1 python benchmarks/llama.py C E F

Both take turns at adding tokens to a prompt of a quarter of the window; the fastest round counts.
F is SmolLM2-135M's shape with a prompt of 128 tokens.
With OMP_NUM_THREADS=1 the time is that of the core, so that other programs matter less.
fastllm samples its tokens, and llama.cpp is given them, as in its own llama-bench. The weights are
exported by fastllm in fp32, and rounded by llama.cpp's quantize.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import llama_cpp
import torch
from architectures import SHAPES

from fastllm.benchmarking.shapes import CONFIGS
from fastllm.generation.decoding import generate_tokens
from fastllm.integrations.gguf import save_gguf
from fastllm.models.decoder import DecoderModel
from fastllm.models.gpt2 import convert_to_gpt2
from fastllm.threads import set_threads
from fastllm.tokenization import SimpleCharacterTokenizer

ROUNDS = 5
NEW_TOKENS = 40  # after the first, whose time includes the prompt
TYPES = {
    "F32": llama_cpp.LLAMA_FTYPE_ALL_F32,
    "BF16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
}
PRECISIONS = ("fp32", "bf16", "int8", "int4")


def now() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Seconds(NamedTuple):
    """Of the prompt with its first new token, and of the other new tokens."""

    prompt: float
    tokens: float


def seconds_of_fastllm(model: DecoderModel, prompt: list[int], precision: str) -> Seconds:
    start = now()
    tokens = generate_tokens(model, prompt, 1 + NEW_TOKENS, 0.8, precision=precision)
    next(tokens)
    first = now()
    assert sum(1 for _ in tokens) == NEW_TOKENS
    return Seconds(first - start, now() - first)


def seconds_of_llama(model: llama_cpp.Llama, prompt: list[int]) -> Seconds:
    model.reset()
    start = now()
    model.eval(prompt)
    first = now()
    for token in (prompt * NEW_TOKENS)[:NEW_TOKENS]:
        model.eval([token])
    return Seconds(first - start, now() - first)


def make_model(letter: str) -> tuple[DecoderModel, int]:
    """A random model, and the length of its prompt."""
    if letter in SHAPES:
        config = SHAPES[letter][0]  # type: ignore[index]
        return DecoderModel.from_config(config).eval(), 128
    c = CONFIGS[letter]  # type: ignore[index]
    # GPT-2's format would express a bias of the head by a greater width.
    model = DecoderModel(c.V, c.H, c.L, c.N, c.S, lm_head_bias=False)
    return convert_to_gpt2(model).eval(), c.S // 4


@contextmanager
def rivals(model: DecoderModel, threads: int) -> Iterator[dict[str, llama_cpp.Llama]]:
    """llama.cpp's models of these weights, by type."""
    # Only their number matters, and none of them is a surrogate.
    characters = "".join(map(chr, range(0x10000, 0x10000 + model.vocab_size - 1)))
    with TemporaryDirectory() as folder:
        exported = Path(folder, "F32.gguf")
        save_gguf(model, SimpleCharacterTokenizer([characters]), exported, "benchmark")
        loaded = {}
        for name, type_ in TYPES.items():
            file = exported.with_stem(name)
            if file != exported:
                settings = llama_cpp.llama_model_quantize_default_params()
                settings.ftype = type_
                paths = str(exported).encode(), str(file).encode()
                assert llama_cpp.llama_model_quantize(*paths, settings) == 0
            loaded[name] = llama_cpp.Llama(
                str(file),
                n_ctx=model.max_seq_len,
                n_threads=threads,
                n_threads_batch=threads,
                verbose=False,
            )
        yield loaded


@torch.no_grad()
def check_parity(model: DecoderModel, rival: llama_cpp.Llama, prompt: list[int]) -> None:
    """The next token's probabilities agree as well as fp16 tables and caches allow."""
    ours = model(torch.tensor([prompt]))[0, -1].log_softmax(-1)
    rival.reset()
    rival.eval(prompt)
    logits = llama_cpp.llama_get_logits(rival.ctx)[: model.vocab_size]
    error = (torch.tensor(logits).log_softmax(-1) - ours).abs().max()
    assert error < 0.02, f"llama.cpp's log-probabilities differ by {error:.3f}"


def main(letters: list[str]) -> None:
    threads = set_threads()
    torch.manual_seed(0)
    for letter in letters:
        model, length = make_model(letter)
        prompt = torch.randint(model.vocab_size, (length,)).tolist()
        with rivals(model, threads) as loaded:
            check_parity(model, loaded["F32"], prompt)
            for precision, (type_, rival) in zip(PRECISIONS, loaded.items(), strict=True):
                rounds: dict[str, list[Seconds]] = {}
                for _ in range(1 + ROUNDS):  # the first warms up, and is never the fastest
                    ours = seconds_of_fastllm(model, prompt, precision)
                    rounds.setdefault(f"fastllm {precision}", []).append(ours)
                    theirs = seconds_of_llama(rival, prompt)
                    rounds.setdefault(f"llama.cpp {type_}", []).append(theirs)
                for name, all_seconds in rounds.items():
                    prompts, tokens = (min(each) for each in zip(*all_seconds, strict=True))
                    print(
                        f"{letter}  {name:16}{NEW_TOKENS / tokens:10,.0f} tokens/s, "
                        f"prompt of {length} {1000 * prompts:8,.1f} ms",
                        flush=True,
                    )


if __name__ == "__main__":
    main(sys.argv[1:] or ["C", "E", "F"])
