"""Compiles every Triton kernel for GPUs that need not be there, and tells what it takes of them.

    python benchmarks/triton_targets.py

What an operation launches is compiled instead of run, with every configuration of tiles that it
would measure. Nothing here is a timing: the floor is the larger of operations / peak and bytes /
bandwidth, at the shapes of `fastllm.bench`'s configurations D and E (Williams et al., "Roofline",
2009).
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
from fastllm.ops.embedding import Settings
from fastllm.ops.embedding_triton import embedding_triton
from fastllm.ops.layer_norm_triton import layer_norm_triton
from fastllm.ops.linear_cross_entropy_triton import linear_cross_entropy_triton
from fastllm.ops.mlp_triton import mlp_triton
from fastllm.ops.parameters import Linear, Norm

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MATRIX_INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")


class Gpu(NamedTuple):
    """What a multiprocessor has, and the data sheet's limits."""

    name: str
    shared: int  # bytes of shared memory
    tflops: dict[str, float]  # dense products, by type
    tbs: float  # TB/s


GPUS = {
    80: Gpu("A100", 164 << 10, {"fp32": 19.5, "tf32": 156, "fp16": 312, "bf16": 312}, 2.0),
    90: Gpu("H100", 228 << 10, {"fp32": 67, "tf32": 495, "fp16": 990, "bf16": 990}, 3.35),
    100: Gpu("B200", 228 << 10, {"fp32": 80, "tf32": 1100, "fp16": 2250, "bf16": 2250}, 8.0),
}
REGISTERS, WARPS, BLOCKS, RESERVED = 65536, 64, 32, 1024  # of a multiprocessor; shared, of a block


class Case(NamedTuple):
    """A call of an operation, forward and backward."""

    name: str
    dtype: str
    run: Callable[[], Any]


