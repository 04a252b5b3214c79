"""Signals that ask a run to stop."""

import os
import signal

import pytest

from fastllm.command import StopRequest, stop_on_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_handler_sets_a_flag_and_poll_prints_one_line(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    request = StopRequest()
    assert request.poll() is None
    before = signal.getsignal(number)
    with stop_on_signals(request):
        os.kill(os.getpid(), number)
        assert request.stopped_by == number
        assert capsys.readouterr().err == ""
        assert (request.poll(), request.poll()) == (number, number)
    assert capsys.readouterr().err.count(f"{number.name}: saving and stopping") == 1
    assert signal.getsignal(number) == before
