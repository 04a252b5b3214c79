"""The arithmetic of benchmarks/scaling.py; its constants are measured, not tested."""

import math
from typing import Any, get_args

import pytest
import torch

from benchmarks import scaling
from benchmarks.scaling import FITTED, MODELS, MODES, Constants, Link, Model, Node
from fastllm.benchmarking.shapes import CONFIGS
from fastllm.models.decoder import DecoderModel

K = Constants(
    step=1e-3,
    flop=1e-11,
    element=2e-9,
    memory=5e9,
    start=1e-4,
    message=5e-5,
    hops=2.0,
    small_hops=1.0,
    late=2e-4,
    wire=1.05,
    add=0.5e-9,
    send=0.4e-9,
    gather_copy=0.3e-9,
    scatter_copy=0.2e-9,
    add_cpu=1.5e-9,
)
NODE = Node(cores=32, memory=1e11, bandwidth=1.25e9, latency=5e-5)
# Communication takes no time.
FREE = K._replace(start=0, message=0, add=0, send=0, gather_copy=0, scatter_copy=0, add_cpu=0)
FREE_NODE = NODE._replace(bandwidth=math.inf, latency=0)
MODEL = MODELS["10M"]


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_model(name: str) -> None:
    m = MODELS[name]
    with torch.device("meta"):
        model = DecoderModel(m.V, m.H, m.L, 1, m.S, tie_word_embeddings=m.tied)
    assert m.parameters == sum(p.numel() for p in model.parameters())
    assert m.parameters == pytest.approx(float(name[:-1]) * 1e6, rel=0.1)


def test_flops_are_those_of_the_benchmark() -> None:
    c = CONFIGS["E"]
    assert Model(c.H, c.L, c.S, c.V).flops(c.B * c.S) == c.flops


def test_rounds_and_bytes_by_hand() -> None:
    # Each of 4 processes sends a quarter three times to reduce, and three times to share the sum.
    assert scaling.rounds_and_bytes("all_reduce", 1000, 4) == (6, 1500)
    assert scaling.rounds_and_bytes("reduce_scatter", 1000, 4) == (6, 1500)  # as gloo implements it
    assert scaling.rounds_and_bytes("all_gather", 1000, 4) == (3, 750)
    assert scaling.rounds_and_bytes("send", 1000, 2) == (1, 1000)
    assert scaling.rounds_and_bytes("all_reduce", 1000, 1) == (0, 0)


