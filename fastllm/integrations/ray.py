"""Under Ray: `train --launcher ray --num_workers 2`, and the trials of `tune --launcher ray`.

Ray Train starts the workers, and starts all of them again when one dies; they go on from the last
checkpoint of the run. What they compute is what processes under torchrun do. A trial is a process
beside an actor, which keeps its cores for it.
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

from fastllm.command import StopRequest, log, stop_on_signals
from fastllm.device import choose_device
from fastllm.threads import available_cores
from fastllm.training.config import TrainConfig
from fastllm.training.distributed import TIMEOUT, LostProcessError, ProcessError
from fastllm.training.loop import Trainer
from fastllm.tuning.trial import TrialProcess

# Read by Ray as it is imported. Nothing of a run is for others to know.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"  # it would say everything twice

try:
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer
except ImportError as error:
    raise ImportError(f"--launcher ray needs Ray ({error}): pip install 'fastllm[ray]'") from None

POLL_S = 0.2
# Memory for what Ray's processes hand each other, which is next to nothing here; Ray's least.
OBJECT_STORE_BYTES = 80 * 2**20
# Until workers usually are there.
START_S = 60
# Files in the run's folder: what workers say, and by which signal they are to stop.
LOG, STOP = "ray.log", "ray.stop"


@contextmanager
def connected() -> Iterator[None]:
    """The cluster that RAY_ADDRESS names; without it this process's cores, until the block ends.

    Raises:
        ConnectionError: there is no such cluster.
    """
    address = os.environ.get("RAY_ADDRESS", "local")
    of_our_own: dict[str, Any] = {
        "address": "local",
        "num_cpus": available_cores(),
        "object_store_memory": OBJECT_STORE_BYTES,
        "include_dashboard": False,
    }
    check_listening(address)
    given = of_our_own if address == "local" else {}
    try:
        ray.init(**given, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise ConnectionError(
            f"{error}; a cluster that `ray start` has given a token wants RAY_AUTH_MODE=token"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def check_listening(address: str) -> None:
    """Raises a `ConnectionError` where nobody listens; Ray itself would try for minutes."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if port.isdigit():  # else it is one of Ray's words
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            raise ConnectionError(
                f"there is no Ray at RAY_ADDRESS={address} ({error}): `ray start --head` starts one"
            ) from None


