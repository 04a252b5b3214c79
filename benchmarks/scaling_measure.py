"""Measures what benchmarks/scaling.py is fitted to, and writes docs/scaling.json.

    sudo .venv/bin/python benchmarks/scaling_measure.py    # about ten minutes, on an idle machine

Processes of one thread each stand for machines. They time training steps, and collective operations
over links that network namespaces shape to a bandwidth or delay. Needs Linux, root, iproute2 and
PyTorch 2.13. It leaves no processes or namespaces behind.
"""

import ctypes
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from scaling import FILE, FITTED, Link, fit, show_fit
from torch import Tensor

from fastllm.benchmarking.machine import cpu_name
from fastllm.benchmarking.shapes import CONFIGS, Letter
from fastllm.command import errors_in_one_line, log
from fastllm.training.config import TrainConfig
from fastllm.training.distributed import SINGLE, ProcessGroup
from fastllm.training.engine import DDP, FSDP, Engine, Pipeline
from fastllm.training.run import resolve

CHECKED = [Link(2, 10), Link(4, 1), Link(8, None, 1)]  # left out of the fit
SIZES = [8, 2**12, 2**16, 2**20, 2**23, 2**25, 2**28]
LARGEST_DELAYED = 2**12  # the thread that delays packets is slower than a network card
SECONDS = 2.0  # of steps in each measurement, after the warm-up


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@contextmanager
def network(link: Link) -> Iterator[list[list[str]]]:
    """Sets up the link; yields a prefix for each process's command, which runs it in a namespace.

    The namespaces are connected by a bridge with a token bucket on each port, or by a thread that
    delays every packet.
    """
    if link == Link(link.processes):
        yield [["env", "GLOO_SOCKET_IFNAME=lo", "MASTER_ADDR=127.0.0.1"]] * link.processes
        return
    names = [f"fastllm-{i}" for i in range(link.processes)]
    with ExitStack() as stack:
        for name in ("fastllm-hub", *names):
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
            ip("-n", name, "link", "set", "lo", "up")
        if link.gbits:
            ip("-n", "fastllm-hub", "link", "add", "hub", "type", "bridge")
            ip("-n", "fastllm-hub", "link", "set", "hub", "up")
            for i, name in enumerate(names):
                end = ["name", f"port{i}", "netns", "fastllm-hub"]
                ip("-n", name, "link", "add", "net0", "type", "veth", "peer", *end)
                ip("-n", "fastllm-hub", "link", "set", f"port{i}", "master", "hub", "up")
                shape = ["tbf", "rate", f"{link.gbits}gbit", "burst", "256kb", "latency", "20ms"]
                tc = ["tc", "-n", name, "qdisc", "add", "dev", "net0", "root"]
                subprocess.run([*tc, *shape], check=True)
        else:
            stack.enter_context(delayed(names, link.delay_ms / 1000))
        for i, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "net0")
            ip("-n", name, "link", "set", "net0", "up")
        variables = ["env", "GLOO_SOCKET_IFNAME=net0", "MASTER_ADDR=10.77.0.1"]
        yield [["ip", "netns", "exec", name, *variables] for name in names]


