"""Training steps and generation of SmolLM2's, Llama's and Gemma 3's shapes, against transformers.

    pip install '.[finetune]'
    python benchmarks/architectures.py F G H

F is SmolLM2-135M, G a Llama of the width of nanoGPT's "baby GPT", H Gemma 3 270M; weights are
random. A step is the loss, its gradients and AdamW, in turns; its FLOPs are those of the products,
attention in full, the backward as two forwards. Generation is one stream after a prompt of 128
tokens, against the time in which its weights can be read from memory.
"""

import sys
from collections.abc import Callable
from typing import Any, Literal

import torch

from fastllm import DecoderModel
from fastllm.benchmarking.machine import measure_bandwidth, measure_peak
from fastllm.benchmarking.timing import time_call, time_in_turns
from fastllm.device import autocast
from fastllm.models.architectures import gemma3, llama
from fastllm.models.config import DecoderConfig
from fastllm.ops.decode import Decoding, PackedDecoder
from fastllm.ops.decoder import Decoder
from fastllm.optim import AdamW
from fastllm.threads import set_threads

Letter = Literal["F", "G", "H"]
SECONDS = 15
PRECISIONS = ("fp32", "bf16", "int8", "int4")

# The configuration, and sequences and tokens of a batch.
SHAPES: dict[Letter, tuple[DecoderConfig, int, int]] = {
    "F": (
        llama(
            vocab_size=49152, hidden_size=576, num_layers=30, num_heads=9, num_kv_heads=3,
            mlp_intermediate_size=1536, tie_word_embeddings=True,
        ), 2, 256,
    ),
    "G": (
        llama(
            vocab_size=66, hidden_size=384, num_layers=6, num_heads=6, num_kv_heads=2,
            mlp_intermediate_size=1024,
        ), 8, 256,
    ),
    "H": (
        gemma3(
            vocab_size=262144, hidden_size=640, num_layers=18, num_heads=4, num_kv_heads=1,
            head_dim=256, mlp_intermediate_size=2048,
        ), 1, 256,
    ),
}  # fmt: skip


def weights_read(c: DecoderConfig) -> int:
    """Elements of the linear layers, each of which a token reads once."""
    heads = (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    gated = c.mlp_intermediate_size * 3
    return c.num_layers * c.hidden_size * (heads + gated) + c.vocab_size * c.hidden_size


def bytes_read(c: DecoderConfig, precision: str) -> float:
    """Of the weights, for a token."""
    count, head = weights_read(c), c.vocab_size * c.hidden_size
    size = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 5 / 8}[precision]
    return size * (count - head) + (1.0 if precision == "int4" else size) * head


def flops(c: DecoderConfig, B: int, S: int) -> int:
    scores = 4 * B * S * S * c.num_heads * c.head_dim
    return 3 * (2 * B * S * weights_read(c) + c.num_layers * scores)


def rival(c: DecoderConfig) -> Any:
    """transformers' model of the same shape."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": c.vocab_size, "hidden_size": c.hidden_size, "head_dim": c.head_dim,
        "num_hidden_layers": c.num_layers, "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads, "intermediate_size": c.mlp_intermediate_size,
        "tie_word_embeddings": c.tie_word_embeddings,
    }  # fmt: skip
    if c.window:
        return Gemma3ForCausalLM(Gemma3TextConfig(**settings, sliding_window=c.window))
    return LlamaForCausalLM(LlamaConfig(**settings))


def step_of(
    loss: Callable[[torch.Tensor], torch.Tensor], optimizer: Any, precision: str
) -> Callable[[torch.Tensor], None]:
    def step(ids: torch.Tensor) -> None:
        with autocast("cpu", precision):
            value = loss(ids)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_training(letter: Letter, threads: int) -> None:
    c, B, S = SHAPES[letter]
    ours, theirs = DecoderModel.from_config(c), rival(c)
    optimizers = (
        AdamW(ours.parameters(), lr=1e-4),
        torch.optim.AdamW(theirs.parameters(), fused=True),
    )
    for precision in ("fp32", "bf16"):
        runs = {
            "fastllm": step_of(lambda ids: ours.loss(ids, ids), optimizers[0], precision),
            "transformers": step_of(
                lambda ids: theirs(input_ids=ids, labels=ids).loss, optimizers[1], precision
            ),
        }
        peak = measure_peak(threads, precision)  # type: ignore[arg-type]
        times = time_in_turns(runs, SECONDS, lambda: torch.randint(c.vocab_size, (B, S)))
        for name, ms in times.items():
            share = flops(c, B, S) / ms / 1e6 / peak
            print(
                f"{letter}  step {precision}  {name:12} {ms:8.0f} ms  {share:5.0%} of peak",
                flush=True,
            )


@torch.no_grad()
def measure_generation(letter: Letter, threads: int) -> None:
    c, _, _ = SHAPES[letter]
    decoder = DecoderModel.from_config(c).eval().record(c.max_seq_len)
    assert isinstance(decoder, Decoder), decoder
    bandwidth = measure_bandwidth(threads)
    prompt = torch.randint(c.vocab_size, (128,)).tolist()
    for precision in PRECISIONS:
        decoding = Decoding(PackedDecoder(decoder, precision), 1)
        prefills, tokens = [], []
        for _ in range(5):
            decoding.clear(0)
            prefills.append(time_call(decoding.extend, [prompt]))
            tokens += [time_call(decoding.extend, [[5]]) for _ in range(20)]
        token = min(tokens)
        share = bytes_read(c, precision) / bandwidth / 1e9 / token
        print(
            f"{letter}  generation {precision}  {1 / token:5.0f} tokens/s, {share:4.0%} of the "
            f"bandwidth limit; prefill of 128 {1000 * min(prefills):4.0f} ms",
            flush=True,
        )


def main(letters: list[Letter]) -> None:
    threads = set_threads()
    torch.manual_seed(0)
    for letter in letters:
        measure_training(letter, threads)
        measure_generation(letter, threads)


if __name__ == "__main__":
    main(sys.argv[1:] or ["F", "G", "H"])  # type: ignore[arg-type]
