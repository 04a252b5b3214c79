"""A step of generation; `python benchmarks/generation.py` has whole texts against more rivals."""

from collections.abc import Callable

import pytest
import torch

from fastllm.benchmarking.shapes import CONFIGS, Letter
from fastllm.benchmarking.steps import build_fastllm
from fastllm.generation.decoding import ModuleDecoding
from fastllm.ops.decode import Decoding, PackedDecoder


# pytest benchmarks/bench_decode.py --benchmark-only
@pytest.mark.parametrize("B", [1, 16])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("letter", CONFIGS)
def test_decode(race: Callable[..., None], letter: Letter, precision: str, B: int) -> None:
    """Half of the window, then one token at a time, against the modules with their caches."""
    c = CONFIGS[letter]
    model = build_fastllm(c).eval()
    decoder = model.record(c.S)
    assert not isinstance(decoder, str), decoder
    ours = Decoding(PackedDecoder(decoder, precision), B)
    modules = ModuleDecoding(model, B, use_cache=True, precision="fp32")
    prompts = torch.randint(c.V, (B, c.S // 2)).tolist()
    results = [decoding.extend(prompts) for decoding in (ours, modules)]
    error = (results[0] - results[1]).norm() / results[1].norm()
    assert error <= {"fp32": 1e-5, "bf16": 0.02, "int8": 0.1}[precision], f"{error:.1e}"

    def step(decoding: Decoding | ModuleDecoding) -> None:
        if decoding.lengths[0] == c.S:
            for b in range(B):
                decoding.clear(b)
            decoding.extend(prompts)
        decoding.extend([[1]] * B)

    race(
        f"decode {letter} {precision} B={B}",
        lambda: step(ours),
        {"eager": lambda: step(modules)},
    )
