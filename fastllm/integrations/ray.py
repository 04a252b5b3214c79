"""Ray: `train --launcher ray --num_workers 2`, and the trials of `tune --launcher ray`.

Ray Train starts the workers, and restarts all of them when one dies; they continue from the last
checkpoint of the run. They compute the same as processes under torchrun. A trial is a process
beside an actor, which reserves its cores.
"""

import logging
import math
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

from fastllm.command import StopRequest, first_line, log, stop_on_signals
from fastllm.data.sources import absolute
from fastllm.device import choose_device
from fastllm.threads import available_cores
from fastllm.training.checkpoint import has_checkpoint
from fastllm.training.config import TrainConfig
from fastllm.training.distributed import TIMEOUT, LostProcessError, ProcessError
from fastllm.training.loop import Trainer
from fastllm.training.run import train
from fastllm.tuning.trial import TrialProcess

# Ray reads these when it is imported.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # send nothing about a run to anybody
os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"  # it would print everything twice

try:
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer
except ImportError as error:
    raise ImportError(f"--launcher ray needs Ray ({error}): pip install 'ray[train]'") from None

POLL_S = 0.2
# Shared memory for objects that processes exchange: Ray's minimum, since there are almost none.
OBJECT_STORE_BYTES = 80 * 2**20
# Workers have usually started after this time.
START_S = 60
# In the run's folder: the stderr of the workers; the number of the signal that is to stop them,
# empty until then; and Ray's own state.
LOG, STOP, STATE = "ray.log", "ray.stop", ".ray"