def cores_of_each(count: int, asked: int = 0) -> int:
    """How many cores each of `count` processes gets: those asked for, or all divided by machines.

    Raises:
        ProcessError: there are not so many.
    """
    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    machines = [int(cores) for cores in nodes if cores]
    most = max(machines, default=0)
    shares = [k for k in range(1, most + 1) if sum(n // k for n in machines) >= count]
    if not shares or asked > shares[-1]:
        raise ProcessError(
            f"Ray's machines have too few cores ({', '.join(map(str, machines)) or 'none'}) for "
            f"{count} processes of {asked or 1}; start fewer"
        )
    return asked or shares[-1]


def launch(config: TrainConfig, run_dir: Path) -> None:
    """Trains in `config.num_workers` workers; exits as they do.

    Raises:
        ProcessError: there are more workers than cores, or they have failed.
    """
    # The workers have another current folder.
    count, run_dir = config.num_workers, run_dir.resolve()
    paths = {"out_dir": run_dir}
    for name in ("file_path", "tokenizer"):
        if isinstance(path := getattr(config, name), Path):
            paths[name] = path.resolve()
    settings = config.model_copy(update={**paths, "launcher": None, "num_workers": 0})
    until = time.time() + 60 * config.max_minutes if config.max_minutes else math.inf
    stop, log_file, records = run_dir / STOP, run_dir / LOG, run_dir / ".ray"
    # What a killed run has left: Ray would take its records up again.
    stop.unlink(missing_ok=True)
    shutil.rmtree(records, ignore_errors=True)
    try:
        with connected():
            cores = cores_of_each(count, config.threads)
            if not config.quiet:
                log(f"ray         {count} workers of {cores} cores; they take a while to start")
            run_dir.mkdir(parents=True, exist_ok=True)
            log_file.touch()
            trainer = TorchTrainer(
                _work,
                train_loop_config={"settings": settings.model_dump(mode="json"), "until": until},
                torch_config=TorchConfig(timeout_s=int(TIMEOUT.total_seconds())),
                scaling_config=ray.train.ScalingConfig(
                    num_workers=count,
                    use_gpu=choose_device(config.device) == "cuda",
                    resources_per_worker={"CPU": cores},
                ),
                run_config=ray.train.RunConfig(
                    name=records.name,
                    storage_path=str(run_dir),
                    failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
                    callbacks=[_Failures(log_file, config.max_failures)],
                    logging_config=ray.train.LoggingConfig(log_level="CRITICAL"),
                ),
            )
            asked = StopRequest()
            # In a thread, so that Ray leaves the signals to us.
            pool = ThreadPoolExecutor(1)
            result = pool.submit(trainer.fit)
            pool.shutdown(wait=False)
            patience = time.monotonic() + START_S
            with log_file.open(newline="") as said, stop_on_signals(asked):
                said.seek(0, os.SEEK_END)
                done = False
                while not done:
                    done = wait([result], POLL_S).done != set()
                    sys.stderr.write(said.read())
                    sys.stderr.flush()
                    begun = stop.exists()
                    if (number := asked.poll()) and not begun:
                        raise SystemExit(128 + number)
                    if number:
                        stop.write_text(str(int(number)))
                    if time.monotonic() > patience and not begun:
                        patience = math.inf
                        log("ray         still waiting for workers: others may hold the cores")
            status = result.result().return_value
    except ray.train.TrainingFailedError as error:
        raise ProcessError(_why_ended(error)) from None
    except ray.exceptions.RayError as error:  # as by a signal to all processes of a service
        reason = str(error).splitlines()[0]
        raise ProcessError(
            f"Ray has ended ({reason}); --resume goes on from the last checkpoint"
        ) from None
    finally:
        shutil.rmtree(records, ignore_errors=True)
        stop.unlink(missing_ok=True)
    if status:
        raise SystemExit(status)


def _work(given: dict[str, Any]) -> int:
    """In a worker: trains; the exit status."""
    from fastllm.training.run import train

    config = TrainConfig(**given["settings"])
    assert config.out_dir is not None
    (config.out_dir / STOP).touch()  # from now on somebody reads it
    # After a restart, even if the run was new when it began.
    config.resume = any(config.out_dir.glob("checkpoints/step-*"))
    with (config.out_dir / LOG).open("a", buffering=1) as log, redirect_stderr(log):
        try:
            train(config, begun=partial(_begin, until=given["until"]))
        except SystemExit as end:
            if isinstance(end.code, str) and isinstance(end.__context__, LostProcessError):
                raise end.__context__ from None
            if isinstance(end.code, str):
                raise RefusedError(end.code.removeprefix("error: ")) from None
            return int(end.code or 0)
    return 0


def _begin(trainer: Trainer, until: float) -> None:
    # A signal to the command, or its last minute, is one to its first worker, and the others are
    # told by that.
    if trainer.config.max_minutes:  # after a restart, what is left of them
        trainer.config.max_minutes = max((until - time.time()) / 60, 0.001)

    def watch() -> None:
        while not (text := stop.read_text() if stop.exists() else ""):
            time.sleep(POLL_S)
        trainer.stop(signal.Signals(int(text)))

    stop = trainer.run_dir / STOP
    if trainer.group.is_main:
        threading.Thread(target=watch, daemon=True).start()


class RefusedError(Exception):
    """A worker has ended with a message; it would do so again."""


class _Failures(ray.train.UserCallback):
    """In Ray's controller: says that the run starts again, or keeps it from doing so."""

    def __init__(self, log: Path, max_failures: int) -> None:
        self.log = log
        self.restarts_left = max_failures

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        _, first = min(worker_exceptions.items())
        if all(isinstance(error, RefusedError) for error in worker_exceptions.values()):
            raise first  # which Ray does not try again
        if self.restarts_left:
            self.restarts_left -= 1
            with self.log.open("a") as log:
                log.write(
                    f"\n{_describe(worker_exceptions)}; starting again, from the last checkpoint\n"
                )


def _describe(failures: dict[int, Exception]) -> str:
    def place(failure: tuple[int, Exception]) -> tuple[bool, int]:
        return isinstance(failure[1], LostProcessError), failure[0]

    rank, error = min(failures.items(), key=place)  # what others say of it tells less
    return f"worker {rank} has failed ({str(error).splitlines()[0]})"


def _why_ended(error: Exception) -> str:
    if isinstance(error, ray.train.ControllerError):
        return str(error.controller_failure)
    assert isinstance(error, ray.train.WorkerGroupError)
    return (
        f"{_describe(error.worker_failures)}, once more than --max_failures allows; --resume goes "
        "on from the last checkpoint"
    )


class RemoteTrial:
    """A `TrialProcess` beside an actor on whichever machine of Ray's has the cores for it.

    Until one has them it waits, and has not ended.

    Attributes:
        lost: how its machine ended it, if that is what happened.
    """

    lost = ""

    def __init__(
        self,
        command: str,
        flags: list[str],
        threads: int,
        log: Path,
        current_folder: Path,
        on_gpu: bool,
    ) -> None:
        actor = ray.remote(TrialProcess).options(num_cpus=threads, num_gpus=int(on_gpu))
        self._actor = actor.remote(command, flags, threads, log, current_folder)
        self._status = self._actor.poll.remote()
        self._begun = False
        self._ended: int | None = None

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None before the end."""
        if self._ended is None and ray.wait([self._status], timeout=0)[0]:
            try:
                self._ended = ray.get(self._status)
                self._status = self._actor.poll.remote()
                self._begun = True
            except ray.exceptions.RayError as error:
                self.lost = str(error).strip().splitlines()[-1].strip()
                self._ended = 1
            if self._ended is not None:
                ray.kill(self._actor)  # which gives its cores back
        return self._ended

    def terminate(self) -> None:
        """Asks the process to end."""
        if self._begun:
            self._actor.terminate.remote()
        else:
            ray.kill(self._actor)
            self._ended = -signal.SIGTERM

    def kill(self) -> None:
        """Ends the process and those that it has started, at once."""
        if self.poll() is None:
            if self._begun:
                ray.wait([self._actor.kill.remote()], timeout=1)
            ray.kill(self._actor)
            self._ended = -signal.SIGKILL
