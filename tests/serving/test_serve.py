import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

openai = pytest.importorskip("openai", reason="pip install '.[test]' brings the client")

from fastllm.serve import listen, main  # noqa: E402
from fastllm.train import prepare  # noqa: E402
from tests.conftest import WORDS, make_config  # noqa: E402


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    text = folder / "text.txt"
    text.write_text(WORDS * 60)
    flags = "--max_steps 2 --max_seq_len 400 --val_fraction 0".split()
    trainer = prepare(make_config(folder / "book", text, *flags), folder / "book", lambda *a: None)
    trainer.train()
    return trainer.run_dir


def test_a_process_serves_and_sigterm_lets_it_finish(run_dir: Path) -> None:
    command = [sys.executable, "-m", "fastllm.serve", "--checkpoint", str(run_dir), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--threads", "1", "--drain-seconds", "60"],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "FASTLLM_API_KEY": "secret"},
    )  # fmt: skip
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("serving book ("), line
        url = line.split()[-1]
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
        card = client.get(f"{url}/api/card", cast_to=object)
        assert card["progress"]["step"] == 2 and card["settings"]["max_seq_len"] == 400
        assert len(client.get(f"{url}/api/curve", cast_to=object)["points"]) == 2
        long = {"model": "book", "prompt": "the", "max_tokens": 397, "seed": 1}
        expected = client.completions.create(**long).choices[0].text
        texts: dict[int, str] = {}
        started = threading.Barrier(5)

        def read(i: int) -> None:
            stream = client.completions.create(**long, stream=True, logprobs=5)
            first = next(stream).choices[0].text
            started.wait(60)
            texts[i] = first + "".join(chunk.choices[0].text for chunk in stream)

        readers = [threading.Thread(target=read, args=(i,)) for i in range(4)]
        for reader in readers:
            reader.start()
        started.wait(60)
        process.send_signal(signal.SIGTERM)
        for reader in readers:
            reader.join(60)
        assert texts == dict.fromkeys(range(4), expected)
        assert process.wait(60) == 0
        assert "stopping when what runs is done" in process.stderr.read()
    finally:
        process.kill()
        process.wait()


def error_of(*flags: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(flags))
    return str(caught.value)


def test_what_goes_wrong_is_one_clear_line(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FASTLLM_API_KEY", raising=False)
    flags = ("--checkpoint", str(run_dir), "--port", "0")
    assert error_of("--checkpoint", str(tmp_path), "--port", "0") == (
        f"error: {tmp_path} holds no checkpoint: neither checkpoints/step-* nor model.safetensors"
    )
    with listen("127.0.0.1", 0, None) as taken:
        port = str(taken.getsockname()[1])
        assert error_of(*flags[:2], "--port", port) == (
            f"error: cannot listen on 127.0.0.1, port {port}: Address already in use; "
            "choose another --port"
        )
    for host in ("0.0.0.0", "::"):
        message = error_of(*flags, "--host", host)
        assert "can be reached by others: give an --api_key" in message, message
    assert "there is no host 'no.such.host.invalid'" in error_of(
        *flags, "--host", "no.such.host.invalid"
    )
    for blank in ("", " "):
        assert "api_key is empty" in error_of(*flags, "--api_key", blank)
    assert "exclude each other" in error_of(*flags, "--quantize", "int8", "--precision", "bf16")
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    assert error_of(*flags) == (
        "error: serving needs the package prometheus_client: pip install 'fastllm[serve]'"
    )


def test_a_key_opens_other_addresses() -> None:
    with listen("0.0.0.0", 0, "secret") as listener:
        assert listener.getsockname()[0] == "0.0.0.0"
