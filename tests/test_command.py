"""Signals that ask a run to stop, and outputs that vanish."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastllm.command import StopRequest, cause_of, command, first_line, stop_on_signals
from fastllm.flags import refuse_several_processes
from fastllm.training.config import parse_train_config
from fastllm.training.loop import TrainingError
from tests.commands import run_command


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
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
    assert parse_train_config(["--threads", "1"]).threads == 1  # train works in several processes


def test_hangups_that_are_ignored_stay_ignored() -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        request = StopRequest()
        with stop_on_signals(request):
            os.kill(os.getpid(), signal.SIGHUP)
        assert request.stopped_by is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("a\nb"), "a"), (ValueError(), "ValueError"), (OSError("\n \nc"), "c")],
)
def test_first_lines(error: Exception, line: str) -> None:
    assert first_line(error) == line


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ValueError("no text\nin it"), "no text\nin it"),
        (ValueError(), "ValueError"),
        (RuntimeError("no kernel\nException raised from"), "RuntimeError: no kernel"),
        (KeyError("Character 'z' not found"), "Character 'z' not found"),
        (KeyError("state"), "KeyError: 'state'"),
        (TrainingError("the loss is nan"), "the loss is nan"),
        (MemoryError(), "there is not enough memory"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has"),
            "there is not enough memory to allocate 20.00 MiB",
        ),
    ],
    ids=repr,
)
def test_causes(error: Exception, cause: str) -> None:
    assert cause_of(error) == cause


def test_a_lack_of_memory_ends_every_command_in_one_line() -> None:
    @command
    def main(arguments: list[str]) -> None:
        torch.empty(1 << 60)

    with pytest.raises(SystemExit) as end:
        main([])
    assert str(end.value) == (
        f"error: there is not enough memory to allocate {4 << 60} bytes; close other programs, or "
        "give a smaller model or batch"
    )


# A command that says something, computes, and prints its result.
COMMAND = """
import sys
from fastllm.command import command, log

@command
def main(arguments):
    log("caf\u00e9", "a" * 100_000)
    log("still here")
    open(arguments[0], "w").close()
    print("caf\u00e9")

main(sys.argv[1:])
"""


@pytest.mark.subprocess
@pytest.mark.parametrize(
    ("redirections", "status"),
    [
        ("2> >(true)", 0),  # the reader of the messages is gone
        ("2> /dev/full", 0),
        ("2>&-", 0),
        (">&- 2>&-", 0),
        ("> /dev/full", 1),
        ("> >(true)", 1),
    ],
)
def test_an_output_that_is_gone_never_ends_the_work(
    tmp_path: Path, redirections: str, status: int
) -> None:
    done = tmp_path / "done"
    # A reader that has ended before anything is written.
    wait = "exec 4> >(exec true); sleep 0.3; " if ">(true)" in redirections else ""
    ended = subprocess.run(
        [
            *("bash", "-c"),
            f"{wait}exec 5>&1; "
            f'"{sys.executable}" -c "$0" "$1" {redirections.replace("> >(true)", ">&4")}; '
            "echo status $? >&5",
            *(COMMAND, done),
        ],
        capture_output=True,
        timeout=100,
    )
    assert done.exists()
    assert ended.stdout.decode().splitlines()[-1] == f"status {status}"
    assert b"Traceback" not in ended.stderr and b"ignored" not in ended.stderr


BROKEN_PIPE = """
import os, sys
from fastllm.command import command

@command
def main(arguments):
    print("a result")
    reader, writer = os.pipe()
    os.close(reader)
    os.write(writer, b"to a worker that has ended")

main([])
"""


@pytest.mark.subprocess
def test_a_broken_pipe_that_is_not_stdout_is_an_error_after_the_results() -> None:
    ended = subprocess.run([sys.executable, "-c", BROKEN_PIPE], capture_output=True, timeout=100)
    assert (ended.returncode, ended.stdout) == (1, b"a result\n")
    assert (
        ended.stderr
        == b"error: another process or machine has closed its end of a pipe or a connection\n"
    )


@pytest.mark.subprocess
def test_a_full_disk_under_stdout_is_named() -> None:
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(
            [sys.executable, "-c", COMMAND, os.devnull], stdout=full, stderr=subprocess.PIPE,
            timeout=100,
        )  # fmt: skip
    message = b"error: [Errno 28] No space left on device: 'standard output'\n"
    assert ended.returncode == 1 and ended.stderr.endswith(message)


@pytest.mark.subprocess
def test_characters_that_an_output_cannot_encode_are_replaced(
    tmp_path: Path,
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", COMMAND, tmp_path / "done"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        timeout=100,
    )
    assert ended.returncode == 0 and ended.stdout == b"caf?\n", ended.stderr
