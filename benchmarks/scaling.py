"""What a training step costs on many machines: measured at two processes, computed for hundreds.

    python benchmarks/scaling.py predict --model 124M --nodes 8,64,512 --gbits 1,10,25
    python benchmarks/scaling.py fit         # the constants, and measurements beside what they give
    python benchmarks/scaling.py document    # writes the tables of docs/scaling.md anew

docs/scaling.md explains the model. What was measured is in docs/scaling.json, which
benchmarks/scaling_measure.py writes; the constants come from it anew whenever they are needed.
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
ADDING = ("all_reduce", "reduce_scatter")
Mode = Literal["ddp", "zero", "fsdp", "pipeline"]


class Model(NamedTuple):
    """A decoder model; `tied` if the head is the embedding's matrix."""

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
    def table(self) -> int:
        """Parameters of the token embeddings, and of the head's matrix."""
        return self.V * self.H

    @property
    def parameters(self) -> int:
        return self.L * self.layer + (1 if self.tied else 2) * self.table + self.V + 2 * self.H

    @property
    def head_share(self) -> float:
        """The part of a step's products that is the head's."""
        whole = StepShape(self.H, self.L, 1, self.S, 1, self.V, 0.0).flops
        return 6 * self.S * self.table / whole

    def flops(self, tokens: float) -> float:
        """Of one step, as `StepShape.flops` counts them."""
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
    memory: float  # bytes a second at which Adam passes over the parameters
    bandwidth: float  # bytes a second
    latency: float  # seconds from one machine to the next


class Constants(NamedTuple):
    """What is fitted: seconds, or seconds a byte, of one core, unless said."""

    step: float  # of a step, whatever its size
    flop: float  # of an operation in matrix products
    element: float  # of a token, a layer and a number of its width: everything that is no product
    memory: float  # bytes a second at which clipping and Adam pass over the parameters, in all
    start: float  # of a collective operation, which another thread does
    message: float  # of a round of it
    hops: float  # how many latencies a round takes: who receives says so before the other sends
    small_hops: float  # the same where most processes have nothing to send at first
    late: float  # what packets that are delayed for a measurement are late, beyond the delay
    wire: float  # what shaping says a byte takes, times this
    add: float  # a byte passed on and added to another, where no wire is slower
    send: float  # a byte passed on, where no wire is slower
    gather_copy: float  # a byte of an all-gather, which PyTorch copies from where gloo left it
    scatter_copy: float  # a byte of a reduce-scatter, of whose input PyTorch makes a copy
    add_cpu: float  # a core's time for a byte passed on and added


def rounds_and_bytes(operation: Operation, size: float, W: int) -> tuple[float, float]:
    """Rounds that wait for each other, and bytes that each process sends.

    Gloo's all-reduce is a ring at every size, 2 (W - 1) rounds of a W-th; its all-gather is half of
    that. Its reduce-scatter is an all-reduce of which a part is kept.
    """
    if W == 1:
        return 0, 0
    if operation == "send":
        return 1, size
    phases = 1 if operation == "all_gather" else 2
    return phases * (W - 1), phases * (W - 1) / W * size


def collective(operation: Operation, size: float, W: int, node: Node, k: Constants) -> float:
    """Seconds of an operation on `size` bytes, which is what all processes' parts are together."""
    if W == 1:
        return 0.0
    rounds, passed = rounds_and_bytes(operation, size, W)
    hops = k.small_hops if is_small(operation, size, W) else k.hops
    own = k.add if operation in ADDING else k.send
    copy = {"all_gather": k.gather_copy, "reduce_scatter": k.scatter_copy}.get(operation, 0)
    return (
        k.start * (operation != "send")
        + rounds * (k.message + hops * node.latency)
        + passed * max(own, k.wire / node.bandwidth)
        + size * copy
    )


