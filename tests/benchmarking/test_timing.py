import pytest

from fastllm.benchmarking import timing
from fastllm.benchmarking.timing import time_in_turns


def test_contestants_take_turns_on_new_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """At least three rounds, however little time there is."""
    monkeypatch.setattr(timing, "TURN_SECONDS", 0.0)
    calls: list[tuple[str, int]] = []
    numbers = iter(range(100))
    runs = {name: lambda n, name=name: calls.append((name, n)) for name in ("a", "b")}
    milliseconds = time_in_turns(runs, 0.0, lambda: next(numbers))
    assert calls == [(name, n) for n in range(3) for name in ("a", "b")]
    assert all(milliseconds[name] > 0 for name in runs)
