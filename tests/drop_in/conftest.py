from collections.abc import Iterator

import pytest
import torch

from fastllm.ops import dispatch
from tests.drop_in.cases import Calls, Spy


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The kernels called in the test."""
    if dispatch.kernels is None:
        pytest.skip(f"no C++ kernels: {dispatch.extension_problem}")
    calls = Calls()
    monkeypatch.setattr(dispatch, "kernels", Spy(calls))
    return calls


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The cases are tiny; more threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