def is_small(operation: Operation, size: float, W: int) -> bool:
    """Whether most processes have nothing to pass on at first, and so no need to wait."""
    return operation == "send" or (operation in ADDING and size <= 8 * W)


def compute(model: Model, tokens: float, node: Node, k: Constants) -> float:
    """Seconds of forward and backward on one machine."""
    work = model.flops(tokens) * k.flop + tokens * model.L * model.H * k.element
    return k.step + work / node.cores


def update(model: Model, node: Node, share: float = 1.0) -> float:
    """Seconds of clipping and Adam, for a share of the parameters."""
    return share * model.parameters * UPDATE_BYTES / node.memory


UPDATE_BYTES = 28  # Adam reads a weight, its gradient and two moments, and writes three of them


def buckets(model: Model, overlapped: bool, limit: float) -> list[tuple[float, float]]:
    """DDP's all-reduces: when in the backward they can begin, of 0 to 1, and their bytes.

    The head's gradient is there first and the embedding's last. A bucket holds what fits under
    `limit` bytes, or a single matrix that is larger.
    """
    layers = (1 - model.head_share) / model.L
    parts = [] if model.tied else [(model.head_share, 4.0 * model.table)]
    for i in range(1, model.L + 1):
        for matrix in (4, 4, 3, 1):  # of H x H: the MLP's two, q with k and v, the output's
            parts.append((model.head_share + layers * i, 4 * model.layer * matrix / 12))
    parts.append((1.0, 4.0 * model.table))
    result: list[tuple[float, float]] = []
    for ready, size in parts:
        if result and result[-1][1] + size <= limit:
            result[-1] = (ready, result[-1][1] + size)
        else:
            result.append((ready, size))
    return [(ready if overlapped else 1.0, size) for ready, size in result]


def step_seconds(
    mode: Mode, model: Model, tokens: float, W: int, node: Node, k: Constants, bucket_mb: float = 25
) -> float:
    """Seconds of a training step of W machines on `tokens` tokens each; infinite where impossible.

    Small all-reduces count the tokens and add up the loss, and the norm where it is divided.
    """
    own = compute(model, tokens, node, k)
    if W == 1:
        return own + update(model, node)
    if mode != "pipeline" and tokens < model.S:
        return math.inf
    small = (3 if mode in ("zero", "fsdp") else 2) * collective("all_reduce", 8, W, node, k)
    if mode == "ddp":
        overlapped = why_not_shape(math.ceil(tokens / model.S), model.S, model.V) is not None
        parts = buckets(model, overlapped, bucket_mb * 2**20)
        passed = sum(rounds_and_bytes("all_reduce", size, W)[1] for _, size in parts)
        # Gloo's threads take their time from the cores that compute.
        backward = own * 2 / 3 + (passed * k.add_cpu / node.cores if overlapped else 0)
        end = 0.0
        for ready, size in parts:
            end = max(end, ready * backward) + collective("all_reduce", size, W, node, k)
        return own / 3 + max(backward, end) + update(model, node) + small
    if mode == "pipeline":
        return pipeline_seconds(model, tokens * W, W, node, k) + small
    # Layer by layer, none of it overlapped: PyTorch has no streams on a CPU.
    rest = 4.0 * (model.parameters - model.L * model.layer)
    gathers = 2 if mode == "fsdp" else 1  # ZeRO-3 gathers again for the backward
    seconds = own + update(model, node, 1 / W) + small
    for size, times, count in ((4.0 * model.layer, gathers, model.L), (rest, 1, 1)):
        seconds += count * times * collective("all_gather", size, W, node, k)
        seconds += count * collective("reduce_scatter", size, W, node, k)
    return seconds


