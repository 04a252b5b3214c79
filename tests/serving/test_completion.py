import asyncio

import pytest

pytest.importorskip("fastapi", reason="pip install '.[serve]' brings the server")

from fastllm.serving import completion
from fastllm.serving.completion import Dispatcher
from fastllm.serving.metrics import Metrics
from fastllm.serving.scheduler import Delta, Job
from tests.serving.conftest import prompt_of


def test_deltas_in_quick_succession_are_delivered_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """First tokens at once, others after an interval, even if nothing follows them."""
    monkeypatch.setattr(completion, "CHUNK_INTERVAL_S", 0.5)

    async def taken() -> list[list[str]]:
        dispatcher, job = Dispatcher(Metrics()), Job(prompt_of(1), 9)
        queue = dispatcher.subscribe([job], whole=False)
        dispatcher([(job, Delta("first", (), 1, first_token_s=0.1))])
        result = [await queue.take()]
        for text in ("second", "third"):
            dispatcher([(job, Delta(text, (), 1))])
            for _ in range(3):
                await asyncio.sleep(0)
        result.append(await asyncio.wait_for(queue.take(), 20))
        return [[delta.text for _, delta in deltas] for deltas in result]

    assert asyncio.run(taken()) == [["first"], ["second", "third"]]