def test_collective_by_hand() -> None:
    def seconds(operation: scaling.Operation, size: float, bandwidth: float = 1.25e9) -> float:
        return scaling.collective_seconds(operation, size, 4, NODE._replace(bandwidth=bandwidth), K)

    # 6 rounds of 50 µs and two latencies of 50 µs; 1.5 MB at 1.25 GB/s, 5 % of it headers.
    ring = 1e-4 + 6 * 150e-6 + 1.5e6 * 1.05 / 1.25e9
    assert seconds("all_reduce", 1e6) == pytest.approx(ring)
    assert seconds("reduce_scatter", 1e6) == pytest.approx(ring + 1e6 * 0.2e-9)
    # On a fast link gloo itself takes 0.5 ns per byte.
    assert seconds("all_reduce", 1e6, 1e12) == pytest.approx(1e-4 + 6 * 150e-6 + 0.75e-3)
    assert seconds("all_gather", 1e6, 1e12) == pytest.approx(1e-4 + 3 * 150e-6 + 0.3e-3 + 0.3e-3)
    # Small messages: one latency per round.
    assert seconds("all_reduce", 8) == pytest.approx(1e-4 + 6 * 100e-6 + 12 * 1.05 / 1.25e9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_one_machine_computes_alone(name: str, mode: scaling.Mode) -> None:
    model = MODELS[name]
    alone = scaling.compute_seconds(model, 4096, NODE, K) + scaling.update_seconds(model, NODE)
    for node in (NODE, NODE._replace(bandwidth=1.0, latency=10.0)):
        assert scaling.step_seconds(mode, model, 4096, 1, node, K) == alone


@pytest.mark.parametrize("name", MODELS)
def test_a_free_network_leaves_computing(name: str) -> None:
    model = MODELS[name]
    for W in (2, 8, 512):
        alone = scaling.compute_seconds(model, 16384, NODE, K)
        whole = alone + scaling.update_seconds(model, NODE)
        assert scaling.step_seconds("ddp", model, 16384, W, FREE_NODE, FREE) == pytest.approx(whole)
        divided = alone + scaling.update_seconds(model, NODE, 1 / W)
        for mode in ("zero", "fsdp"):
            free = scaling.step_seconds(mode, model, 16384, W, FREE_NODE, FREE)
            assert free == pytest.approx(divided)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_faster_links_and_fewer_machines_are_never_slower(name: str, mode: scaling.Mode) -> None:
    model = MODELS[name]

    def seconds(W: int = 4, **changed: float) -> float:
        return scaling.step_seconds(mode, model, 8192, W, NODE._replace(**changed), K)

    steps = [seconds(bandwidth=10**x) for x in range(6, 13)]
    assert steps == sorted(steps, reverse=True)
    assert (mode == "pipeline" and model.tied) or steps[0] > steps[-1]
    steps = [seconds(latency=x / 1e6) for x in (0, 10, 100, 1000)]
    assert steps == sorted(steps)
    if mode == "ddp":
        steps = [seconds(W) for W in (1, 2, 4, 8, 64, 512)]
        assert steps == sorted(steps)


def test_impossible_steps_are_infinite() -> None:
    assert scaling.step_seconds("pipeline", MODEL, 16384, MODEL.L + 1, NODE, K) == math.inf
    assert scaling.step_seconds("pipeline", MODELS["124M"], 16384, 2, NODE, K) == math.inf
    # Less than one sequence per machine.
    assert scaling.step_seconds("ddp", MODEL, MODEL.S - 1, 2, NODE, K) == math.inf


def test_pipeline_pays_for_filling_and_draining() -> None:
    # 3 stages of 2 layers, 12 microbatches and a free head: 14 times a stage's time for one.
    model, node = MODEL._replace(V=0), FREE_NODE._replace(memory=math.inf)
    tokens = 12 * model.S
    k = FREE._replace(step=0)
    whole = scaling.compute_seconds(model, tokens, node, k)
    seconds = scaling.pipeline_seconds(model, tokens, 3, node, k)
    assert seconds == pytest.approx(14 / 12 * whole / 3)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("limit", [1e5, 25 * 2**20, 1e12])
def test_buckets_hold_every_matrix_once(name: str, limit: float) -> None:
    model = MODELS[name]
    parts = scaling.buckets(model, True, limit)
    vectors = model.V + 2 * model.H  # not counted
    assert sum(size for _, size in parts) == pytest.approx(4 * (model.parameters - vectors))
    largest = max(4 * model.embedding, 4 * model.layer / 3)
    assert all(size <= max(limit, largest) for _, size in parts)
    ready = [at for at, _ in parts]
    assert ready == sorted(ready) and ready[-1] == 1
    assert limit < 1e12 or len(parts) == 1
    assert {at for at, _ in scaling.buckets(model, False, limit)} == {1.0}


def test_overlap_hides_communication() -> None:
    # With a vocabulary of up to 4,096 the loss is one operation, which ends with all gradients.
    small, large = Model(512, 8, 512, 4096), Model(512, 8, 512, 4097)
    for model, overlapped in ((small, False), (large, True)):
        alone = scaling.step_seconds("ddp", model, 65536, 1, NODE, K)
        extra = scaling.step_seconds("ddp", model, 65536, 8, NODE, K) - alone
        sizes = [size for _, size in scaling.buckets(model, True, 25 * 2**20)]
        sent = sum(scaling.collective_seconds("all_reduce", size, 8, NODE, K) for size in sizes)
        assert (extra < 0.5 * sent) == overlapped


def test_tokens_for_an_efficiency() -> None:
    def seconds(tokens: float, W: int) -> float:
        return scaling.step_seconds("ddp", MODEL, tokens, W, NODE, K)

    for efficiency in (0.5, 0.9):
        tokens = scaling.tokens_for(efficiency, seconds, 64)
        assert seconds(tokens, 1) / seconds(tokens, 64) == pytest.approx(efficiency, rel=0.01)


def measurements(k: Constants) -> dict[str, Any]:
    """The measurements if the constants were `k` exactly."""
    operations, steps = [], []
    for link in FITTED:
        for size in (8, 4096) if link.delay_ms else (8, 4096, 2**20, 2**26):
            for name in get_args(scaling.Operation):
                node = scaling.measured_node(link, k)
                seconds = scaling.collective_seconds(name, size, link.processes, node, k)
                cpu = scaling.rounds_and_bytes(name, size, link.processes)[1] * k.add_cpu
                row = {"operation": name, "bytes": size, "min_s": seconds, "cpu_s": cpu}
                operations.append({"link": list(link), **row})
    node = scaling.measured_node(Link(2), k)
    for letter in CONFIGS:
        row = {"config": letter, "mode": "alone", "link": list(Link(2))}
        model, tokens = scaling.model_of(row)
        seconds = scaling.step_seconds("ddp", model, tokens, 1, node, k)
        steps.append({**row, "cpu_s": seconds, "update_cpu_s": scaling.update_seconds(model, node)})
    return {"operations": operations, "steps": steps}


def test_fit_finds_the_constants() -> None:
    assert scaling.fit(measurements(K)) == pytest.approx(K)


def test_fit_refuses_impossible_measurements() -> None:
    measured = measurements(K)
    for i, row in enumerate(measured["steps"]):  # more work takes less time
        row["cpu_s"] = row["update_cpu_s"] + 1 / (1 + i)
    with pytest.raises(ValueError, match="measure again when the machine is quiet"):
        scaling.fit(measured)
    for part in ("steps", "operations"):
        with pytest.raises(ValueError, match="lacks some of the measurements"):
            scaling.fit({**measurements(K), part: measured[part][:-8]})


def test_the_document_shows_what_the_commands_print(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = scaling.FILE.with_suffix(".md").read_text()
    (tmp_path / "scaling.md").write_text(document)
    (tmp_path / "scaling.json").write_text(scaling.FILE.read_text())
    monkeypatch.setattr(scaling, "FILE", tmp_path / "scaling.json")
    scaling.main(["document"])
    assert document.count("```bash\npython benchmarks/scaling.py") == 3
    assert (tmp_path / "scaling.md").read_text() == document


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("predict --nodes 0", "error: --nodes must be greater than 0 (got '0')"),
        ("predict --latency_us inf", "error: --latency_us must be a finite number"),
        ("predict --model 7B", "error: --model must be '1M', '10M', '30M', '124M' or"),
        ("predict --tokens 0.5", "error: --tokens must be a whole number"),
        ("", "error: name a task: fit, document or predict"),
        ("guess", "error: name a task: fit, document or predict"),
    ],
)
def test_invalid_flags(flags: str, message: str) -> None:
    with pytest.raises(SystemExit) as error:
        scaling.main(flags.split())
    assert str(error.value).startswith(message)
