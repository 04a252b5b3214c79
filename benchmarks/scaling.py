"""Predicts the cost of a training step on many machines from measurements with two processes.

    python benchmarks/scaling.py predict --model 124M --nodes 8,64,512 --gbits 1,10,25
    python benchmarks/scaling.py fit         # the constants; measurements beside predictions
    python benchmarks/scaling.py document    # rewrites the tables of docs/scaling.md

docs/scaling.md explains the model. benchmarks/scaling_measure.py measures docs/scaling.json, to
which the constants are fitted every time.
"""

import contextlib
import io
import json
import math
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from fastllm.benchmarking.shapes import CONFIGS, StepShape
from fastllm.command import CommandSettings, errors_in_one_line, parse_settings
from fastllm.ops.decoder_loss import why_not_shape

FILE = Path(__file__).parent.parent / "docs" / "scaling.json"
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Operation = Literal["all_reduce", "all_gather", "reduce_scatter", "send"]
REDUCTIONS = ("all_reduce", "reduce_scatter")
Mode = Literal["ddp", "zero", "fsdp", "pipeline"]
MODES: tuple[Mode, ...] = ("ddp", "zero", "fsdp", "pipeline")
# Adam reads a weight, its gradient and two moments, and writes all but the gradient, in fp32.
UPDATE_BYTES = 28


class Model(NamedTuple):
    """A decoder model; `tied` if the head shares the embedding matrix."""

    H: int
    L: int
    S: int
    V: int
    tied: bool = False

    @property
    def layer(self) -> int:
        """Parameters of a transformer layer."""
        return 12 * self.H**2 + 13 * self.H

    @property
    def embedding(self) -> int:
        """Parameters of the token embeddings, and of the head's matrix."""
        return self.V * self.H

    @property
    def parameters(self) -> int:
        matrices = 1 if self.tied else 2
        return self.L * self.layer + matrices * self.embedding + self.V + 2 * self.H

    @property
    def head_share(self) -> float:
        """The head's share of the FLOPs of a step."""
        return 6 * self.S * self.embedding / self.flops(self.S)

    def flops(self, tokens: float) -> float:
        """FLOPs of a step, as `StepShape.flops` counts them."""
        return StepShape(self.H, self.L, 1, self.S, 1, self.V, 0.0).flops * tokens / self.S


MODELS = {
    "1M": Model(128, 5, 256, 104),
    "10M": Model(384, 6, 256, 66),
    "30M": Model(512, 8, 512, 4096),
    "124M": Model(768, 12, 1024, 50257, tied=True),  # GPT-2
    "150M": Model(960, 12, 1024, 8192),
}


class Node(NamedTuple):
    """A machine and its link."""

    cores: int
    memory: float  # bytes/s at which Adam passes over the parameters
    bandwidth: float  # bytes/s
    latency: float  # seconds, one way


class Constants(NamedTuple):
    """The fitted constants: seconds, or seconds per byte, on one core unless stated otherwise."""

    step: float  # fixed cost of a step
    flop: float  # per FLOP of matrix products
    element: float  # per token, layer and hidden unit: everything but matrix products
    memory: float  # bytes/s at which clipping and Adam pass over the parameters
    start: float  # per collective operation, which another thread executes
    message: float  # per round of a collective operation
    hops: float  # latencies per round: the receiver announces itself before the sender sends
    small_hops: float  # the same if most processes have nothing to send at first
    late: float  # extra delay of packets that are delayed for a measurement
    wire: float  # overhead on the nominal time of a byte on a shaped link
    add: float  # per byte sent and reduced, if the link is no bottleneck
    send: float  # per byte sent, if the link is no bottleneck
    gather_copy: float  # per byte of an all-gather, which PyTorch copies from gloo's buffer
    scatter_copy: float  # per byte of a reduce-scatter, whose input PyTorch copies
    add_cpu: float  # core time per byte sent and reduced


def rounds_and_bytes(operation: Operation, size: float, W: int) -> tuple[float, float]:
    """Sequential rounds of an operation, and bytes that each of W processes sends.

    Gloo's all-reduce is a ring at every size: 2 (W - 1) rounds of size / W. Its all-gather is half
    of that. Its reduce-scatter is an all-reduce that keeps a part of the result.
    """
    if W == 1:
        return 0, 0
    if operation == "send":
        return 1, size
    phases = 1 if operation == "all_gather" else 2
    return phases * (W - 1), phases * (W - 1) / W * size


