"""Train a model on a text file: `python -m fastllm.train --file_path book.txt`."""

import sys

from fastllm.command import errors_in_one_line
from fastllm.training.config import TrainConfig, parse_train_config
from fastllm.training.distributed import ProcessError, check_batch_size, is_distributed
from fastllm.training.run import choose_run_dir, run_name, train


def main(arguments: list[str]) -> None:
    config = parse_train_config(arguments)
    if config.launcher is None or (config.launcher == "deepspeed" and is_distributed()):
        train(config)
    else:
        with errors_in_one_line(ProcessError, OSError, ValueError, ImportError):
            launch(config, arguments)


def launch(config: TrainConfig, arguments: list[str]) -> None:
    """Has the launcher start processes that train; ends when they do.

    Raises:
        ProcessError: they cannot be started.
        ImportError: the launcher is not installed.
    """
    count = config.num_workers
    if is_distributed():
        raise ProcessError(
            f"{config.launcher} starts the processes by itself: leave torchrun or --launcher out"
        )
    if count < 1:
        raise ProcessError(
            f"--launcher {config.launcher} needs --num_workers, the number of its processes"
        )
    if config.parallel != "pipeline":
        check_batch_size(config.batch_size, count)
    if config.file_path:
        config.file_path.open("rb").close()  # a mistake in it is told at once
    run_dir = choose_run_dir(config, run_name(config))
    if config.launcher == "ray":
        from fastllm.integrations import ray

        ray.launch(config, run_dir)
    else:
        from fastllm.integrations import deepspeed

        deepspeed.launch(count, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
