"""Whole training steps against stock PyTorch and the machine's limits: `python -m fastllm.bench`.

The steps are timed in turns in one process, because other work on the machine can double any of
them: the ratios hold where the milliseconds do not. Before a configuration is timed, fastllm and
stock PyTorch must give the same loss and gradients from the same weights.
"""

import contextlib
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn

import fastllm
from fastllm.command import (
    CommandSettings,
    Device,
    autocast,
    errors_in_one_line,
    parse_settings,
    say,
)
from fastllm.models.decoder import DecoderModel
from fastllm.ops import dispatch, implementation_line
from fastllm.optim import Adam
from fastllm.threads import set_threads

Letter = Literal["A", "B", "C", "D", "E"]
Rival = Literal["eager", "tuned", "chunked", "autocast", "compile"]
Precision = Literal["fp32", "bf16"]
COMPARE: tuple[Rival, ...] = ("eager", "tuned", "compile")
Step = Callable[[Tensor], None]


TURN_SECONDS = 0.05  # of one contestant, before the next has its turn


class StepConfig(NamedTuple):
    """The shape of a training step."""

    H: int  # hidden size
    L: int  # layers
    N: int  # heads
    S: int  # sequence length
    B: int  # sequences in a batch
    V: int  # vocabulary
    dropout: float

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix products in one step.

        Attention counts in full, though causality needs only half of it; the backward counts as
        two forwards.
        """
        H, L, _, S, B, V, _ = self
        return 3 * (L * (2 * B * S * 12 * H * H + 4 * B * S * S * H) + 2 * B * S * H * V)

    def random_ids(self) -> Tensor:
        """A batch of token ids [B, S] that nothing can be learnt from."""
        return torch.randint(self.V, (self.B, self.S))


CONFIGS: dict[Letter, StepConfig] = {
    "A": StepConfig(64, 2, 2, 32, 16, 66, 0.1),  # the default shape of `python -m fastllm.train`
    "B": StepConfig(128, 3, 4, 64, 32, 66, 0.1),  # a character model for a megabyte of text
    "C": StepConfig(128, 4, 4, 64, 12, 66, 0.0),  # nanoGPT's recipe for a CPU
    "D": StepConfig(384, 6, 6, 256, 8, 66, 0.1),  # nanoGPT's "baby GPT"
    "E": StepConfig(768, 6, 12, 256, 2, 50257, 0.1),  # DistilGPT-2
}


def describe_machine(threads: int, precision: Precision = "fp32") -> dict[str, Any]:
    """What the timings are taken on; the measured limits are None without the C++ extension."""
    kernels = dispatch.kernels
    return {
        "cpu": cpu_name(),
        "isa": kernels.isa() if kernels else None,
        "threads": threads,
        "peak_gflops": measure_peak(threads, precision) if kernels else None,
        "bandwidth_gbs": measure_bandwidth(threads) if kernels else None,
        "torch": torch.__version__,
        "fastllm": fastllm.__version__,
    }


def cpu_name() -> str:
    """The processor's model name, or its architecture where the system does not tell."""
    with contextlib.suppress(OSError):  # there is no such file outside Linux
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def measure_peak(threads: int, precision: Precision = "fp32") -> float:
    """GFLOP/s of multiply-adds on all threads: median of nine runs of about 50 ms.

    Measured with the widest registers that the processor has, whatever `FASTLLM_CPU_ISA` allows
    the operations: a fraction of the peak must not grow by giving up registers.
    """
    kernels = dispatch.kernels
    isa = kernels.isa()
    kernels.set_isa(kernels.isas()[-1])
    try:
        iterations, rest = 1000, (dispatch.PRECISIONS.index(precision), threads)
        while (seconds := _seconds(kernels.fma_loop, iterations, *rest)) < 0.02:
            iterations *= 2
        iterations = int(iterations * 0.05 / seconds)
        flops = kernels.fma_loop(iterations, *rest)
        runs = [_seconds(kernels.fma_loop, iterations, *rest) for _ in range(9)]
    finally:
        kernels.set_isa(isa)
    return flops / median(runs) / 1e9


def measure_bandwidth(threads: int, update: bool = False, size: int = 2**26) -> float:
    """GB/s between an array and the processor: median of nine passes.

    Args:
        update: every element is read and written back, and counts twice, instead of only read.
        size: elements of the array; 256 MiB of them unless given, beyond any cache.
    """
    data = torch.ones(size)  # written, because untouched zeros all share one page
    walk = dispatch.kernels.memory_update if update else dispatch.kernels.memory_read
    runs = [_seconds(walk, data.data_ptr(), data.numel(), threads) for _ in range(9)]
    return data.nbytes * (2 if update else 1) / median(runs) / 1e9