def pipeline_seconds(model: Model, tokens: float, W: int, node: Node, k: Constants) -> float:
    """Of W stages on `tokens` tokens in all; infinite where they cannot be.

    The last stage has the head beside its layers. There are up to 4 W pieces, of whole sequences.
    """
    if W > model.L or model.tied:
        return math.inf
    head = model.head_share / (1 - model.head_share) * model.L  # in layers
    share = (math.ceil(model.L / W) + head) / (model.L + head)  # of the last stage
    sequences = max(1, int(tokens / model.S))
    pieces = max(n for n in range(1, 4 * W + 1) if sequences % n == 0)
    stage = k.step + share * (compute(model, tokens / pieces, node, k) - k.step)
    sends = 2 * collective("send", 4 * tokens / pieces * model.H, W, node, k)
    return (pieces + W - 1) * (stage + sends) + update(model, node, share)


class Link(NamedTuple):
    """How `processes` of one measurement are joined: by loopback, or shaped as said."""

    processes: int
    gbits: float | None = None
    delay_ms: float | None = None

    def __str__(self) -> str:
        if self.delay_ms:
            return f"{self.delay_ms:g} ms"
        return f"{self.gbits:g} Gbit/s" if self.gbits else "loopback"


FITTED = [Link(2), Link(2, 1), Link(2, None, 0.2), Link(2, None, 1), Link(4, None, 1)]


def fit(found: dict[str, Any]) -> Constants:
    """The constants by least squares of relative errors.

    Of operations the fastest counts, and of steps that wait for nobody the time on their core:
    what else ran on the machine is in neither.

    Raises:
        ValueError: measurements are missing, or a constant comes out negative: other work on the
            machine was in the way.
    """
    steps, operations = found.get("steps", []), found.get("operations", [])
    alone = [row for row in steps if row["mode"] == "alone" and row["link"][0] == 2]
    links = {Link(*row["link"]) for row in operations}
    if len(alone) < len(CONFIGS) or not links.issuperset(FITTED):
        raise ValueError(f"{FILE} has not all of the measurements; make them again")
    passes = [UPDATE_BYTES * model_of(row)[0].parameters for row in alone]
    memory = max(zip(passes, (row["update_cpu_s"] for row in alone), strict=True))
    terms, seconds = [], []
    for row, size in zip(alone, passes, strict=True):
        model, tokens = model_of(row)
        terms.append([1, model.flops(tokens), tokens * model.L * model.H])
        seconds.append(row["cpu_s"] - size * memory[1] / memory[0])
    step, flop, element = relative_least_squares(terms, seconds)

    terms, seconds, cpu = [], [], []
    for row in operations:
        link, operation, size = Link(*row["link"]), row["operation"], row["bytes"]
        # A token bucket lets a little pass at once.
        if link not in FITTED or (link.gbits and size < 2**23):
            continue
        rounds, passed = rounds_and_bytes(operation, size, link.processes)
        delay = rounds * (link.delay_ms or 0) / 1000
        small = is_small(operation, size, link.processes)
        late = rounds * (1 if small else 2) if link.delay_ms else 0
        wire = passed * 8 / (link.gbits * 1e9) if link.gbits else 0
        own = 0.0 if link.gbits else passed
        terms.append(
            [
                *(operation != "send", rounds, delay * (not small), delay * small, late, wire),
                *(own * (operation in ADDING), own * (operation not in ADDING)),
                *(size * (operation == "all_gather"), size * (operation == "reduce_scatter")),
            ]
        )
        seconds.append(row["min_s"])
        if link == Link(2) and operation == "all_reduce" and size >= 2**20:
            cpu.append(row["cpu_s"] / passed)
    constants = relative_least_squares(terms, seconds)
    return Constants(step, flop, element, memory[0] / memory[1], *constants, median(cpu))


def relative_least_squares(terms: list[list[float]], seconds: list[float]) -> list[float]:
    matrix = np.array(terms) / np.array(seconds)[:, None]
    scale = np.linalg.norm(matrix, axis=0)
    solution = np.linalg.lstsq(matrix / scale, np.ones(len(seconds)))[0] / scale
    if (solution < 0).any():
        raise ValueError(
            f"the fit gives negative times, {solution}: measure again when the machine is quiet"
        )
    return solution.tolist()