def collective_seconds(
    operation: Operation, size: float, W: int, node: Node, k: Constants
) -> float:
    """Seconds of an operation on `size` bytes, summed over the parts of all processes."""
    if W == 1:
        return 0.0
    rounds, sent = rounds_and_bytes(operation, size, W)
    hops = k.small_hops if is_small(operation, size, W) else k.hops
    gloo = k.add if operation in REDUCTIONS else k.send
    copy = {"all_gather": k.gather_copy, "reduce_scatter": k.scatter_copy}.get(operation, 0)
    return (
        k.start * (operation != "send")
        + rounds * (k.message + hops * node.latency)
        + sent * max(gloo, k.wire / node.bandwidth)
        + size * copy
    )


def is_small(operation: Operation, size: float, W: int) -> bool:
    """Whether most processes have nothing to send at first, and so need not wait."""
    return operation == "send" or (operation in REDUCTIONS and size <= 8 * W)


def compute_seconds(model: Model, tokens: float, node: Node, k: Constants) -> float:
    """Seconds of forward and backward on one machine."""
    work = model.flops(tokens) * k.flop + tokens * model.L * model.H * k.element
    return k.step + work / node.cores


def update_seconds(model: Model, node: Node, share: float = 1.0) -> float:
    """Seconds of clipping and Adam, for a share of the parameters."""
    return share * model.parameters * UPDATE_BYTES / node.memory


def buckets(model: Model, overlapped: bool, limit: float) -> list[tuple[float, float]]:
    """DDP's all-reduces: the fraction of the backward after which each can begin, and its bytes.

    The head's gradient comes first and the embedding's last. A bucket holds at most `limit` bytes,
    or a single matrix that is larger.
    """
    layers = (1 - model.head_share) / model.L
    matrices = [] if model.tied else [(model.head_share, 4.0 * model.embedding)]
    for i in range(1, model.L + 1):
        for squares in (4, 4, 3, 1):  # of H x H: the MLP's two, QKV, the output projection
            matrices.append((model.head_share + layers * i, 4 * model.layer * squares / 12))
    matrices.append((1.0, 4.0 * model.embedding))
    result: list[tuple[float, float]] = []
    for ready, size in matrices:
        if result and result[-1][1] + size <= limit:
            result[-1] = (ready, result[-1][1] + size)
        else:
            result.append((ready, size))
    return [(ready if overlapped else 1.0, size) for ready, size in result]


def step_seconds(
    mode: Mode, model: Model, tokens: float, W: int, node: Node, k: Constants, bucket_mb: float = 25
) -> float:
    """Seconds of a training step of W machines with `tokens` tokens each; infinite if impossible.

    Small all-reduces sum the numbers of tokens and the loss, and the norm of sharded gradients.
    """
    compute = compute_seconds(model, tokens, node, k)
    if W == 1:
        return compute + update_seconds(model, node)
    if mode != "pipeline" and tokens < model.S:
        return math.inf
    count = 3 if mode in ("zero", "fsdp") else 2
    small = count * collective_seconds("all_reduce", 8, W, node, k)
    if mode == "ddp":
        overlapped = why_not_shape(math.ceil(tokens / model.S), model.S, model.V) is not None
        parts = buckets(model, overlapped, bucket_mb * 2**20)
        sent = sum(rounds_and_bytes("all_reduce", size, W)[1] for _, size in parts)
        # Gloo's threads compete with the backward for the cores.
        backward = compute * 2 / 3 + (sent * k.add_cpu / node.cores if overlapped else 0)
        end = 0.0
        for ready, size in parts:
            end = max(end, ready * backward) + collective_seconds("all_reduce", size, W, node, k)
        return compute / 3 + max(backward, end) + update_seconds(model, node) + small
    if mode == "pipeline":
        return pipeline_seconds(model, tokens * W, W, node, k) + small
    # Layer by layer, without overlap: PyTorch has no streams on a CPU.
    rest = 4.0 * (model.parameters - model.L * model.layer)
    gathers = 2 if mode == "fsdp" else 1  # ZeRO-3 gathers again for the backward
    seconds = compute + update_seconds(model, node, 1 / W) + small
    for size, times, count in ((4.0 * model.layer, gathers, model.L), (rest, 1, 1)):
        seconds += count * times * collective_seconds("all_gather", size, W, node, k)
        seconds += count * collective_seconds("reduce_scatter", size, W, node, k)
    return seconds