@contextmanager
def delayed(names: list[str], seconds: float) -> Iterator[None]:
    """A device net0 in each namespace, which delivers packets to 10.77.0.n at the n-th, delayed.

    netem would do the same, but many kernels lack it.
    """
    ready, stop = threading.Event(), threading.Event()

    def forward() -> None:
        tuns = []
        for name in names:  # setns moves only this thread into the namespace
            with open(f"/run/netns/{name}") as file:
                if ctypes.CDLL(None).setns(file.fileno(), 0):
                    raise OSError(f"cannot enter namespace {name}")
            tuns.append(os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK))
            IFF_TUN, IFF_NO_PI, TUNSETIFF = 0x0001, 0x1000, 0x400454CA
            fcntl.ioctl(tuns[-1], TUNSETIFF, struct.pack("16sH22x", b"net0", IFF_TUN | IFF_NO_PI))
        ready.set()
        held: deque[tuple[float, bytes]] = deque()
        while not stop.is_set():
            wait = max(0.0, held[0][0] - time.perf_counter()) if held else 0.1
            for tun in select.select(tuns, [], [], wait)[0]:
                held.append((time.perf_counter() + seconds, os.read(tun, 2**16)))
            while held and held[0][0] <= time.perf_counter():
                packet = held.popleft()[1]
                version, host = packet[0] >> 4, packet[19]  # the last byte of the address
                if version == 4 and 0 < host <= len(tuns):
                    os.write(tuns[host - 1], packet)
        for tun in tuns:
            os.close(tun)

    with ThreadPoolExecutor(1) as pool:
        forwarding = pool.submit(forward)
        try:
            while not ready.wait(0.1) and not forwarding.done():
                pass
            yield
        finally:
            stop.set()
            forwarding.result()


def run_workers(link: Link, task: str, **arguments: Any) -> list[dict[str, Any]]:
    """Runs the processes of a measurement to their end; returns the results of rank 0."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with network(link) as prefixes, ExitStack() as stack:
        workers = []
        for rank, prefix in enumerate(prefixes):
            variables = [f"RANK={rank}", f"WORLD_SIZE={link.processes}", f"MASTER_PORT={port}"]
            variables.append("TORCH_CPP_LOG_LEVEL=ERROR")  # addresses there have no names
            command = [sys.executable, __file__, "worker", task, json.dumps(arguments)]
            worker = subprocess.Popen([*prefix, *variables, *command], stdout=subprocess.PIPE)
            stack.callback(worker.wait)
            stack.callback(worker.kill)
            workers.append(worker)
        outputs = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise SystemExit(f"error: a process that measured {task} over {link} failed; see above")
    return json.loads(outputs[0])


def worker(task: str, arguments: str) -> None:
    """Runs one process of a measurement; rank 0 prints the results."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    measure = {"operations": time_operations, "step": time_steps}[task]
    results = measure(**json.loads(arguments))
    dist.barrier()
    if dist.get_rank() == 0:
        print(json.dumps(results))
    dist.destroy_process_group()


