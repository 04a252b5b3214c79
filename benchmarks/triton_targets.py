"""Compiles every Triton kernel for GPUs that this machine may lack, and shows its resource usage.

    python benchmarks/triton_targets.py

The kernels that an operation launches are compiled instead of run, with every tile configuration
that autotuning tries. Nothing is timed: the floor is the larger of operations / peak and bytes /
bandwidth, at the shapes of configurations D and E (Williams et al., "Roofline", 2009).
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from fastllm.ops import adam_triton, attention_triton, dropout_triton
from fastllm.ops.adam import AdamGroup
from fastllm.ops.attention import AttentionOptions, widest_triton_head
from fastllm.ops.decoder import NO_DROPOUT, Dropout, Embedding, Linear, Mlp, Norm, Rope
from fastllm.ops.embedding_triton import embedding_triton
from fastllm.ops.linear_cross_entropy_triton import linear_cross_entropy_triton
from fastllm.ops.mlp_triton import mlp_triton
from fastllm.ops.norm_triton import norm_triton
from fastllm.ops.rope_triton import rope_triton

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MATRIX_INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")


class Gpu(NamedTuple):
    """A multiprocessor's shared memory, and the peak rates of the data sheet."""

    name: str
    shared: int  # bytes of shared memory
    tflops: dict[str, float]  # dense products, by type
    tbs: float  # TB/s


GPUS = {
    80: Gpu("A100", 164 << 10, {"fp32": 19.5, "tf32": 156, "fp16": 312, "bf16": 312}, 2.0),
    90: Gpu("H100", 228 << 10, {"fp32": 67, "tf32": 495, "fp16": 990, "bf16": 990}, 3.35),
    100: Gpu("B200", 228 << 10, {"fp32": 80, "tf32": 1100, "fp16": 2250, "bf16": 2250}, 8.0),
}
# Limits per multiprocessor; each block loses RESERVED bytes of shared memory.
REGISTERS, WARPS, BLOCKS, RESERVED = 65536, 64, 32, 1024


class Case(NamedTuple):
    """A call of an operation, forward and backward."""

    name: str
    dtype: str
    run: Callable[[], Any]