def pipeline_seconds(model: Model, tokens: float, W: int, node: Node, k: Constants) -> float:
    """Seconds of W stages on `tokens` tokens in all; infinite if impossible.

    The last stage also has the head. There are up to 4 W microbatches of whole sequences.
    """
    if W > model.L or model.tied:
        return math.inf
    head = model.head_share / (1 - model.head_share) * model.L  # in layers
    share = (math.ceil(model.L / W) + head) / (model.L + head)  # of the last stage
    sequences = max(1, int(tokens / model.S))
    microbatches = max(n for n in range(1, 4 * W + 1) if sequences % n == 0)
    stage = k.step + share * (compute_seconds(model, tokens / microbatches, node, k) - k.step)
    sends = 2 * collective_seconds("send", 4 * tokens / microbatches * model.H, W, node, k)
    return (microbatches + W - 1) * (stage + sends) + update_seconds(model, node, share)


class Link(NamedTuple):
    """How the processes of a measurement are connected: loopback, shaped or delayed."""

    processes: int
    gbits: float | None = None
    delay_ms: float | None = None

    def __str__(self) -> str:
        if self.delay_ms:
            return f"{self.delay_ms:g} ms"
        return f"{self.gbits:g} Gbit/s" if self.gbits else "loopback"


FITTED = [Link(2), Link(2, 1), Link(2, None, 0.2), Link(2, None, 1), Link(4, None, 1)]


def fit(measured: dict[str, Any]) -> Constants:
    """The constants by least squares of relative errors.

    The fastest run of an operation counts, and the core time of steps without communication: other
    work on the machine distorts neither.

    Raises:
        ValueError: measurements are missing, or a constant comes out negative, as other work on
            the machine disturbed them.
    """
    steps, operations = measured.get("steps", []), measured.get("operations", [])
    alone = [row for row in steps if row["mode"] == "alone" and row["link"][0] == 2]
    links = {Link(*row["link"]) for row in operations}
    if len(alone) < len(CONFIGS) or not links.issuperset(FITTED):
        raise ValueError(f"{FILE} lacks some of the measurements; measure again")
    all_reduces = [
        row["cpu_s"] / rounds_and_bytes("all_reduce", row["bytes"], 2)[1]
        for row in operations
        if Link(*row["link"]) == Link(2)
        and row["operation"] == "all_reduce"
        and row["bytes"] >= 2**20
    ]
    return Constants(**fit_steps(alone), **fit_operations(operations), add_cpu=median(all_reduces))


def fit_steps(alone: list[dict[str, Any]]) -> dict[str, float]:
    sizes = [UPDATE_BYTES * model_of(row)[0].parameters for row in alone]
    updates = [row["update_cpu_s"] for row in alone]
    largest, slowest = max(zip(sizes, updates, strict=True))
    terms, seconds = [], []
    for row, size in zip(alone, sizes, strict=True):
        model, tokens = model_of(row)
        elements = tokens * model.L * model.H
        terms.append({"step": 1, "flop": model.flops(tokens), "element": elements})
        seconds.append(row["cpu_s"] - size * slowest / largest)
    return {**relative_least_squares(terms, seconds), "memory": largest / slowest}


def fit_operations(operations: list[dict[str, Any]]) -> dict[str, float]:
    terms, seconds = [], []
    for row in operations:
        link, operation, size = Link(*row["link"]), row["operation"], row["bytes"]
        # A token bucket lets the first bytes pass at once.
        if link not in FITTED or (link.gbits and size < 2**23):
            continue
        rounds, sent = rounds_and_bytes(operation, size, link.processes)
        small = is_small(operation, size, link.processes)
        delay = rounds * (link.delay_ms or 0) / 1000
        unshaped = 0 if link.gbits else sent
        terms.append(
            {
                "start": operation != "send",
                "message": rounds,
                "hops": 0 if small else delay,
                "small_hops": delay if small else 0,
                "late": rounds * (1 if small else 2) if link.delay_ms else 0,
                "wire": sent * 8 / (link.gbits * 1e9) if link.gbits else 0,
                "add": unshaped if operation in REDUCTIONS else 0,
                "send": 0 if operation in REDUCTIONS else unshaped,
                "gather_copy": size if operation == "all_gather" else 0,
                "scatter_copy": size if operation == "reduce_scatter" else 0,
            }
        )
        seconds.append(row["min_s"])
    return relative_least_squares(terms, seconds)


