"""The processes that train one model together, and what they tell each other."""

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

# The others wait while the first makes tokens of a text, which may be large.
TIMEOUT = timedelta(hours=6)


class ProcessError(Exception):
    """The processes of a run cannot work together; the message says why and what to try."""


class LostProcessError(ProcessError):
    """Another process of the run has ended while this one waited for it."""


@dataclass(frozen=True)
class ProcessGroup:
    """This process and the others of its run.

    Attributes:
        rank: the number of this one; rank 0, the main process, logs and writes for all.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> list[T]:
        """This process's part of what all of them do: neighbours, none twice, none left out."""
        first, end = (len(items) * (self.rank + i) // self.size for i in (0, 1))
        return list(items[first:end])

    def all_reduce(self, *numbers: float) -> list[float]:
        """Each number, added up over all processes in float64."""
        if self.size == 1:
            return list(numbers)
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        total = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.tolist()

    def broadcast(self, make: Callable[[], T]) -> T:
        """What the first process makes, in every process.

        Raises:
            ProcessError: it could not; there, what `make` raised.
        """
        if self.size == 1:
            return make()
        made: list[Any] = [None]
        try:
            if self.is_main:
                made = [(make(),)]
        finally:  # also where that raised: the others wait for it
            dist.broadcast_object_list(made)
        if made[0] is None:
            raise ProcessError("the first process could not go on; its message says why")
        return made[0][0]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """What is inside runs in the first process, and where that succeeds in the others.

        Raises:
            ProcessError: in the others, where it failed in the first.
        """
        if self.is_main:
            done = False
            try:
                yield
                done = True
            finally:
                if self.size > 1:
                    dist.broadcast_object_list([(None,) if done else None])
        else:
            self.broadcast(lambda: None)
            yield

    def barrier(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def check_agreement(self, settings: Mapping[str, Any]) -> None:
        """Raises a `ProcessError` where a process has other settings than the first."""
        if self.size == 1:
            return
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, dict(settings))
        for rank, theirs in enumerate(found):
            for name, value in found[0].items():
                if theirs[name] != value:
                    raise ProcessError(
                        f"process {rank} has {name} {theirs[name]!r}, the first one {value!r}; "
                        "start all of them with the same command"
                    )

    @contextmanager
    def reporting_peer_loss(self) -> Iterator[None]:
        """Says in one line that another process ended while this one waited for it."""
        try:
            yield
        except RuntimeError as error:
            if self.size > 1 and re.search(r"(closed|reset) by peer|Broken pipe", str(error)):
                raise LostProcessError(
                    "another process of this run has ended; it was killed, or says why"
                ) from error
            raise


SINGLE = ProcessGroup()


def is_distributed() -> bool:
    """Whether torchrun, or another launcher, has started this process; its group may be of one."""
    initialized = dist.is_available() and dist.is_initialized()
    return initialized or ("RANK" in os.environ and "WORLD_SIZE" in os.environ)


def check_batch_size(batch_size: int, count: int) -> None:
    """Raises a `ProcessError` where a batch has fewer sequences than there are processes."""
    if batch_size < count:
        raise ProcessError(
            f"a batch of {batch_size} cannot be shared out among {count} processes; start fewer, "
            f"or set batch_size to {count} or more"
        )


@contextmanager
def process_group(device: str, even_alone: bool = False) -> Iterator[ProcessGroup]:
    """This process with the others that torchrun, or another launcher, started; alone without one.

    Args:
        even_alone: a process that was started as the only one makes a group of one.

    Raises:
        ProcessError: they cannot meet.
    """
    initialized = dist.is_available() and dist.is_initialized()  # a launcher such as Ray's does it
    if device == "cuda" and is_distributed():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if not initialized:
        if not is_distributed() or (os.environ["WORLD_SIZE"] == "1" and not even_alone):
            yield SINGLE
            return
        try:
            _rendezvous("nccl" if device == "cuda" else "gloo")
        except (ValueError, RuntimeError) as error:
            raise ProcessError(_why_not_met(str(error))) from error
    try:
        yield ProcessGroup(dist.get_rank(), dist.get_world_size())
    finally:
        if not initialized:
            dist.destroy_process_group()


def _rendezvous(backend: str) -> None:
    from torch.distributed.rendezvous import rendezvous

    store, rank, count = next(rendezvous("env://"))
    store = dist.PrefixStore(_name_of_start(store, rank, count), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)


def _name_of_start(store: "dist.Store", rank: int, count: int) -> str:
    """A name for what the living write into torchrun's store, which outlives them.

    Where they are started again, the addresses of the dead must not be taken for theirs. torchrun's
    count of restarts is no such name: each machine counts its own.
    """
    me = uuid4().hex
    if rank == 0:
        store.set("start", me)
        store.set(me, " ".join(store.get(f"{me}/{i}").decode() for i in range(1, count)))
        return me
    while True:
        name = store.get("start").decode()
        store.set(f"{name}/{rank}", me)
        # The first process of an earlier start has named others, or nobody.
        if store.check([name]) and me in store.get(name).decode():
            return name
        time.sleep(0.05)


def _why_not_met(error: str) -> str:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given = ", ".join(f"{name}={os.environ.get(name, '')}" for name in names)
    if "EADDRINUSE" in error:
        remedy = "the port is in use: give another one, with torchrun's --master_port"
    elif re.search("time(d )?out", error.lower()):
        remedy = "not all of them came: start WORLD_SIZE processes, with ranks from 0 on"
    else:
        remedy = error.partition("\n")[0]
    return f"the processes of this run cannot meet ({given}): {remedy}"