def model_of(row: dict[str, Any]) -> tuple[Model, int]:
    """What a measured step trains, and the tokens of each process."""
    c = CONFIGS[row["config"]]
    return Model(c.H, c.L, c.S, c.V), c.B * c.S


def node_here(link: Link, k: Constants) -> Node:
    """What a process of a measurement has."""
    bandwidth = link.gbits * 1e9 / 8 if link.gbits else math.inf
    latency = link.delay_ms / 1000 + k.late if link.delay_ms else 0.0
    return Node(1, k.memory, bandwidth, latency)


def show_fit(found: dict[str, Any], k: Constants) -> None:
    """The constants, and every measurement beside what they predict."""
    machine = found["machine"]
    print(f"{machine['cores']} cores of {machine['cpu']}, torch {machine['torch']}.\n")
    table(["constant", "value"], [[name, f"{value:.3g}"] for name, value in k._asdict().items()])
    print("\nOperations: the fastest ms (predicted).\n")
    sizes = sorted({row["bytes"] for row in found["operations"]})
    lines: dict[tuple[str, str], dict[int, str]] = {}
    for row in found["operations"]:
        link, operation, size = Link(*row["link"]), row["operation"], row["bytes"]
        ms = 1000 * collective(operation, size, link.processes, node_here(link, k), k)
        cells = lines.setdefault((f"{link.processes}, {link}", operation), {})
        cells[size] = f"{1000 * row['min_s']:.3g} ({ms:.3g})"
    table(
        ["processes, link", "", *(f"{size:,} bytes" for size in sizes)],
        [[*head, *(cells.get(size, "") for size in sizes)] for head, cells in lines.items()],
    )
    print("\nSteps, ms: on a process's core, by the clock, and as predicted.\n")
    rows = []
    for row in found["steps"]:
        link, (model, tokens) = Link(*row["link"]), model_of(row)
        alone = row["mode"] == "alone"
        mode, W = ("ddp", 1) if alone else (row["mode"], link.processes)
        s = step_seconds(mode, model, tokens, W, node_here(link, k), k)
        off = f"{100 * (s / row['min_s'] - 1):+.0f} %"
        ms = [f"{1000 * each:.3g}" for each in (row["cpu_s"], row["median_s"], row["min_s"], s)]
        rows.append([row["config"], row["mode"], f"{link.processes}, {link}", *ms, off])
    times = ["on its core", "median", "fastest", "predicted", "error"]
    table(["step of", "mode", "processes, link", *times], rows)


class PredictConfig(CommandSettings):
    """What training costs on many machines, by what docs/scaling.json says was measured."""

    model: list[Literal["1M", "10M", "30M", "124M", "150M"]] = Field(list(MODELS), min_length=1)
    """Which models, by their parameters; see MODELS."""
    nodes: list[Annotated[int, Field(gt=0, le=10**9)]] = Field(
        [8, 16, 32, 64, 128, 256, 512], min_length=1
    )
    """How many machines."""
    gbits: list[Positive] = Field([1, 10, 25], min_length=1)
    """Bandwidth of each machine's link, in Gbit/s."""
    latency_us: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 50
    """From one machine to the next, half of a ping, in microseconds."""
    cores: Annotated[int, Field(gt=0, le=10**9)] = 32
    """Of a machine, each as fast as one of those measured."""
    memory_gbs: Positive = 100
    """What a machine's Adam reads and writes in a second, in GB."""
    tokens: Annotated[int, Field(gt=0, le=10**9)] = 16384
    """A machine's tokens in a step, where all machines bring their own (weak scaling)."""
    total_tokens: Annotated[int, Field(gt=0, le=10**9)] = 524288
    """All machines' tokens in a step, where they are shared out (strong scaling)."""
    bucket_mb: Positive = 25
    """DDP's bucket_cap_mb."""