def relative_least_squares(terms: list[dict[str, float]], seconds: list[float]) -> dict[str, float]:
    """The factors of the terms, by name, whose sums come closest to the seconds."""
    matrix = np.array([list(row.values()) for row in terms]) / np.array(seconds)[:, None]
    scale = np.linalg.norm(matrix, axis=0)
    solution = np.linalg.lstsq(matrix / scale, np.ones(len(seconds)))[0] / scale
    if (solution < 0).any():
        raise ValueError(
            f"the fit gives negative times, {solution}: measure again when the machine is quiet"
        )
    return dict(zip(terms[0], solution.tolist(), strict=True))


def model_of(row: dict[str, Any]) -> tuple[Model, int]:
    """The model of a measured step, and the tokens of each process."""
    c = CONFIGS[row["config"]]
    return Model(c.H, c.L, c.S, c.V), c.B * c.S


def measured_node(link: Link, k: Constants) -> Node:
    """The node that a process of a measurement stands for."""
    bandwidth = link.gbits * 1e9 / 8 if link.gbits else math.inf
    latency = link.delay_ms / 1000 + k.late if link.delay_ms else 0.0
    return Node(1, k.memory, bandwidth, latency)


def show_fit(measured: dict[str, Any], k: Constants) -> None:
    """Prints the constants, and every measurement beside its prediction."""
    machine = measured["machine"]
    print(f"{machine['cores']} cores of {machine['cpu']}, torch {machine['torch']}.\n")
    print_table(["constant", "value"], [[name, f"{x:.3g}"] for name, x in k._asdict().items()])
    print("\nOperations: fastest ms (predicted).\n")
    sizes = sorted({row["bytes"] for row in measured["operations"]})
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for row in measured["operations"]:
        link, operation, size = Link(*row["link"]), row["operation"], row["bytes"]
        s = collective_seconds(operation, size, link.processes, measured_node(link, k), k)
        by_size = cells.setdefault((f"{link.processes}, {link}", operation), {})
        by_size[size] = f"{1000 * row['min_s']:.3g} ({1000 * s:.3g})"
    print_table(
        ["processes, link", "", *(f"{size:,} bytes" for size in sizes)],
        [[*head, *(by_size.get(size, "") for size in sizes)] for head, by_size in cells.items()],
    )
    print("\nSteps, ms: core time of a process, wall-clock time, prediction.\n")
    rows = []
    for row in measured["steps"]:
        link, (model, tokens) = Link(*row["link"]), model_of(row)
        mode, W = ("ddp", 1) if row["mode"] == "alone" else (row["mode"], link.processes)
        s = step_seconds(mode, model, tokens, W, measured_node(link, k), k)
        error = f"{100 * (s / row['min_s'] - 1):+.0f} %"
        ms = [f"{1000 * each:.3g}" for each in (row["cpu_s"], row["median_s"], row["min_s"], s)]
        rows.append([row["config"], row["mode"], f"{link.processes}, {link}", *ms, error])
    times = ["core time", "median", "fastest", "predicted", "error"]
    print_table(["step of", "mode", "processes, link", *times], rows)


class PredictConfig(CommandSettings):
    """Predict the cost of training on many machines from the measurements in docs/scaling.json."""

    model: list[Literal["1M", "10M", "30M", "124M", "150M"]] = Field(list(MODELS), min_length=1)
    """Models by their number of parameters; see MODELS."""
    nodes: list[Annotated[int, Field(gt=0, le=10**9)]] = Field(
        [8, 16, 32, 64, 128, 256, 512], min_length=1
    )
    """Numbers of machines."""
    gbits: list[Positive] = Field([1, 10, 25], min_length=1)
    """Bandwidths of each machine's link, in Gbit/s."""
    latency_us: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 50
    """One-way latency between machines, half of a ping, in microseconds."""
    cores: Annotated[int, Field(gt=0, le=10**9)] = 32
    """Cores of a machine, each as fast as one of those measured."""
    memory_gbs: Positive = 100
    """Memory bandwidth of Adam on a machine, reads and writes, in GB/s."""
    tokens: Annotated[int, Field(gt=0, le=10**9)] = 16384
    """Tokens per machine in a step if every machine brings its own (weak scaling)."""
    total_tokens: Annotated[int, Field(gt=0, le=10**9)] = 524288
    """Tokens of all machines in a step if they share a batch (strong scaling)."""
    bucket_mb: Positive = 25
    """DDP's bucket_cap_mb."""