class Compiled(NamedTuple):
    """A kernel compiled for one GPU."""

    kernel: str
    case: str
    dtype: str
    capability: int
    tiles: dict[str, int]
    warps: int
    registers: int  # per thread
    spilled: int  # bytes per thread
    shared: int  # bytes per block
    matrix_instruction: str | None

    @property
    def occupancy(self) -> float:
        """The fraction of a multiprocessor's warps that can be resident at once."""
        by_registers = REGISTERS // (32 * self.warps * -(-self.registers // 8) * 8)
        by_shared = GPUS[self.capability].shared // (self.shared + RESERVED)
        blocks = min(by_registers, by_shared, BLOCKS, WARPS // self.warps)
        return blocks * self.warps / WARPS


TYPES = {
    "fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16
}  # fmt: skip


def cases() -> Iterator[Case]:
    """Every operation, in every type; a few rows suffice, because nothing is computed.

    fp16 differs from bf16 only in the name of an instruction, so it has fewer cases.
    """

    def random(dtype: str, *shape: int) -> Tensor:
        return torch.randn(shape).to(TYPES[dtype]).requires_grad_()

    def attention(dtype: str, D: int, kv_heads: int, *settings: Any) -> None:
        attention_triton.dot_precision = lambda x: "tf32" if dtype == "tf32" else "ieee"
        # Strided like the output of one qkv projection.
        heads = random(dtype, 1, 128, 2 + 2 * kv_heads, D).transpose(1, 2)
        qkv = heads.split((2, kv_heads, kv_heads), 1)
        attention_triton.attention_triton(*qkv, AttentionOptions(*settings)).sum().backward()

    dropped = torch.zeros(128, 128, dtype=torch.bool), True, Dropout(0.1, 5)
    everything = *dropped, 50, 0.3, 50.0
    for dtype in TYPES:
        for name, D, kv_heads, *settings in (
            ("D=64", 64, 2, None, True),
            ("D=64, dropout", 64, 2, None, *dropped[1:]),
            ("D=64, dropout, mask", 64, 2, *dropped),
            ("D=32, dropout, mask", 32, 2, *dropped),
            ("D=128, dropout, mask", 128, 2, *dropped),
            ("D=64, shared heads", 64, 1, None, True),
            ("D=32, everything", 32, 1, *everything),
            ("D=64, everything", 64, 1, *everything),
            ("D=128, everything", 128, 1, *everything),
            ("D=256, shared heads, window", 256, 1, None, True, NO_DROPOUT, 50),
            ("D=256, everything", 256, 1, *everything),
        ):
            if widest_triton_head(TYPES[dtype]) < D or (dtype == "fp16" and D != 64):
                continue
            yield Case(name, dtype, partial(attention, dtype, D, kv_heads, *settings))

    def mlp(dtype: str, dropout_p: float, H: int = 384, gated: bool = False) -> None:
        I = 4 * H
        fc1 = Linear(random(dtype, I, H), random(dtype, I))
        fc2 = Linear(random(dtype, H, I), random(dtype, H))
        record = Mlp(fc1, fc2, hidden_dropout=Dropout(dropout_p, 5))
        if gated:
            # Of the activations, the exact gelu needs the most registers.
            record = record._replace(up=Linear(random(dtype, I, H), None))
        mlp_triton(random(dtype, 64, H), record, None).sum().backward()

    def norm(dtype: str, H: int) -> None:
        record = Norm(random(dtype, H), random(dtype, H), 1e-5)
        norm_triton(random(dtype, 8, H), record, random(dtype, 8, H)).sum().backward()

    def rope(dtype: str, D: int, R: int, interleaved: bool) -> None:
        record = Rope(torch.zeros(8, R), interleaved)
        rope_triton(random(dtype, 1, 2, 8, D), record).sum().backward()

    def embedding(dtype: str) -> None:
        ids = torch.zeros(2, 8, dtype=torch.long)
        tables = random(dtype, 66, 384), random(dtype, 8, 384)
        embedding_triton(ids, Embedding(*tables, dropout=Dropout(0.1, 5)))

    def cross_entropy(dtype: str, softcap: float | None) -> None:
        head, targets = Linear(random(dtype, 50257, 16), None), torch.zeros(2, dtype=torch.long)
        linear_cross_entropy_triton(random(dtype, 2, 16), head, targets, -100, softcap)

    def dropout(dtype: str) -> None:
        dropout_triton.dropout_triton(random(dtype, 1024), 0.1, 5, 0)

    for dtype in ("fp32", "bf16", "fp16"):
        yield Case("H=384, dropout", dtype, partial(mlp, dtype, 0.1))
        yield Case("H=384, gated, dropout", dtype, partial(mlp, dtype, 0.1, gated=True))
        yield Case("H=384", dtype, partial(norm, dtype, 384))
        if dtype != "fp16":
            yield Case("H=384", dtype, partial(mlp, dtype, 0.0))
            yield Case("H=8192", dtype, partial(norm, dtype, 8192))
        yield Case("D=64", dtype, partial(rope, dtype, 64, 64, False))
        yield Case("D=80, partial, interleaved", dtype, partial(rope, dtype, 80, 32, True))
        yield Case("dropout", dtype, partial(embedding, dtype))
        yield Case("V=50257", dtype, partial(cross_entropy, dtype, None))
        yield Case("V=50257, capped", dtype, partial(cross_entropy, dtype, 30.0))
        yield Case("", dtype, partial(dropout, dtype))

    yield Case("H=2048, dropout", "bf16", partial(mlp, "bf16", 0.1, 2048))

    def adam(decoupled: bool) -> None:
        lists = [[torch.ones(2000)] for _ in range(4)]
        group = AdamGroup(*lists, [torch.zeros(())], 1e-3, 0.9, 0.999, 1e-8, 0.0)
        adam_triton.adam_triton([group], decoupled, 1.0)

    yield Case("Adam", "fp32", partial(adam, False))
    yield Case("AdamW", "fp32", partial(adam, True))


class Driver:
    """Stands in for the GPU that Triton compiles for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all(capability: int) -> list[Compiled]:
    """Compiles every kernel and configuration of `cases` for one GPU. Patches Triton globally."""
    triton.runtime.driver.set_active(Driver(capability))
    results: list[Compiled] = []
    current = Case("", "", lambda: None)
    compile_one = JITFunction.run

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool = False, **keywords: Any) -> Any:
        kernel = compile_one(self, *arguments, grid=grid, warmup=True, **keywords)
        registers, spilled = resources(kernel.asm["cubin"])
        tiles = {name: keywords[name] for name in keywords if name.startswith("BLOCK_")}
        results.append(
            Compiled(
                self.__name__,
                current.name,
                current.dtype,
                capability,
                tiles,
                kernel.metadata.num_warps,
                registers,
                spilled,
                kernel.metadata.shared,
                next((name for name in MATRIX_INSTRUCTIONS if name in kernel.asm["ptx"]), None),
            )
        )
        return kernel

    def run_every_config(self: Any, *arguments: Any, grid: Any, **keywords: Any) -> None:
        self.nargs = dict(zip(self.arg_names, arguments, strict=False))
        for config in self.prune_configs(keywords):
            self.fn.run(*arguments, grid=grid, **keywords, **config.all_kwargs())

    JITFunction.run, Autotuner.run = run, run_every_config
    for current in cases():
        current.run()
    return results


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes per thread that spill to memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(BIN / "cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def floors(kernel: str, dtype: str) -> tuple[float, float]:
    """Operations and bytes at configuration D; E for cross-entropy, DistilGPT-2 for Adam.

    Attention is causal, which halves its products.
    """
    size = 4 if dtype in ("fp32", "tf32") else 2
    B, N, S, D, H, I, R, V = 8, 6, 256, 64, 384, 1536, 2048, 50257
    score = B * N * S * S * D  # operations of one causal product
    row, hidden, parameters = R * H * size, R * I * size, 82_000_000
    return {
        "attention_fwd": (2 * score, 4 * row),
        "attention_bwd_q": (3 * score, 6 * row),
        "attention_bwd_kv": (4 * score, 6 * row),
        "mlp_product": (2 * R * H * I, row + H * I * size + 2 * hidden),
        "mlp_elements": (0, 3 * hidden),
        "norm_fwd": (0, 4 * row),
        "norm_bwd": (0, 3 * row),
        "rope_kernel": (0, 2 * row),
        "embedding_fwd": (0, 2 * row),
        "dropout_kernel": (0, 2 * row),
        "cross_entropy": (0, 3 * 512 * V * size),
        "adam_norms": (0, 4 * parameters),
        "adam_update": (0, 28 * parameters),
    }[kernel]


def table(compiled: list[Compiled]) -> Iterator[str]:
    """A Markdown table: for each kernel and type, the maximum over cases and tiles on each GPU."""
    names = ", ".join(gpu.name for gpu in GPUS.values())
    yield f"{len(compiled)} compiled. Three numbers in a cell are for {names}.\n"
    yield (
        "| kernel | type | compiled for each | registers | spilled | shared KiB | occupancy, % | "
        "matrix instructions | floor, µs |"
    )
    yield "| --- | --- | ---: | --- | --- | --- | --- | --- | --- |"
    for kernel, dtype in sorted({(each.kernel, each.dtype) for each in compiled}):
        groups = [
            [c for c in compiled if (c.kernel, c.dtype, c.capability) == (kernel, dtype, sm)]
            for sm in GPUS
        ]
        cells = [
            [str(max(each.registers for each in group)) for group in groups],
            [str(max(each.spilled for each in group)) for group in groups],
            [f"{max(each.shared for each in group) / 1024:.0f}" for group in groups],
            [_range([round(100 * each.occupancy) for each in group]) for group in groups],
            [_instruction(group) for group in groups],
            [_floor(kernel, dtype, gpu) for gpu in GPUS.values()],
        ]
        columns = [cell[0] if len(set(cell)) == 1 else ", ".join(cell) for cell in cells]
        yield f"| `{kernel}` | {dtype} | {len(groups[0])} | {' | '.join(columns)} |"


def _range(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def _instruction(group: list[Compiled]) -> str:
    """The newest instruction in the group: small tiles may use an older one."""
    found = {each.matrix_instruction for each in group}
    return next((name for name in MATRIX_INSTRUCTIONS if name in found), "-")


def _floor(kernel: str, dtype: str, gpu: Gpu) -> str:
    operations, size = floors(kernel, dtype)
    return f"{max(operations / gpu.tflops[dtype], size / gpu.tbs) / 1e6:.1f}"


def main() -> None:
    """Prints the table, or every kernel with --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one object for each kernel")
    arguments = parser.parse_args()
    # One process per target: within a process Triton compiles a kernel only once.
    with ProcessPoolExecutor(2, get_context("spawn"), max_tasks_per_child=1) as processes:
        compiled = [each for part in processes.map(compile_all, GPUS) for each in part]
    if arguments.json:
        print(json.dumps([each._asdict() for each in compiled]))
    else:
        print("\n".join(table(compiled)))


if __name__ == "__main__":
    main()
