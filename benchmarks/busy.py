"""The time of a training step while another process uses a whole core, and without it.

    python benchmarks/busy.py A B C D

fastllm and stock PyTorch take steps in turns, in periods with the other process running or stopped.
"""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from statistics import median

from fastllm.benchmarking.shapes import CONFIGS, Letter
from fastllm.benchmarking.steps import build_fastllm, build_stock, fastllm_step, stock_step
from fastllm.threads import set_threads

PERIODS, SECONDS = 4, 1.0  # periods of each kind; seconds of each contestant in a period


@contextlib.contextmanager
def other_process() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def main(letters: list[Letter]) -> None:
    print(f"{set_threads()} threads; medians in ms, and the ratio of busy to alone")
    print(f"{'config':8}" + "".join(f"{x:>12}" for x in ("", "alone", "busy", "busy/alone")))
    with other_process() as other:
        for letter in letters:
            config = CONFIGS[letter]
            model = build_fastllm(config)
            stock = build_stock(config, "tuned", model)
            steps = {"fastllm": fastllm_step(model), "tuned": stock_step(stock, "tuned")}
            times: dict[tuple[str, bool], list[float]] = {}
            for period in range(2 * PERIODS):
                busy = period % 2 == 1
                other.send_signal(signal.SIGCONT if busy else signal.SIGSTOP)
                for name, step in steps.items():
                    ids = config.random_ids()
                    step(ids)
                    deadline = time.perf_counter() + SECONDS
                    while (start := time.perf_counter()) < deadline:
                        step(ids)
                        times.setdefault((name, busy), []).append(time.perf_counter() - start)
            for name in steps:
                alone, busy_time = (1000 * median(times[name, busy]) for busy in (False, True))
                print(
                    f"{letter:8}{name:>12}{alone:12.2f}{busy_time:12.2f}{busy_time / alone:12.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main([letter for letter in sys.argv[1:] if letter in CONFIGS] or ["A", "B", "C", "D"])  # type: ignore[misc]
