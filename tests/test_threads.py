import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastllm import threads as module
from fastllm.threads import available_cores, set_threads
from tests.conftest import needs_extension


@pytest.fixture
def membership(tmp_path: Path) -> Path:
    """The process is in a cgroup of version 2, two levels down."""
    path = tmp_path / "membership"
    path.write_text("0::/user/service\n")
    (tmp_path / "user/service").mkdir(parents=True)
    return path


@pytest.mark.parametrize(
    ("text", "expected"), [("max 100000", None), ("250000 100000", 2.5), ("50000 100000", 0.5)]
)
@pytest.mark.parametrize("folder", ["user/service", "user", "."])
def test_quota_of_cgroup_v2(
    tmp_path: Path, membership: Path, folder: str, text: str, expected: float | None
) -> None:
    (tmp_path / folder / "cpu.max").write_text(text)
    assert module._cgroup_quota(tmp_path, membership) == expected


def test_the_smallest_quota_holds(tmp_path: Path, membership: Path) -> None:
    (tmp_path / "user/cpu.max").write_text("150000 100000")
    (tmp_path / "user/service/cpu.max").write_text("800000 100000")
    assert module._cgroup_quota(tmp_path, membership) == 1.5


@pytest.mark.parametrize(("quota", "expected"), [("-1", None), ("300000", 3.0)])
def test_quota_of_cgroup_v1(tmp_path: Path, quota: str, expected: float | None) -> None:
    (tmp_path / "membership").write_text("5:memory:/m\n4:cpu,cpuacct:/job\n")
    (tmp_path / "cpu/job").mkdir(parents=True)
    (tmp_path / "cpu/job/cpu.cfs_quota_us").write_text(quota + "\n")
    (tmp_path / "cpu/job/cpu.cfs_period_us").write_text("100000\n")
    assert module._cgroup_quota(tmp_path, tmp_path / "membership") == expected


@pytest.mark.parametrize("text", ["", "nonsense", "1 2 3", "100000 0"])
def test_unreadable_quota_is_no_limit(tmp_path: Path, membership: Path, text: str) -> None:
    (tmp_path / "user/cpu.max").write_text(text)
    assert module._cgroup_quota(tmp_path, membership) is None
    assert module._cgroup_quota(tmp_path / "nowhere", membership) is None
    assert module._cgroup_quota(tmp_path, tmp_path / "nowhere") is None


def test_hardware_threads_of_a_core_count_once_and_quotas_round_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(module, "_core_of", lambda cpu: str(cpu // 2))
    for quota, expected in ((None, 4), (2.9, 2), (0.5, 1), (64.0, 4)):
        monkeypatch.setattr(module, "_cgroup_quota", lambda quota=quota: quota)
        assert available_cores() == expected


def test_an_explicit_thread_count_wins(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_cores", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    torch.set_num_threads(3)
    assert set_threads() == 3
    assert set_threads(1) == 1
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert set_threads() == 2


def run_kernel(threads: int, **variables: str) -> str:
    """The number of threads that kernels start, before PyTorch has started any."""
    code = f"""
import os, torch
from fastllm.ops.dropout import dropout
torch.set_num_threads({threads})
before = len(os.listdir("/proc/self/task"))
for _ in range(3):
    out = dropout(torch.ones(2**14), 0.5, seed=1)
print(len(os.listdir("/proc/self/task")) - before)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **variables},
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return result.stdout.strip()


@pytest.mark.subprocess
@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which only Linux has")
def test_kernels_use_the_threads_they_ask_for_or_get() -> None:
    assert run_kernel(4) == "3"
    # The runtime starts fewer threads than requested, and the kernels do not wait for the rest.
    assert run_kernel(4, OMP_THREAD_LIMIT="2") == "1"
    assert run_kernel(4, OMP_THREAD_LIMIT="1") == "0"
