"""The number of threads to compute with."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

CGROUPS = Path("/sys/fs/cgroup")
CGROUP_MEMBERSHIP = Path("/proc/self/cgroup")


def set_threads(requested: int = 0) -> int:
    """Sets PyTorch's thread count, which the C++ kernels share, and returns it.

    Args:
        requested: the number of threads; 0 for `OMP_NUM_THREADS` if that is set, otherwise for the
            physical cores that this process may use. Processes that a launcher started on this
            machine share these cores, also if OMP_NUM_THREADS is 1.
    """
    configured = os.environ.get("OMP_NUM_THREADS")
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if processes_here > 1 and configured == "1":
        configured = None  # the default that torchrun and Ray set
    if requested or not configured:
        torch.set_num_threads(requested or max(1, available_cores() // processes_here))
    threads = torch.get_num_threads()
    # The tokenizers library has a thread pool of its own, by default one thread per CPU.
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
    return threads


def available_cores() -> int:
    """Physical cores that the affinity mask and the cgroup's CPU quota allow; at least 1.

    The hardware threads of a core share its arithmetic units, so they count once. A quota of 2.5
    cores counts as 2: with a third thread, the scheduler would throttle all of them.
    """
    if hasattr(os, "sched_getaffinity"):
        cpus = os.sched_getaffinity(0)
    else:
        cpus = set(range(os.cpu_count() or 1))
    cores = len({_core_of(cpu) for cpu in cpus})
    quota = _cgroup_quota()
    return max(1, min(cores, int(quota)) if quota is not None else cores)


def _core_of(cpu: int) -> str:
    siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        return siblings.read_text()
    except OSError:  # not on Linux: count every CPU as a core
        return str(cpu)


def _cgroup_quota(root: Path = CGROUPS, membership: Path = CGROUP_MEMBERSHIP) -> float | None:
    """The CPU quota of this process's cgroups, in cores; None without a limit."""
    quotas = [_quota_of(cgroup) for cgroup in cgroups("cpu", root, membership)]
    return min((quota for quota in quotas if quota is not None), default=None)


def cgroups(
    controller: str, root: Path = CGROUPS, membership: Path = CGROUP_MEMBERSHIP
) -> Iterator[Path]:
    """The folders of this process's cgroups of a controller (version 1, or 2) and of those above.

    The limit of a cgroup also holds for those below it. A folder need not exist.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # not on Linux: no cgroups
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controller if controllers else root
        folder = top / path.lstrip("/")
        for each in (folder, *folder.parents):
            yield each
            if each == top:
                break


def _quota_of(cgroup: Path) -> float | None:
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()  # version 2
    except (OSError, ValueError):
        try:
            quota = (cgroup / "cpu.cfs_quota_us").read_text()  # version 1
            period = (cgroup / "cpu.cfs_period_us").read_text()
        except OSError:
            return None
    try:
        cores = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # "max": no limit
        return None
    return cores if cores > 0 else None