class Compiled(NamedTuple):
    """A kernel as it is for one GPU."""

    kernel: str
    case: str
    dtype: str
    capability: int
    tiles: dict[str, int]
    warps: int
    registers: int  # of a thread
    spilled: int  # bytes of a thread
    shared: int  # bytes of a block
    matrix_instruction: str | None

    @property
    def occupancy(self) -> float:
        """The part of a multiprocessor's warps that can be there at a time."""
        by_registers = REGISTERS // (32 * self.warps * -(-self.registers // 8) * 8)
        by_shared = GPUS[self.capability].shared // (self.shared + RESERVED)
        blocks = min(by_registers, by_shared, BLOCKS, WARPS // self.warps)
        return blocks * self.warps / WARPS


TYPES = {
    "fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16
}  # fmt: skip


def cases() -> Iterator[Case]:
    """Every operation, in every type; few rows, as nothing is computed.

    What fp16 and bf16 differ by is the name of an instruction, so fp16 has fewer cases.
    """

    def random(dtype: str, *shape: int) -> Tensor:
        return torch.randn(shape).to(TYPES[dtype]).requires_grad_()

    def attention(dtype: str, D: int, dropout_p: float, masked: bool) -> None:
        attention_triton.dot_precision = lambda x: "tf32" if dtype == "tf32" else "ieee"
        # As projected together: a head's rows lie apart.
        qkv = random(dtype, 1, 128, 3, 2, D).permute(2, 0, 3, 1, 4)
        mask = torch.zeros(128, 128, dtype=torch.bool) if masked else None
        attention_triton.attention_triton(*qkv, mask, True, dropout_p, 5).sum().backward()

    for dtype in TYPES:
        for name, D, dropout_p, masked in (
            ("D=64", 64, 0.0, False),
            ("D=64, dropout", 64, 0.1, False),
            ("D=32, dropout, mask", 32, 0.1, True),
            ("D=128, dropout", 128, 0.1, False),
        ):
            if attention_triton.widest_head(TYPES[dtype]) < D or (dtype == "fp16" and D != 64):
                continue
            yield Case(name, dtype, partial(attention, dtype, D, dropout_p, masked))

    def mlp(dtype: str, dropout_p: float) -> None:
        H, I = 384, 1536
        fc1 = Linear(random(dtype, I, H), random(dtype, I))
        fc2 = Linear(random(dtype, H, I), random(dtype, H))
        x = random(dtype, 64, H)
        mlp_triton(x, fc1, fc2, "gelu", dropout_p, 5, None, True).sum().backward()

    def layer_norm(dtype: str, H: int) -> None:
        norm = Norm(random(dtype, H), random(dtype, H), 1e-5)
        layer_norm_triton(random(dtype, 8, H), norm, random(dtype, 8, H)).sum().backward()

    def embedding(dtype: str) -> None:
        ids = torch.zeros(2, 8, dtype=torch.long)
        settings = Settings(1.0, None, 0.1, 5)
        embedding_triton(ids, random(dtype, 66, 384), random(dtype, 8, 384), settings)

    def cross_entropy(dtype: str) -> None:
        head, targets = Linear(random(dtype, 50257, 16), None), torch.zeros(2, dtype=torch.long)
        linear_cross_entropy_triton(random(dtype, 2, 16), head, targets, -100)

    def dropout(dtype: str) -> None:
        dropout_triton.dropout_triton(random(dtype, 1024), 0.1, 5, 0)

    for dtype in ("fp32", "bf16", "fp16"):
        yield Case("H=384, dropout", dtype, partial(mlp, dtype, 0.1))
        yield Case("H=384", dtype, partial(layer_norm, dtype, 384))
        if dtype != "fp16":
            yield Case("H=384", dtype, partial(mlp, dtype, 0.0))
            yield Case("H=4096", dtype, partial(layer_norm, dtype, 4096))
        yield Case("dropout", dtype, partial(embedding, dtype))
        yield Case("V=50257", dtype, partial(cross_entropy, dtype))
        yield Case("", dtype, partial(dropout, dtype))

    def adam(decoupled: bool) -> None:
        lists = [[torch.ones(2000)] for _ in range(4)]
        group = AdamGroup(*lists, [torch.zeros(())], 1e-3, 0.9, 0.999, 1e-8, 0.0)
        adam_triton.adam_triton([group], decoupled, 1.0)

    yield Case("Adam", "fp32", partial(adam, False))
    yield Case("AdamW", "fp32", partial(adam, True))


class Driver:
    """Stands for a GPU that Triton compiles for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all(capability: int) -> list[Compiled]:
    """Every kernel and configuration of `cases` for one GPU. Changes Triton for this process."""
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
    """Registers of a thread, and bytes that it keeps in memory for want of registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(BIN / "cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def floors(kernel: str, dtype: str) -> tuple[str, float, float] | None:
    """A shape, and the operations and bytes there; None for what no configuration takes.

    Attention is causal: half of the products.
    """
    size = 4 if dtype in ("fp32", "tf32") else 2
    B, N, S, D, H, I, R, V = 8, 6, 256, 64, 384, 1536, 2048, 50257
    score = B * N * S * S * D  # multiply-adds of a product, both halves
    heads = B * S * H * size
    weights = H * I * size
    parameters = 82_000_000
    return {
        "attention_fwd": ("D", 2 * score, 4 * heads),
        "attention_bwd_q": ("D", 3 * score, 6 * heads),
        "attention_bwd_kv": ("D", 4 * score, 6 * heads),
        "mlp_product": ("D", 2 * R * H * I, R * H * size + weights + 2 * R * I * size),
        "mlp_elements": ("D", 0, 3 * R * I * size),
        "layer_norm_fwd": ("D", 0, 4 * R * H * size),
        "layer_norm_bwd": ("D", 0, 3 * R * H * size),
        "embedding_fwd": ("D", 0, 2 * R * H * size),
        "dropout_kernel": ("D", 0, 2 * R * H * size),
        "cross_entropy": ("E", 0, 3 * 512 * V * size),
        "adam_norms": ("E", 0, 4 * parameters),
        "adam_update": ("E", 0, 28 * parameters),
    }.get(kernel)


def table(compiled: list[Compiled]) -> Iterator[str]:
    """Markdown: of each kernel and type, over all cases and tiles, the most that any takes."""
    yield "Computed by the compiler, not measured on a GPU.\n"
    yield (
        "| kernel | type | compiled | GPU | registers | spilled | shared KiB | occupancy | "
        "matrix instruction | floor, µs |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    groups: dict[tuple[str, str, int], list[Compiled]] = {}
    for each in compiled:
        groups.setdefault((each.kernel, each.dtype, each.capability), []).append(each)
    for (kernel, dtype, capability), group in sorted(groups.items()):
        gpu = GPUS[capability]
        occupancies = [each.occupancy for each in group]
        instructions = sorted({each.matrix_instruction or "" for each in group})
        floor = "-"
        if (found := floors(kernel, dtype)) is not None:
            config, operations, size = found
            seconds = max(operations / gpu.tflops[dtype] / 1e12, size / gpu.tbs / 1e12)
            floor = f"{seconds * 1e6:.1f} at {config}"
        yield (
            f"| `{kernel}` | {dtype} | {len(group)} | {gpu.name} "
            f"| {max(each.registers for each in group)} | {max(each.spilled for each in group)} "
            f"| {max(each.shared for each in group) / 1024:.0f} "
            f"| {min(occupancies):.0%} to {max(occupancies):.0%} "
            f"| {', '.join(filter(None, instructions)) or '-'} | {floor} |"
        )


def main() -> None:
    """Prints the table, or with --json every kernel."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one object for each kernel")
    arguments = parser.parse_args()
    # A process for each target: a kernel is compiled for one, once.
    with ProcessPoolExecutor(2, get_context("spawn"), max_tasks_per_child=1) as processes:
        compiled = [each for part in processes.map(compile_all, GPUS) for each in part]
    if arguments.json:
        print(json.dumps([each._asdict() for each in compiled]))
    else:
        print("\n".join(table(compiled)))


if __name__ == "__main__":
    main()
