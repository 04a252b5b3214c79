"""Signals that ask a run to stop."""

import os
import signal

import pytest

from fastllm.command import StopRequest, stop_on_signals
from fastllm.flags import refuse_several_processes
from fastllm.training.config import parse_train_config
from tests.commands import run_command


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


@pytest.mark.parametrize(
    "command", ["finetune", "tune", "serve", "export", "generate", "evaluate", "bench"]
)
def test_torchrun_is_refused_by_commands_of_one_process(command: str) -> None:
    several = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}
    refused = run_command(command, "--quiet", **several)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == "error: this command works in one process; start it without torchrun\n"
    refused = run_command(command, "--nonsense", **{**several, "RANK": "0", "WORLD_SIZE": "1"})
    assert "nonsense" in refused.stderr


def test_one_process_of_a_machine_refuses_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others leave it the time to say so."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as error:
        refuse_several_processes()
    assert error.value.code == 1 and waited == [10]
    assert parse_train_config([]).max_steps == 0  # train works in several processes
