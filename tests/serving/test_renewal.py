"""Checkpoints that a training run saves while it is served."""

import json
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import torch

from fastllm import DecoderModel, SimpleCharacterTokenizer
from fastllm.integrations.any_model import load_trained_model
from fastllm.serving import renewal
from fastllm.serving.app import create_app
from fastllm.serving.model import ServedModel, prepare_served_model
from fastllm.serving.renewal import keep_newest
from fastllm.tokenization import Tokenizer
from fastllm.training.checkpoint import Progress, save_checkpoint
from fastllm.training.config import TrainConfig
from tests.serving.conftest import (
    Model,
    RunningServer,
    alone,
    running_app,
    slowed,
    wait_until,
)

CONFIG = TrainConfig(hidden_size=32, num_layers=2, num_heads=2, max_seq_len=100)
TOKENIZER = SimpleCharacterTokenizer(["abcdefghij klmno"])


def load(run: Path) -> tuple[ServedModel, DecoderModel]:
    return prepare_served_model(load_trained_model(run), "cpu", "fp32", None)


def save(run: Path, step: int, tokenizer: Tokenizer = TOKENIZER, keep: int = 1) -> DecoderModel:
    """Saves random weights as the run's newest checkpoint."""
    torch.manual_seed(step)
    model = CONFIG.build_model(tokenizer.vocab_size, tokenizer.pad_token_id).eval()
    for parameter in model.parameters():  # the logits of an untrained model are nearly uniform
        parameter.data *= 3
    save_checkpoint(run, CONFIG, tokenizer, model, [], Progress(step=step), keep_newest=keep)
    return model


def events_of(server: RunningServer, **body: Any) -> Any:
    """Sends a request; the events of its stream, as they come."""
    data = json.dumps({"prompt": "abc", "temperature": 1, "stream": True, **body}).encode()
    request = Request(f"{server.url}/v1/completions", data, {"Content-Type": "application/json"})
    response = urlopen(request, timeout=60)
    return (json.loads(line[6:]) for line in response if line.startswith(b"data: {"))


def answer_of(events: Any) -> tuple[str, set[str]]:
    """The text, and the fingerprints of the weights that wrote it."""
    events = list(events)
    text = "".join(choice["text"] for event in events for choice in event["choices"])
    return text, {event["system_fingerprint"] for event in events}


def expected(model: DecoderModel, tokens: int = 40) -> str:
    pair: Model = model, TOKENIZER
    return alone(pair, "abc", tokens, 5)


def wait_until_logged(capsys: pytest.CaptureFixture[str], words: str) -> str:
    log = [""]

    def logged() -> bool:
        log.append(capsys.readouterr().err)
        return words in "".join(log)

    wait_until(logged)
    return "".join(log)


def test_newer_checkpoints_are_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(renewal, "INTERVAL_S", 0.02)
    run = tmp_path / "book"
    older = save(run, 2)
    served, model = load(run)
    app = create_app(served, model, slots=2, max_queue=9)
    service = app.state.service
    with running_app(app, renewal=partial(keep_newest, service, run, load)) as server:
        assert answer_of(events_of(server, max_tokens=40, seed=5)) == (expected(older), {"step-2"})

        # What runs finishes with the weights it began with; what comes later gets the newer ones.
        with slowed(server.scheduler, 0.01):
            running = events_of(server, max_tokens=90, seed=5)
            first = next(running)
            newer = save(run, 4)
            wait_until(lambda: service.served.step == 4)
            later = events_of(server, max_tokens=40, seed=5)
            text, fingerprints = answer_of(running)
            assert first["choices"][0]["text"] + text == expected(older, 90)
            assert fingerprints == {"step-2"}
        assert answer_of(later) == (expected(newer), {"step-4"})
        with urlopen(f"{server.url}/api/curve", timeout=60) as response:
            assert json.load(response)["served_step"] == 4

        # What cannot be served is reported once, and ends nothing.
        other = tmp_path / "other"
        save(other, 6)
        save(other, 8, SimpleCharacterTokenizer(["another text"]), keep=2)
        (other / "checkpoints/step-00000006/model.safetensors").write_bytes(b"damaged")
        for step, reason in ((6, "damaged"), (8, "vocabulary")):
            name = f"checkpoints/step-{step:08}"
            (other / name).rename(run / name)
            log = wait_until_logged(capsys, f"cannot serve step {step}: ")
            assert reason in log and log.count("cannot serve") == 1
            assert answer_of(events_of(server, max_tokens=40, seed=5))[0] == expected(newer)
        newest = save(run, 10)
        wait_until_logged(capsys, "serving step 10")
        assert answer_of(events_of(server, max_tokens=40, seed=5)) == (
            expected(newest),
            {"step-10"},
        )


@pytest.mark.parametrize("fault", ["half-written", "weights missing", "folder missing", "no disk"])
def test_a_checkpoint_that_cannot_be_loaded_at_first_is_tried_again(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(renewal, "INTERVAL_S", 0.01)
    monkeypatch.setattr(renewal, "RETRY_S", 0.05)
    run, elsewhere = tmp_path / "book", tmp_path / "elsewhere"
    save(run, 2)
    served, model = load(run)
    failures: list[Exception] = []

    def load_or_fail(run: Path) -> tuple[ServedModel, DecoderModel]:
        try:
            if fault == "no disk" and len(failures) < 3:
                raise OSError(5, "Input/output error")
            return load(run)
        except Exception as error:
            failures.append(error)
            raise

    app = create_app(served, model, slots=2, max_queue=9)
    service = app.state.service
    newer = save(elsewhere, 4)
    weights = elsewhere / "checkpoints/step-00000004/model.safetensors"
    content = weights.read_bytes()
    if fault == "half-written":
        weights.write_bytes(content[: len(content) // 2])
    elif fault != "no disk":
        weights.unlink()
    with running_app(app, renewal=partial(keep_newest, service, run, load_or_fail)) as server:
        checkpoint = run / "checkpoints/step-00000004"
        weights.parent.rename(checkpoint)
        wait_until(lambda: len(failures) >= 3)
        if fault == "folder missing":
            checkpoint.rename(weights.parent)
            assert answer_of(events_of(server, max_tokens=40, seed=5))[1] == {"step-2"}
            weights.write_bytes(content)
            weights.parent.rename(checkpoint)
        elif fault != "no disk":
            partial_file = checkpoint / "partial"
            partial_file.write_bytes(content)
            partial_file.replace(checkpoint / weights.name)
        log = wait_until_logged(capsys, "serving step 4")
        assert log.count("cannot serve step 4: ") == 1
        assert answer_of(events_of(server, max_tokens=40, seed=5)) == (expected(newer), {"step-4"})


def test_a_checkpoint_stays_the_one_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renewal, "INTERVAL_S", 0.01)
    run = tmp_path / "book"
    save(run, 2)
    chosen = run / "checkpoints/step-00000002"
    served, model = load(chosen)
    app = create_app(served, model, slots=2, max_queue=9)
    looks = []
    look = renewal._newest_step
    monkeypatch.setattr(renewal, "_newest_step", lambda run: looks.append(run) or look(run))
    with running_app(app, renewal=partial(keep_newest, app.state.service, chosen, load)):
        save(run, 4, keep=2)
        seen = len(looks)
        wait_until(lambda: len(looks) > seen + 3)
        assert app.state.service.served.step == 2
