"""Train a model on a text file: `fastllm train book.txt`."""

import sys

from fastllm.command import command, errors_in_one_line
from fastllm.training.config import TrainConfig, parse_train_config


@command
def main(arguments: list[str]) -> None:
    config = parse_train_config(arguments)
    # After the flags: help and their errors need not wait for PyTorch.
    from fastllm.training.distributed import is_distributed
    from fastllm.training.run import train

    if config.launcher is None:
        train(config)
    elif config.launcher == "deepspeed" and is_distributed():
        with errors_in_one_line(ImportError):
            from fastllm.integrations.deepspeed import DeepSpeed
        train(config, engine_class=DeepSpeed)
    else:
        with errors_in_one_line(Exception):
            launch(config, arguments)


def launch(config: TrainConfig, arguments: list[str]) -> None:
    """Starts the training processes by the launcher of the settings, and waits for them.

    Raises:
        ProcessError: they cannot be started, or failed.
        ImportError: the launcher is not installed.
    """
    from fastllm.training.distributed import ProcessError, check_batch_size, is_distributed
    from fastllm.training.run import choose_run_dir, read_texts, removed_if_unused, run_name

    count = config.num_workers
    if is_distributed():
        raise ProcessError(
            f"{config.launcher} starts the processes on its own: omit torchrun or --launcher"
        )
    if count < 1:
        raise ProcessError(
            f"--launcher {config.launcher} needs --num_workers, the number of its processes"
        )
    if config.parallel != "pipeline":
        check_batch_size(config.batch_size, count)
    # A wrong text fails here, not in every process.
    run_dir, is_new = choose_run_dir(config, run_name(config, read_texts(config)))
    with removed_if_unused(run_dir, is_new):
        if config.launcher == "ray":
            from fastllm.integrations import ray

            ray.launch(config, run_dir)
        else:
            from fastllm.integrations import deepspeed

            # Its processes must not choose a folder again.
            deepspeed.launch(count, [*arguments, "--out_dir", str(run_dir)])


if __name__ == "__main__":
    main(sys.argv[1:])