def tokens_for(efficiency: float, seconds: Callable[[float, int], float], W: int) -> float:
    """Tokens per machine at which W machines reach this fraction of a single machine's speed."""
    low, high = 1.0, 1e9
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        if seconds(middle, 1) < efficiency * seconds(middle, W):
            low = middle
        else:
            high = middle
    return high


def predict(config: PredictConfig, k: Constants) -> None:
    """Prints tables with a row for every model and number of machines, a column for every link."""
    nodes = [
        Node(config.cores, config.memory_gbs * 1e9, gbits * 1e9 / 8, config.latency_us / 1e6)
        for gbits in config.gbits
    ]

    def show(title: str, cell: Callable[[Callable[..., float], int], str]) -> None:
        rows = []
        for name in config.model:
            for W in config.nodes:
                steps = [partial(seconds, MODELS[name], node) for node in nodes]
                rows.append([name, str(W), *(cell(step, W) for step in steps)])
        print(f"\n{title}\n")
        print_table(["model", "machines", *(f"{gbits:g} Gbit/s" for gbits in config.gbits)], rows)

    def seconds(model: Model, node: Node, tokens: float, W: int, mode: Mode = "ddp") -> float:
        return step_seconds(mode, model, tokens, W, node, k, config.bucket_mb)

    def tokens_needed(step: Callable[..., float], W: int) -> str:
        return ", ".join(f"{tokens_for(each, step, W):,.0f}" for each in (0.5, 0.9))

    def efficiencies(step: Callable[..., float], W: int) -> str:
        alone = step(config.tokens, 1)
        each = [alone / step(config.tokens, W, mode) for mode in MODES]
        return ", ".join(f"{100 * e:.0f}" if e else "-" for e in each)

    def fastest(step: Callable[..., float], W: int) -> str:
        best, mode = min((step(config.total_tokens / W, W, mode), mode) for mode in MODES)
        if best == math.inf:
            return "-"
        return f"{mode} {1000 * best:,.0f}, {step(config.total_tokens, 1) / best:.1f}"

    print(f"Machines of {config.cores} cores, {config.latency_us:g} µs apart.")
    show("Tokens per machine and step for 50 % and 90 % efficiency under ddp:", tokens_needed)
    modes = ", ".join(MODES)
    show(f"Efficiency in % with {config.tokens:,} tokens per machine: {modes}", efficiencies)
    total = f"{config.total_tokens:,} tokens in all"
    show(f"{total}: fastest mode, ms per step, speed-up over one machine", fastest)


def print_table(heads: list[str], rows: list[list[str]]) -> None:
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def write_document() -> None:
    """Replaces the output of every command in docs/scaling.md, up to the next heading."""

    def run(match: re.Match[str]) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            main(match[2].split())
        return f"{match[1]}\n\n{output.getvalue()}\n"

    document = FILE.with_suffix(".md")
    command = r"(```bash\npython benchmarks/scaling.py ([^\n]*)\n```)\n.*?(?=^#|\Z)"
    text = re.sub(command, run, document.read_text(), flags=re.DOTALL | re.MULTILINE)
    document.write_text(text.rstrip() + "\n")


def main(arguments: list[str]) -> None:
    task, *flags = arguments or [""]
    with errors_in_one_line(OSError, ValueError):
        if task == "predict":
            config = parse_settings(PredictConfig, flags)
            predict(config, fit(json.loads(FILE.read_text())))
        elif task == "fit" and not flags:
            measured = json.loads(FILE.read_text())
            show_fit(measured, fit(measured))
        elif task == "document" and not flags:
            write_document()
        else:
            raise ValueError("name a task: fit, document or predict (predict --help lists flags)")


if __name__ == "__main__":
    main(sys.argv[1:])