def _seconds(run: Callable[..., Any], *arguments: Any) -> float:
    wait_for_gpu()
    start = time.perf_counter()
    run(*arguments)
    wait_for_gpu()
    return time.perf_counter() - start


def wait_for_gpu() -> None:
    """What was launched there, if anything, has been done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class StockBlock(nn.Module):
    """A Pre-LN layer with one product for q, k and v."""

    hidden: Tensor

    def __init__(self, config: StepConfig, attention: Literal["explicit", "sdpa"]) -> None:
        super().__init__()
        H, S = config.H, config.S
        self.num_heads, self.p, self.attention = config.N, config.dropout, attention
        self.norm1 = nn.LayerNorm(H)
        self.qkv = nn.Linear(H, 3 * H)
        self.out = nn.Linear(H, H)
        self.norm2 = nn.LayerNorm(H)
        self.fc1 = nn.Linear(H, 4 * H)
        self.fc2 = nn.Linear(4 * H, H)
        self.register_buffer("hidden", torch.ones(S, S, dtype=torch.bool).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        """One layer over `x` [B, S, H]."""
        B, S, H = x.shape
        p = self.p if self.training else 0.0
        qkv = self.qkv(self.norm1(x)).view(B, S, 3, self.num_heads, H // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, N, S, D]
        if self.attention == "sdpa":
            heads = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
            weights = scores.masked_fill(self.hidden, -math.inf).softmax(-1)
            heads = F.dropout(weights, p) @ v
        x = x + F.dropout(self.out(heads.transpose(1, 2).reshape(B, S, H)), p)
        return x + self.fc2(F.dropout(F.gelu(self.fc1(self.norm2(x))), p))


class StockDecoder(nn.Module):
    """The work of `DecoderModel.loss`, in PyTorch as somebody without fastllm would write it.

    Args:
        attention: `explicit` masks and normalises the scores step by step; `sdpa` calls PyTorch's
            fused attention.
        chunked: the head and the loss as PyTorch's `linear_cross_entropy`.
    """

    positions: Tensor

    def __init__(
        self, config: StepConfig, attention: Literal["explicit", "sdpa"], chunked: bool = False
    ) -> None:
        super().__init__()
        self.chunked = chunked
        H, V = config.H, config.V
        self.scale, self.dropout = math.sqrt(H), nn.Dropout(config.dropout)
        self.embedding = nn.Embedding(V, H)
        angles = torch.arange(config.S)[:, None] / 10000 ** (torch.arange(0, H, 2) / H)
        self.register_buffer("positions", torch.stack([angles.sin(), angles.cos()], -1).flatten(1))
        self.blocks = nn.Sequential(*(StockBlock(config, attention) for _ in range(config.L)))
        self.norm = nn.LayerNorm(H)
        self.head = nn.Linear(H, V)

    def forward(self, ids: Tensor) -> Tensor:
        """Mean cross-entropy of the next token, for `ids` [B, S]."""
        x = self.dropout(self.embedding(ids) * self.scale + self.positions)
        x, targets = self.norm(self.blocks(x)), ids[:, 1:].flatten()
        if self.chunked:
            return F.linear_cross_entropy(
                x[:, :-1].flatten(0, 1),
                self.head.weight,
                targets,
                linear_bias=self.head.bias,
                options=nn.LinearCrossEntropyOptions(),
            )
        return F.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), targets)


def build_fastllm(config: StepConfig) -> DecoderModel:
    """fastllm's model, untrained."""
    H, L, N, S, _, V, p = config
    return DecoderModel(V, H, L, N, S, embedding_dropout_p=p, attn_dropout_p=p, mlp_dropout_p=p)


def build_stock(config: StepConfig, rival: Rival, model: DecoderModel) -> StockDecoder:
    """What `rival` trains, with the weights of `model`."""
    attention: Any = "explicit" if rival == "eager" else "sdpa"
    stock = StockDecoder(config, attention, chunked=rival == "chunked")
    with torch.no_grad():
        for theirs, ours in zip(stock.parameters(), model.parameters(), strict=True):
            theirs.copy_(ours)  # both hold them in the same order
    return stock


