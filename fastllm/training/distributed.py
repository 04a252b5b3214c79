"""The process group of a training run: one process, or several that train one model together."""

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist

T = TypeVar("T")

# Other ranks wait while rank 0 tokenizes the text, which may be large.
TIMEOUT = timedelta(hours=6)

# How gloo and NCCL word the loss of a peer, in errors that have no class of their own.
_PEER_LOSS = re.compile(r"(closed|reset) by peer|Broken pipe|remote process exit")


class ProcessError(Exception):
    """The processes of a run cannot work together; the message says why and what to try."""


class LostProcessError(ProcessError):
    """Another process of the run ended while this one waited for it."""


@dataclass(frozen=True)
class ProcessGroup:
    """This process and the others that train with it.

    All methods but `shard` are collective operations: every rank calls them, in the same order.

    Attributes:
        rank: this process's number; rank 0, the main process, logs and writes for all.
        size: the number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> list[T]:
        """This rank's contiguous shard of the items; the shards partition them."""
        first, end = (len(items) * (self.rank + i) // self.size for i in (0, 1))
        return list(items[first:end])

    def all_reduce(self, *numbers: float) -> list[float]:
        """The sum of each number over all ranks, in float64."""
        if self.size == 1:
            return list(numbers)
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        total = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.tolist()

    def broadcast(self, make: Callable[[], T]) -> T:
        """Calls `make` on rank 0 and returns its result on every rank.

        Raises:
            ProcessError: on the other ranks, if `make` failed; rank 0 raises what `make` raised.
        """
        if self.size == 1:
            return make()
        result: list[Any] = [None]
        try:
            if self.is_main:
                result = [(make(),)]
        finally:  # after a failure too: the other ranks wait for the outcome
            dist.broadcast_object_list(result)
        if result[0] is None:
            raise ProcessError("rank 0 failed; its message says why")
        return result[0][0]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Runs the block on rank 0, then, if it succeeded, on the other ranks.

        Raises:
            ProcessError: on the other ranks, if it failed on rank 0.
        """
        if self.is_main:
            succeeded = False
            try:
                yield
                succeeded = True
            finally:
                if self.size > 1:
                    dist.broadcast_object_list([(None,) if succeeded else None])
        else:
            self.broadcast(lambda: None)
            yield

    def check_agreement(self, settings: Mapping[str, Any]) -> None:
        """Raises a `ProcessError` if the settings of another rank differ from those of rank 0."""
        if self.size == 1:
            return
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, dict(settings))
        for rank, theirs in enumerate(found):
            for name, value in found[0].items():
                if theirs[name] != value:
                    raise ProcessError(
                        f"rank {rank} has {name} {theirs[name]!r}, but rank 0 has {value!r}; "
                        "start all processes with the same command"
                    )

    @contextmanager
    def reporting_peer_loss(self) -> Iterator[None]:
        """Turns the errors of communicating with a process that has ended into one clear error.

        Raises:
            LostProcessError: another process has ended.
        """
        try:
            yield
        except RuntimeError as error:
            is_network_error = isinstance(error, dist.DistNetworkError)
            if self.size > 1 and (is_network_error or _PEER_LOSS.search(str(error))):
                raise LostProcessError(
                    "another process of this run has ended; it was killed, or printed why"
                ) from error
            raise


SINGLE = ProcessGroup()


def is_distributed() -> bool:
    """Whether torchrun, or another launcher, started this process, even as the only one."""
    initialized = dist.is_available() and dist.is_initialized()
    return initialized or ("RANK" in os.environ and "WORLD_SIZE" in os.environ)


def check_batch_size(batch_size: int, size: int) -> None:
    """Raises a `ProcessError` if a batch has fewer sequences than there are processes."""
    if batch_size < size:
        raise ProcessError(
            f"a batch of {batch_size} cannot be sharded over {size} processes; start fewer, or set "
            f"batch_size to {size} or more"
        )


@contextmanager
def process_group(device: str, even_single: bool = False) -> Iterator[ProcessGroup]:
    """This process with the others started by torchrun or another launcher, if any.

    Args:
        even_single: initialize `torch.distributed` for a process that was started as the only one.

    Raises:
        ProcessError: the processes cannot connect.
    """
    # A launcher such as Ray's has initialized it already.
    initialized = dist.is_available() and dist.is_initialized()
    if device == "cuda" and is_distributed():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if not initialized:
        if not is_distributed() or (os.environ["WORLD_SIZE"] == "1" and not even_single):
            yield SINGLE
            return
        try:
            _rendezvous("nccl" if device == "cuda" else "gloo")
        except (ValueError, RuntimeError) as error:
            raise ProcessError(_rendezvous_problem(str(error))) from error
    try:
        yield ProcessGroup(dist.get_rank(), dist.get_world_size())
    finally:
        if not initialized:
            dist.destroy_process_group()
            # gloo's threads free the tensors of the last operations a little later, for which they
            # need the interpreter: one that has exited meanwhile aborts the process (torch 2.13).
            time.sleep(0.2)


def _rendezvous(backend: str) -> None:
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://"))
    store = dist.PrefixStore(_launch_prefix(store, rank, size), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)


def _launch_prefix(store: "dist.Store", rank: int, size: int) -> str:
    """A prefix for the keys of this launch in torchrun's store, which outlives the processes.

    After a restart, the addresses of processes that ended must not be taken for current ones.
    torchrun's restart count is no such prefix: each machine counts its own restarts.
    """
    own_id = uuid4().hex
    if rank == 0:
        store.set("start", own_id)
        store.set(own_id, " ".join(store.get(f"{own_id}/{i}").decode() for i in range(1, size)))
        return own_id
    while True:
        prefix = store.get("start").decode()
        store.set(f"{prefix}/{rank}", own_id)
        # Rank 0 of an earlier launch has listed other ids, or none.
        if store.check([prefix]) and own_id in store.get(prefix).decode():
            return prefix
        time.sleep(0.05)


def _rendezvous_problem(error: str) -> str:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given = ", ".join(f"{name}={os.environ.get(name, '')}" for name in names)
    if "EADDRINUSE" in error:
        remedy = "the port is in use: choose another one with torchrun's --master_port"
    elif re.search("time(d )?out", error.lower()):
        remedy = "not all processes connected: start WORLD_SIZE of them, with ranks from 0"
    else:
        remedy = error.partition("\n")[0]
    return f"the processes of this run cannot connect ({given}): {remedy}"
