"""The kernels' scratch memory: failed allocations, and shrinking after a large call."""

import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastllm import DecoderModel, use
from fastllm.ops import extension
from tests.conftest import needs_extension

# The limit starts at the memory that the process's threads already hold, and rises after each
# failure.
OUT_OF_MEMORY = """
import re
import torch
from fastllm import DecoderModel, use
from fastllm.ops.decode import Decoding, PackedDecoder
from fastllm.ops.extension import kernels

torch.manual_seed(0)
torch.set_num_threads(4)
use("cpu").__enter__()
model = DecoderModel(3000, 96, 2, 3, 64, 500, pos_encoding_learned=True)
ids = torch.randint(3000, (16, 40))
decoding = Decoding(PackedDecoder(model.record(64)), 3)

def gradients(loss):
    torch.manual_seed(1)  # the same dropout every time
    loss = loss()
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

def extend():
    for b in range(3):
        decoding.clear(b)
    return [decoding.extend([[1] * 40, [2] * 30, [3]]).clone()]

CASES = {
    "whole model": lambda: gradients(lambda: model.loss(ids, ids)),
    "operations": lambda: gradients(lambda: model(ids).square().mean()),
    "decoding": extend,
}
run = CASES[CASE]
refusals = 0
limit = kernels.scratch_bytes()
while True:
    kernels.limit_scratch(limit)
    try:
        first = run()
        break
    except MemoryError as error:
        assert re.fullmatch(r"the system refused [1-9]\\d* bytes of memory for .*", str(error))
        refusals += 1
        limit += 100_000
kernels.limit_scratch(2**62)
for result, again in zip(first, run(), strict=True):
    assert torch.equal(result, again) and result.isfinite().all()
print(refusals)
"""


@needs_extension
@pytest.mark.subprocess
@pytest.mark.parametrize("case", ["whole model", "operations", "decoding"])
def test_refused_memory_is_a_memory_error_that_the_process_survives(case: str) -> None:
    """Neither the caller nor a thread that waits for a failed thread hangs or dies."""
    result = subprocess.run(
        [sys.executable, "-c", f"CASE = {case!r}\n" + OUT_OF_MEMORY],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 3


@needs_extension
@pytest.mark.subprocess
def test_memory_refused_by_the_system_is_a_memory_error() -> None:
    code = """
import resource, torch, fastllm
from fastllm.ops.extension import kernels
model = fastllm.DecoderModel(50000, 8, 1, 1, 64)
ids = torch.zeros(4, 64, dtype=torch.long)
model.loss(ids[:, :8], ids[:, :8])  # triggers lazy loading
torch.set_num_threads(1)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**23,) * 2)
try:
    with fastllm.use("cpu"), torch.no_grad():
        model.loss(ids, ids)
except MemoryError as error:
    print(error)
"""
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs Linux")
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "the system refused" in result.stdout


@needs_extension
def test_scratch_shrinks_after_a_large_call() -> None:
    kernels, threads = extension.kernels, torch.get_num_threads()
    large = DecoderModel(50_000, 8, 1, 1, 64, dtype=torch.float32)
    small = DecoderModel(10, 8, 1, 1, 64, dtype=torch.float32)
    ids = torch.zeros(1, 64, dtype=torch.long)

    sizes = [kernels.scratch_bytes()]

    def run() -> None:
        with use("cpu"), torch.no_grad():
            for model, calls in ((large, 2), (small, 1100)):
                for _ in range(calls):
                    model.loss(ids, ids)
                sizes.append(kernels.scratch_bytes())

    torch.set_num_threads(1)
    try:
        thread = threading.Thread(target=run)  # a thread without scratch memory
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(threads)
    before, after_large, after_small = sizes
    assert after_large - before > 12_000_000  # 64 rows of 50,000 logits
    assert after_small - before < 4_000_000


@needs_extension
def test_instruction_set_may_change_beside_running_kernels() -> None:
    """A call uses one table of kernels throughout, even if `set_isa` is called meanwhile."""
    kernels = extension.kernels
    in_use, isas = kernels.isa(), kernels.isas()
    torch.manual_seed(0)
    model = DecoderModel(50, 48, 2, 3, 40, pos_encoding_learned=True).eval()
    ids = torch.randint(50, (4, 40))

    def loss() -> float:
        with use("cpu"), torch.no_grad():
            return model.loss(ids, ids).item()

    try:
        expected = set()
        for isa in isas:
            kernels.set_isa(isa)
            expected.add(loss())
        with ThreadPoolExecutor(2) as pool:
            running = [pool.submit(lambda: {loss() for _ in range(100)}) for _ in range(2)]
            while not all(future.done() for future in running):
                for isa in isas:
                    kernels.set_isa(isa)
        for future in running:
            assert future.result() <= expected
    finally:
        kernels.set_isa(in_use)


@needs_extension
@pytest.mark.compile
def test_scratch_holds_no_records_that_need_a_destructor(tmp_path: Path) -> None:
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    source = tmp_path / "owner.cpp"
    source.write_text(
        '#include "kernels.cpp"\n'
        "namespace fastllm {\n"
        "struct Owner {\n    char* data = nullptr;\n    ~Owner() { free(data); }\n};\n"
        "Owner* owners() { return take_array<Owner>(3); }\n"
        "}\n"
    )
    command = ["g++", "-std=c++20", "-fsyntax-only", "-DFASTLLM_ISA=base"]
    sources = Path(__file__).resolve().parents[2] / "csrc"  # `tests` may be a link
    command += [f"-I{sources}", str(source)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert "take_array: records must need no destructor" in result.stderr
