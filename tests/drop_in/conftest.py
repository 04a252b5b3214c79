from collections.abc import Iterator

import pytest
import torch

from fastllm.ops import extension
from tests.drop_in.cases import Calls, Spy


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The kernels called in the test."""
    if extension.kernels is None:
        pytest.skip(f"no C++ kernels: {extension.problem}")
    calls = Calls()
    monkeypatch.setattr(extension, "kernels", Spy(calls))
    return calls


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The cases are tiny; more threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