@contextmanager
def connected() -> Iterator[None]:
    """Connects to the cluster at RAY_ADDRESS, or starts one of this process's cores.

    Raises:
        ConnectionError: there is no such cluster.
    """
    address = os.environ.get("RAY_ADDRESS", "local")
    options: dict[str, Any] = {}
    if address == "local":
        options = {
            "address": "local",
            "num_cpus": available_cores(),
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
    _check_reachable(address)
    try:
        ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise ConnectionError(
            f"{error}; a cluster with a token, as `ray start` makes it, needs RAY_AUTH_MODE=token"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raises a `ConnectionError` at once if nothing listens; Ray itself would retry for minutes."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if port.isdigit():  # otherwise it is a keyword such as "auto"
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            raise ConnectionError(
                f"no Ray cluster at RAY_ADDRESS={address} ({error}): `ray start --head` starts one"
            ) from None


def cores_per_process(count: int, requested: int = 0) -> int:
    """Cores for each of `count` processes: those requested, or an equal share of the machines.

    Raises:
        ProcessError: the machines have too few cores.
    """
    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    machines = [int(cores) for cores in nodes if cores]
    largest = max(machines, default=0)
    possible = [k for k in range(1, largest + 1) if sum(n // k for n in machines) >= count]
    if not possible or requested > possible[-1]:
        raise ProcessError(
            f"Ray's machines have too few cores ({', '.join(map(str, machines)) or 'none'}) for "
            f"{count} processes ({requested or 1} per process); start fewer"
        )
    return requested or possible[-1]


def launch(config: TrainConfig, run_dir: Path) -> None:
    """Trains in `config.num_workers` workers; exits with their status.

    Raises:
        ProcessError: there are more workers than cores, or they failed.
    """
    run_dir = run_dir.resolve()
    deadline = time.time() + 60 * config.max_minutes if config.max_minutes else math.inf
    _remove_state(run_dir)  # of a run that was killed: Ray would continue from it
    try:
        with connected():
            cores = cores_per_process(config.num_workers, config.threads)
            if not config.quiet:
                log(
                    f"ray         {config.num_workers} workers of {cores} cores; they take a while "
                    "to start"
                )
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / LOG).touch()
            status = _fit(_make_trainer(config, run_dir, cores, deadline), run_dir)
    except ray.train.TrainingFailedError as error:
        raise ProcessError(_describe_failure(error)) from None
    except ray.exceptions.RayError as error:  # e.g. a signal to all processes of a service
        reason = first_line(error)
        raise ProcessError(
            f"Ray has ended ({reason}); --resume continues from the last checkpoint"
        ) from None
    finally:
        _remove_state(run_dir)
    if status:
        raise SystemExit(status)


def _remove_state(run_dir: Path) -> None:
    shutil.rmtree(run_dir / STATE, ignore_errors=True)
    (run_dir / STOP).unlink(missing_ok=True)


def _make_trainer(config: TrainConfig, run_dir: Path, cores: int, deadline: float) -> TorchTrainer:
    return TorchTrainer(
        _work,
        train_loop_config={"settings": _worker_settings(config, run_dir), "deadline": deadline},
        torch_config=TorchConfig(timeout_s=int(TIMEOUT.total_seconds())),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=choose_device(config.device) == "cuda",
            resources_per_worker={"CPU": cores},
        ),
        run_config=ray.train.RunConfig(
            name=STATE,
            storage_path=str(run_dir),
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            callbacks=[_FailureCallback(run_dir / LOG, config.max_failures)],
            logging_config=ray.train.LoggingConfig(log_level="CRITICAL"),
        ),
    )


def _worker_settings(config: TrainConfig, run_dir: Path) -> dict[str, Any]:
    """The settings of a worker, with absolute paths: its current folder is another one."""
    paths: dict[str, Any] = {"out_dir": run_dir}
    if isinstance(config.tokenizer, Path):
        paths["tokenizer"] = config.tokenizer.resolve()
    if config.file_path:
        paths["file_path"] = [absolute(path) for path in config.file_path]
    worker_config = config.model_copy(update={**paths, "launcher": None, "num_workers": 0})
    return worker_config.model_dump(mode="json")


def _fit(trainer: TorchTrainer, run_dir: Path) -> int:
    """Runs the trainer, prints the workers' log and passes signals on; returns their status."""
    request, stop_file = StopRequest(), run_dir / STOP
    pool = ThreadPoolExecutor(1)
    with (run_dir / LOG).open(newline="") as worker_log, stop_on_signals(request):
        worker_log.seek(0, os.SEEK_END)
        # In a thread: in the main thread Ray would install signal handlers of its own.
        result = pool.submit(trainer.fit)
        pool.shutdown(wait=False)
        late = time.monotonic() + START_S
        while True:
            done = wait([result], POLL_S).done
            sys.stderr.write(worker_log.read())
            sys.stderr.flush()
            started = stop_file.exists()
            if number := request.poll():
                if not started:
                    raise SystemExit(128 + number)
                stop_file.write_text(str(int(number)))
            if time.monotonic() > late and not started:
                late = math.inf
                log("ray         still waiting for workers: other jobs may hold the cores")
            if done:
                break
    return int(result.result().return_value)


def _work(loop_config: dict[str, Any]) -> int:
    """Trains in a worker; returns the exit status."""
    run_dir = Path(loop_config["settings"]["out_dir"])
    (run_dir / STOP).touch()  # from here on, the worker reads it
    # A restart resumes even a run that began as a new one.
    settings = {**loop_config["settings"], "resume": has_checkpoint(run_dir)}
    config = TrainConfig(**settings)
    begun = partial(_prepare_to_stop, deadline=loop_config["deadline"])
    with (run_dir / LOG).open("a", buffering=1) as worker_log, redirect_stderr(worker_log):
        try:
            train(config, begun)
        except SystemExit as end:
            if isinstance(end.code, str) and isinstance(end.__context__, LostProcessError):
                raise end.__context__ from None
            if isinstance(end.code, str):
                raise PermanentError(end.code.removeprefix("error: ")) from None
            return int(end.code or 0)
    return 0


def _prepare_to_stop(trainer: Trainer, deadline: float) -> None:
    """Stops the trainer at the deadline of the command, and on the command's signals.

    The trainer of rank 0 shares both with the other ranks.
    """
    if trainer.max_minutes:  # counted from the start of the command, across restarts
        trainer.max_minutes = max((deadline - time.time()) / 60, 0.001)

    def watch() -> None:
        while not (text := stop_file.read_text() if stop_file.exists() else ""):
            time.sleep(POLL_S)
        trainer.stop(signal.Signals(int(text)))

    stop_file = trainer.run_dir / STOP
    if trainer.group.is_main:
        threading.Thread(target=watch, daemon=True).start()


class PermanentError(Exception):
    """A worker ended with an error message; a restart would end in the same way."""


class _FailureCallback(ray.train.UserCallback):
    """Runs in Ray's controller: logs a restart, or prevents it after a `PermanentError`."""

    def __init__(self, log_file: Path, max_failures: int) -> None:
        self.log_file = log_file
        self.restarts_left = max_failures

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        _, first = min(worker_exceptions.items())
        if all(isinstance(error, PermanentError) for error in worker_exceptions.values()):
            raise first  # Ray does not retry after an exception in a callback
        if self.restarts_left:
            self.restarts_left -= 1
            with self.log_file.open("a") as log_file:
                log_file.write(
                    f"\n{_describe_workers(worker_exceptions)}; restarting from the last "
                    "checkpoint\n"
                )


def _describe_workers(failures: dict[int, Exception]) -> str:
    """The failure of the lowest rank, preferably one that was not caused by another worker's."""

    def order(failure: tuple[int, Exception]) -> tuple[bool, int]:
        rank, error = failure
        return isinstance(error, LostProcessError), rank

    rank, error = min(failures.items(), key=order)
    return f"worker {rank} has failed ({first_line(error)})"


def _describe_failure(error: Exception) -> str:
    if isinstance(error, ray.train.ControllerError):
        return str(error.controller_failure)
    assert isinstance(error, ray.train.WorkerGroupError)
    return (
        f"{_describe_workers(error.worker_failures)} and --max_failures allows no more restarts; "
        "--resume continues from the last checkpoint"
    )


class RemoteTrial:
    """A `TrialProcess` beside an actor, on any machine of the cluster with enough free cores.

    It counts as running while it waits for the cores.

    Attributes:
        lost: how its machine ended it, if it was the machine's fault.
    """

    lost = ""

    def __init__(
        self,
        command: str,
        flags: list[str],
        threads: int,
        log_file: Path,
        current_folder: Path,
        on_gpu: bool,
    ) -> None:
        actor = ray.remote(TrialProcess).options(num_cpus=threads, num_gpus=int(on_gpu))
        self._actor = actor.remote(command, flags, threads, log_file, current_folder)
        self._next_poll = self._actor.poll.remote()
        self._started = False
        self._status: int | None = None

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs or waits."""
        if self._status is None and ray.wait([self._next_poll], timeout=0)[0]:
            try:
                self._status = ray.get(self._next_poll)
                self._next_poll = self._actor.poll.remote()
                self._started = True
            except ray.exceptions.RayError as error:
                self.lost = str(error).strip().splitlines()[-1].strip()
                self._status = 1
            if self._status is not None:
                ray.kill(self._actor)  # frees its cores
        return self._status

    def terminate(self) -> None:
        """Asks the process to end."""
        if self._started:
            self._actor.terminate.remote()
        else:
            ray.kill(self._actor)
            self._status = -signal.SIGTERM

    def kill(self) -> None:
        """Ends the process and those it started, at once."""
        if self.poll() is None:
            if self._started:
                ray.wait([self._actor.kill.remote()], timeout=1)
            ray.kill(self._actor)
            self._status = -signal.SIGKILL