def time_operations(largest: int) -> list[dict[str, Any]]:
    """Every collective operation at every size up to `largest` bytes."""
    W, rank = dist.get_world_size(), dist.get_rank()
    results = []
    for size in [each for each in SIZES if each <= largest]:
        whole = torch.ones(max(W, size // 4))
        whole = whole[: len(whole) // W * W]
        part = torch.ones(len(whole) // W)

        def ping_pong(x: Tensor = whole) -> None:
            for turn in range(2):
                if rank == turn:
                    dist.send(x, 1 - turn)
                elif rank == 1 - turn:
                    dist.recv(x, turn)

        runs: dict[str, Callable[[], Any]] = {
            "all_reduce": partial(dist.all_reduce, whole),
            "all_gather": partial(dist.all_gather_single, whole, part),
            "reduce_scatter": partial(dist.reduce_scatter_single, part, whole),
            "send": ping_pong,
        }
        repeats = max(1, min(20, 2**18 // size))  # between barriers, to amortize them
        for name, run in runs.items():
            seconds, cpu = [], []
            for _ in range(max(3, min(30, 2**27 // size)) + 1):
                dist.barrier()
                begin = time.perf_counter(), time.process_time()
                for _ in range(repeats):
                    run()
                seconds.append(time.perf_counter() - begin[0])
                cpu.append(time.process_time() - begin[1])
            count = repeats * (2 if name == "send" else 1)
            results.append(
                {
                    "operation": name,
                    "bytes": size,
                    "median_s": median(seconds[1:]) / count,
                    "min_s": min(seconds[1:]) / count,
                    "cpu_s": median(cpu[1:]) / count,
                }
            )
    return results


def time_steps(letter: Letter, mode: str) -> dict[str, float]:
    """Times training steps, each process on a batch; in mode `alone` they do not communicate."""
    shape, count = CONFIGS[letter], dist.get_world_size()
    config = TrainConfig(
        hidden_size=shape.H,
        num_layers=shape.L,
        num_heads=shape.N,
        max_seq_len=shape.S,
        batch_size=shape.B * count,
        dropout=shape.dropout,
    )
    model = config.build_model(shape.V, shape.V - 1)
    engines = {"alone": Engine, "ddp": DDP, "fsdp": FSDP, "pipeline": Pipeline}
    group = SINGLE if mode == "alone" else ProcessGroup(dist.get_rank(), count)
    engine = engines[mode](resolve(config, Path()), model, group)
    seconds, cpu, updates = [], [], []
    steps = torch.tensor(5)
    while len(seconds) < steps:
        batch = shape.B * (count if mode == "pipeline" else 1)  # stages share a batch
        ids = torch.randint(shape.V - 1, (batch, shape.S))
        begin = time.perf_counter(), time.process_time()
        whole, _ = engine.data_group.all_reduce(batch, ids.numel())
        loss = engine.backward(ids, batch / whole, last=True)
        group.all_reduce(loss, False, False)
        middle = time.process_time()
        engine.update()
        seconds.append(time.perf_counter() - begin[0])
        cpu.append(time.process_time() - begin[1])
        updates.append(time.process_time() - middle)
        if len(seconds) == 2:  # warm
            steps += int(SECONDS / seconds[-1])
            dist.broadcast(steps, 0)
    return {
        "median_s": median(seconds[2:]),
        "min_s": min(seconds[2:]),
        "cpu_s": median(cpu[2:]),
        "update_cpu_s": median(updates[2:]),
    }


# Mode and link of the training steps that each shape is measured with.
STEPS = [
    ("alone", Link(1)),
    ("alone", Link(2)),
    ("ddp", Link(2)),
    ("fsdp", Link(2)),
    ("pipeline", Link(2)),
    ("ddp", Link(2, 1)),
]


def measure_operations() -> Iterator[dict[str, Any]]:
    for link in (*FITTED, *CHECKED):
        log(f"operations, {link.processes} processes, {link}")
        largest = LARGEST_DELAYED if link.delay_ms else 2**28 if link.processes == 2 else 2**23
        for row in run_workers(link, "operations", largest=largest):
            yield {"link": link, **row}


def measure_steps() -> Iterator[dict[str, Any]]:
    for letter in CONFIGS:
        for mode, link in STEPS:
            log(f"steps of {letter}, {mode}, {link.processes} processes, {link}")
            row = run_workers(link, "step", letter=letter, mode=mode)
            yield {"config": letter, "mode": mode, "link": link, **row}


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["worker"]:
        worker(*arguments[1:])
        return
    parts = {"operations": measure_operations, "steps": measure_steps}
    if not set(arguments) <= set(parts):
        raise SystemExit("error: give operations or steps, or nothing to measure both")
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("tc"):
        raise SystemExit("error: network namespaces need Linux, root and iproute2 (ip and tc)")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # runs every `finally`
    measured = json.loads(FILE.read_text()) if FILE.exists() else {}
    measured["machine"] = {"cpu": cpu_name(), "cores": os.cpu_count(), "torch": torch.__version__}
    for part in arguments or parts:
        measured[part] = []
        for row in parts[part]():  # written one by one, so that a failure loses nothing
            measured[part].append(row)
            FILE.write_text(json.dumps(measured, indent=1) + "\n")
    if missing := set(parts) - set(measured):
        raise SystemExit(f"error: {missing.pop()} have not been measured yet; measure them too")
    with errors_in_one_line(ValueError):
        show_fit(measured, fit(measured))


if __name__ == "__main__":
    main(sys.argv[1:])