def fastllm_step(model: DecoderModel, precision: Precision = "fp32") -> Step:
    """A training step on token ids [B, S] with fastllm."""
    optimizer = Adam(model.parameters(), max_grad_norm=1.0)

    def step(ids: Tensor) -> None:
        with autocast(ids.device.type, precision):
            loss = model.loss(ids, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def stock_step(stock: StockDecoder, rival: Rival, precision: Precision = "fp32") -> Step:
    """The same step with PyTorch alone; that of `compile` compiles when first called."""
    # Left to itself, torch.compile would take the second configuration of a process for a sign that
    # sizes change, and generate slower code.
    compute_loss = torch.compile(stock, dynamic=False) if rival == "compile" else stock
    params = list(stock.parameters())
    optimizer = torch.optim.Adam(params, fused=None if rival == "eager" else True)
    if rival == "autocast":
        precision = "bf16"

    def step(ids: Tensor) -> None:
        with autocast(ids.device.type, precision):
            loss = compute_loss(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


class ParityError(Exception):
    """fastllm and stock PyTorch compute different things, so that their times mean nothing."""


def check_parity(
    model: DecoderModel, stock: StockDecoder, ids: Tensor, precision: Precision = "fp32"
) -> None:
    """Compares losses and gradients on token ids [B, S], without dropout.

    Raises:
        ParityError: in fp32 the losses differ by more than 1e-5 of their size, or the gradients of
            a parameter by more than 1e-5 of their norm; in bf16 a gradient of fastllm is more than
            twice as far from the stock one in fp32 as the stock one under autocast.
    """

    def run(network: DecoderModel | StockDecoder, precision: Precision = "fp32") -> list[Any]:
        network.eval()
        with autocast(ids.device.type, precision):
            loss = network.loss(ids, ids) if isinstance(network, DecoderModel) else network(ids)
        loss.backward()
        results = [loss.detach(), *(p.grad for p in network.parameters())]
        network.zero_grad()
        network.train()
        return results

    names = [name for name, _ in model.named_parameters()]
    ours, theirs = run(model), run(stock)
    if not math.isclose(ours[0], theirs[0], rel_tol=1e-5):
        raise ParityError(f"fastllm's loss is {ours[0]:.7f}, stock PyTorch's {theirs[0]:.7f}")
    bounds = [1e-5] * len(names)
    if precision == "bf16":
        bounds = [2 * error + 1e-5 for error in _errors(run(stock, "bf16"), theirs)]
        ours = run(model, "bf16")
    for name, error, bound in zip(names, _errors(ours, theirs), bounds, strict=True):
        if not error <= bound:  # nor when it is not a number
            raise ParityError(f"the gradients of {name} differ by {error:.1e} of their norm")


def _errors(actual: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Of each gradient, as a part of its norm; the losses before them are left out."""
    pairs = zip(actual[1:], expected[1:], strict=True)
    return [float((a - b).norm() / b.norm()) for a, b in pairs]


def time_config(
    letter: Letter,
    rivals: list[Rival],
    seconds: float,
    precision: Precision = "fp32",
    device: Device = "cpu",
) -> dict[str, float]:
    """Median milliseconds of a training step, by `fastllm` and by each rival.

    `compile` is left out, and the reason said, where the machine cannot compile.

    Args:
        seconds: how long to time all of them together, after warming up; three rounds at least.
        device: on a GPU the rivals' products are of the same precision.

    Raises:
        ParityError: fastllm and a rival disagree; nothing was timed.
    """
    config = CONFIGS[letter]
    torch.manual_seed(0)
    model, ids = build_fastllm(config).to(device), config.random_ids().to(device)
    steps = {"fastllm": fastllm_step(model, precision)}
    for rival in rivals:
        stock = build_stock(config, rival, model).to(device)
        try:
            check_parity(model, stock, ids, precision)
        except ParityError as error:
            raise ParityError(f"config {letter}, {rival}: {error}; nothing was timed") from None
        steps[rival] = stock_step(stock, rival, precision if device == "cuda" else "fp32")
    for name, step in list(steps.items()):
        if name != "compile":
            step(ids)
        elif not _compiles(letter, step, ids):
            del steps[name]

    return time_in_turns(steps, seconds, lambda: config.random_ids().to(device))


def time_in_turns(
    runs: dict[str, Callable[[Any], Any]], seconds: float, make_argument: Callable[[], Any]
) -> dict[str, float]:
    """Median milliseconds of each run, on arguments that are new in every round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    deadline = time.perf_counter() + seconds
    while any(len(each) < 3 for each in times.values()) or time.perf_counter() < deadline:
        argument = make_argument()
        for name, run in runs.items():
            # Several in a row, as in training: the first of them finds the others' data in the
            # caches.
            end = time.perf_counter() + TURN_SECONDS
            times[name].append(_seconds(run, argument))
            while time.perf_counter() < end:
                times[name].append(_seconds(run, argument))
    return {name: 1000 * median(each) for name, each in times.items()}


def _compiles(letter: Letter, step: Step, ids: Tensor) -> bool:
    say(f"config {letter}: torch.compile is warming up, which takes about half a minute ...")
    try:
        seconds = _seconds(step, ids)
    except Exception as error:  # the compiler's many layers raise what they like
        reason = str(error).partition("\n")[0]
        say(f"config {letter}: torch.compile cannot run: {type(error).__name__}: {reason}")
        return False
    say(f"config {letter}: torch.compile took {seconds:.0f} s to warm up")
    return True


def measure_memory(letter: Letter, rivals: list[Rival], precision: Precision) -> dict[str, float]:
    """Peak memory of training steps, in MiB, over weights, gradients and moments of the optimizer.

    Each contestant makes three steps in a process of its own.
    """
    peaks = {}
    for name in ("fastllm", *rivals):
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            arguments = letter, name, precision, torch.get_num_threads()
            peaks[name] = process.submit(_peak_memory, *arguments).result()
    return peaks


def _peak_memory(letter: Letter, name: Any, precision: Precision, threads: int) -> float:
    torch.set_num_threads(threads)
    config = CONFIGS[letter]
    before = status_mb("VmRSS")
    model = build_fastllm(config)
    if name == "fastllm":
        step = fastllm_step(model, precision)
    else:
        stock = build_stock(config, name, model)
        step = stock_step(stock, name)
    state = 4 * 4 * sum(p.numel() for p in model.parameters()) / 2**20
    if name != "fastllm":
        del model
    for _ in range(3):
        step(config.random_ids())
    return status_mb("VmHWM") - before - state


def status_mb(field: str) -> float:
    """A line of this process's /proc/self/status, in MiB: `VmRSS` now, `VmHWM` at its peak."""
    # Not `ru_maxrss`: a new process begins with that of the one that started it.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}")


def report(
    letter: Letter,
    milliseconds: dict[str, float],
    peak_gflops: float | None,
    precision: Precision = "fp32",
) -> dict[str, Any]:
    """What `--json` says of a configuration; a ratio is a rival's time over fastllm's."""
    config, ours = CONFIGS[letter], milliseconds["fastllm"]
    gflops = config.flops / ours / 1e6
    return {
        "config": letter,
        "precision": precision,
        "step_ms": ours,
        "tokens_per_second": 1000 * config.B * config.S / ours,
        "gflops": gflops,
        "fraction_of_peak": gflops / peak_gflops if peak_gflops else None,
        "ratio": {
            rival: milliseconds[rival] / ours if rival in milliseconds else None
            for rival in get_args(Rival)
            if rival in milliseconds or rival in COMPARE
        },
    }


def row(result: dict[str, Any]) -> str:
    """The line of a configuration in the table."""
    fraction = result["fraction_of_peak"]
    percent = None if fraction is None else 100 * fraction
    cells = [result[name] for name in ("config", "step_ms", "tokens_per_second", "gflops")]
    return _line(*cells, percent, *result["ratio"].values())


def _line(*cells: Any) -> str:
    return "".join(f"{_text(cell):>12}" for cell in cells)


def _text(value: Any) -> str:
    return f"{value:,.2f}" if isinstance(value, float) else str(value or "-")


def _letters(value: list[str]) -> list[str]:
    return list("".join(value).upper())


class BenchConfig(CommandSettings):
    """Time whole training steps of fastllm and of stock PyTorch, in turns."""

    config: Annotated[list[Letter], BeforeValidator(_letters)] = Field(list(CONFIGS), min_length=1)
    """Which of the configurations A to E: A,B or AB."""
    precision: Precision = "fp32"
    """Of fastllm's matrix products. The rivals' is fp32, but for autocast's."""
    compare: list[Rival] = Field(list(COMPARE))
    """Stock PyTorch to compare with: eager (explicit softmax, default Adam), tuned (fused attention
    and fused Adam), chunked (tuned with linear_cross_entropy), autocast (tuned in bf16), compile
    (tuned under torch.compile, which warms up for half a minute). Without the flag: eager, tuned
    and compile, and in bf16 autocast as well."""
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 15
    """Time for each configuration, after warming up; three rounds are made at least."""
    device: Device = "cpu"
    """With cuda, every operation is measured as well, against stock PyTorch on the same GPU."""
    memory: bool = False
    """Measure peak memory instead of time (Linux alone)."""
    json_: Annotated[bool, Field(alias="json")] = False
    """Print one JSON object instead of a table."""
    threads: Annotated[int, Field(ge=0, le=4096)] = 0
    """CPU threads; 0 for OMP_NUM_THREADS, or the physical cores that this process may use."""
    impl: Literal["auto", "ref", "cpu", "triton"] = "auto"
    """Implementation of fastllm's operations: auto takes the fastest that can serve."""

    @model_validator(mode="after")
    def _check_together(self) -> "BenchConfig":
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: there is no CUDA GPU to measure, or this PyTorch has no CUDA")
        if self.device == "cuda" and self.memory:
            raise ValueError("memory is measured on a CPU; leave --device out")
        return self


def main(arguments: list[str]) -> None:
    settings = parse_settings(BenchConfig, arguments)
    threads = set_threads(settings.threads)
    precision, rivals = settings.precision, settings.compare
    on_gpu = settings.device == "cuda"
    if precision == "bf16" and not on_gpu:
        if reason := dispatch.why_not_autocast(torch.bfloat16):
            raise SystemExit(f"error: precision: bf16 cannot be measured: {reason}")
        if "compare" not in settings.model_fields_set:
            rivals = [*rivals, "autocast"]
    if "chunked" in rivals and not hasattr(F, "linear_cross_entropy"):
        raise SystemExit(
            f"error: compare: chunked needs torch 2.13 or later, not {torch.__version__}"
        )
    shown = [rival for rival in get_args(Rival) if rival in rivals or rival in COMPARE]

    def show(line: str) -> None:
        if not settings.json_:
            print(line, flush=True)

    if settings.memory:
        if not sys.platform.startswith("linux"):
            raise SystemExit("error: --memory reads /proc, which only Linux has")
        show("Peak MiB of a step over weights, gradients and the optimizer's moments:")
        peaks = {each: measure_memory(each, rivals, precision) for each in settings.config}
        show(_line("config", "fastllm", *rivals))
        for letter, row_of_peaks in peaks.items():
            show(_line(letter, *row_of_peaks.values()))
        if settings.json_:
            print(json.dumps({"memory_mb": peaks}))
        return
    # FASTLLM_IMPL speaks where the flag is silent.
    chosen = contextlib.nullcontext() if settings.impl == "auto" else dispatch.use(settings.impl)
    with chosen:
        with errors_in_one_line(dispatch.ImplementationError, ValueError):
            say(f"operations  {implementation_line(settings.device)}")
        if on_gpu:
            from fastllm import bench_cuda  # which imports this module

            machine = bench_cuda.describe_gpu(precision)
        else:
            machine = describe_machine(threads, precision)
        if dispatch.kernels is None and not on_gpu:
            say(f"the machine's peak cannot be measured: {dispatch.extension_problem}")
        show("\n".join(f"{name:15}{_text(value)}" for name, value in machine.items()))
        operations = []
        if on_gpu:
            show("\nOperations, forward and backward, and how many times as long PyTorch takes:")
            show(bench_cuda.OPERATIONS_HEAD)
            # By the kernels, where the automatic choice is PyTorch's: so that it can be judged.
            kernels = "triton" if settings.impl == "auto" else settings.impl
            with dispatch.use(kernels), errors_in_one_line(ParityError, RuntimeError):
                for result in bench_cuda.measure_operations(
                    "cuda", precision, settings.seconds / 5
                ):
                    operations.append(result)
                    show(bench_cuda.operation_row(result, machine))
        show("\nA step by fastllm, and how many times as long stock PyTorch takes:")
        show(_line("config", "ms", "tokens/s", "GFLOP/s", "% of peak", *shown))
        results = []
        for letter in dict.fromkeys(settings.config):
            with errors_in_one_line(ParityError):
                milliseconds = time_config(
                    letter, rivals, settings.seconds, precision, settings.device
                )
            results.append(report(letter, milliseconds, machine["peak_gflops"], precision))
            show(row(results[-1]))
    if settings.json_:
        found = {"operations": operations} if on_gpu else {}
        print(json.dumps({"configs": results, "machine": machine, **found}))


if __name__ == "__main__":
    main(sys.argv[1:])
