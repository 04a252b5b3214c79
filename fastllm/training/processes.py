"""The processes that train one model together, and what they tell each other."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class ProcessError(Exception):
    """The processes of a run cannot work together; the message says why and what to try."""


@dataclass(frozen=True)
class Processes:
    """This process and the others of its run.

    Attributes:
        rank: the number of this one; 0 is the first, which speaks and writes for all.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of what all of them do: neighbours, none twice, none left out."""
        first, end = (len(items) * (self.rank + i) // self.count for i in (0, 1))
        return list(items[first:end])

    def sum(self, *numbers: float) -> list[float]:
        """Each number, added up over all processes in float64."""
        if self.count == 1:
            return list(numbers)
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        total = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.tolist()

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, in every process."""
        made: list[Any] = [make() if self.is_first else None]
        if self.count > 1:
            dist.broadcast_object_list(made)
        return made[0]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier()

    def check_agreement(self, settings: Mapping[str, Any]) -> None:
        """Raises a `ProcessError` where a process has other settings than the first."""
        if self.count == 1:
            return
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, dict(settings))
        for rank, theirs in enumerate(found):
            for name, value in found[0].items():
                if theirs[name] != value:
                    raise ProcessError(
                        f"process {rank} has {name} {theirs[name]!r}, the first one {value!r}; "
                        "start all of them with the same command"
                    )


ALONE = Processes()


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """This process with the others that torchrun, or another launcher, started; alone without one.

    Raises:
        ProcessError: they cannot meet.
    """
    started_by_launcher = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    already_met = dist.is_initialized()  # a launcher such as Ray's does it
    if not already_met:
        if not started_by_launcher or os.environ["WORLD_SIZE"] == "1":
            yield ALONE
            return
        try:
            if device == "cuda":
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            dist.init_process_group("nccl" if device == "cuda" else "gloo")
        except (ValueError, RuntimeError) as error:
            raise ProcessError(_why_not_met(str(error))) from error
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        if not already_met:
            dist.destroy_process_group()


def _why_not_met(error: str) -> str:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given = ", ".join(f"{name}={os.environ.get(name, '')}" for name in names)
    if "EADDRINUSE" in error:
        remedy = "the port is in use: give another one, with torchrun's --master_port"
    elif "Timed out" in error or "timed out" in error:
        remedy = "not all of them came: start WORLD_SIZE processes, with ranks from 0 on"
    else:
        remedy = error.splitlines()[0]
    return f"the processes of this run cannot meet ({given}): {remedy}"
