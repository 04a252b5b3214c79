"""Whole training steps against stock PyTorch and the machine's limits: `fastllm bench`."""

import sys

from fastllm.benchmarking.config import BenchConfig
from fastllm.command import command, parse_settings


@command
def main(arguments: list[str]) -> None:
    settings = parse_settings(BenchConfig, arguments)
    # After the flags: help and their errors need not wait for PyTorch.
    from fastllm.benchmarking.report import bench

    bench(settings)


if __name__ == "__main__":
    main(sys.argv[1:])