MODES: tuple[Mode, ...] = ("ddp", "zero", "fsdp", "pipeline")


def tokens_for(efficiency: float, seconds: Callable[[float, int], float], W: int) -> float:
    """Tokens a machine needs in a step for that part of the speed of W machines by themselves."""
    low, high = 1.0, 1e9
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        if seconds(middle, 1) < efficiency * seconds(middle, W):
            low = middle
        else:
            high = middle
    return high


def predict(settings: PredictConfig, k: Constants) -> None:
    """Tables of every model and number of machines, over the links."""
    nodes = [
        Node(settings.cores, settings.memory_gbs * 1e9, gbits * 1e9 / 8, settings.latency_us / 1e6)
        for gbits in settings.gbits
    ]

    def show(title: str, cell: Callable[[Callable[..., float], int], str]) -> None:
        rows = []
        for name in settings.model:
            for W in settings.nodes:
                runs = [partial(seconds, MODELS[name], node) for node in nodes]
                rows.append([name, str(W), *(cell(run, W) for run in runs)])
        print(f"\n{title}\n")
        table(["model", "machines", *(f"{gbits:g} Gbit/s" for gbits in settings.gbits)], rows)

    def seconds(model: Model, node: Node, tokens: float, W: int, mode: Mode = "ddp") -> float:
        return step_seconds(mode, model, tokens, W, node, k, settings.bucket_mb)

    def needed(run: Callable[..., float], W: int) -> str:
        return ", ".join(f"{tokens_for(each, run, W):,.0f}" for each in (0.5, 0.9))

    def efficiencies(run: Callable[..., float], W: int) -> str:
        one = run(settings.tokens, 1)
        each = [one / run(settings.tokens, W, mode) for mode in MODES]
        return ", ".join(f"{100 * e:.0f}" if e else "-" for e in each)

    def fastest(run: Callable[..., float], W: int) -> str:
        best, mode = min((run(settings.total_tokens / W, W, mode), mode) for mode in MODES)
        if best == math.inf:
            return "-"
        return f"{mode} {1000 * best:,.0f}, {run(settings.total_tokens, 1) / best:.1f}"

    print(f"Machines of {settings.cores} cores, {settings.latency_us:g} µs from one to the next.")
    show("Tokens of a machine in a step for 50 % and 90 % of its speed alone, under ddp:", needed)
    modes = ", ".join(MODES)
    show(f"Percent of its speed alone, {settings.tokens:,} tokens each: {modes}", efficiencies)
    total = f"{settings.total_tokens:,} tokens shared out"
    show(f"{total}: fastest mode, ms a step, times as fast as one machine", fastest)


def table(heads: list[str], rows: list[list[str]]) -> None:
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def write_document() -> None:
    """What each command in docs/scaling.md prints, up to the next heading, is printed anew."""

    def printed(match: re.Match[str]) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            main(match[2].split())
        return f"{match[1]}\n\n{output.getvalue()}\n"

    document = FILE.with_suffix(".md")
    command = r"(```bash\npython benchmarks/scaling.py ([^\n]*)\n```)\n.*?(?=^#|\Z)"
    text = re.sub(command, printed, document.read_text(), flags=re.DOTALL | re.MULTILINE)
    document.write_text(text.rstrip() + "\n")


def main(arguments: list[str]) -> None:
    task, *rest = arguments or [""]
    with errors_in_one_line(OSError, ValueError):
        if task == "predict":
            settings = parse_settings(PredictConfig, rest)
            predict(settings, fit(json.loads(FILE.read_text())))
        elif task == "fit" and not rest:
            found = json.loads(FILE.read_text())
            show_fit(found, fit(found))
        elif task == "document" and not rest:
            write_document()
        else:
            raise ValueError("say what to do: fit, document or predict (predict --help: flags)")


if __name__ == "__main__":
    main(sys.argv[1:])
