"""Models in Hugging Face's format behind the server."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from fastllm.generation import generate_text
from fastllm.integrations.any_model import load_model, load_trained_model
from fastllm.serving.app import create_app
from fastllm.serving.model import prepare_served_model
from fastllm.serving.renewal import _newest_step
from tests.hf_models import MODELS, greedy, save_hf_model

pytest.importorskip("transformers", reason="pip install '.[finetune]' brings transformers")


@contextmanager
def client_of(folder: Path, longest: int | None = None) -> Iterator[TestClient]:
    served, model = prepare_served_model(load_trained_model(folder), "cpu", "fp32", None, longest)
    app = create_app(served, model, 2, 9)
    try:
        with TestClient(app, base_url="http://127.0.0.1") as client:
            yield client
    finally:
        app.state.service.scheduler.close()


def completion(client: TestClient, **body: Any) -> Any:
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("kind", MODELS)
def test_completions_end_where_the_model_ends_them(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    theirs, reader = save_hf_model(folder, kind)
    prompt = "That which we"
    ids = greedy(theirs, reader, prompt, 40)
    theirs.generation_config.eos_token_id = [ids[-25], ids[-20]]
    theirs.generation_config.save_pretrained(folder)
    ids = greedy(theirs, reader, prompt, 40)
    before = len(reader(prompt)["input_ids"])
    _, tokenizer = load_model(folder)
    whole = tokenizer.decode(ids[len(tokenizer.start_tokens) : -1])
    with client_of(folder) as client:
        body = {"prompt": prompt, "temperature": 0, "max_tokens": 40}
        answer = completion(client, **body, echo=True)
        assert answer["choices"][0]["text"] == whole
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["prompt_tokens"] == before
        assert answer["usage"]["completion_tokens"] == len(ids) - before
        short = completion(client, **{**body, "max_tokens": len(ids) - before - 1})
        assert short["choices"][0]["finish_reason"] == "length"
        assert prompt + short["choices"][0]["text"] == whole
        card = client.get("/api/card").json()
        assert card["name"] == "small" and card["settings"]["vocab_size"] == len(reader) + 5
    assert _newest_step(folder) is None  # so that nothing newer is ever looked for


def test_requests_take_what_they_leave_out_from_generation_config(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    save_hf_model(folder, "gpt2")
    file = {"do_sample": True, "temperature": 0.3, "top_k": 5, "repetition_penalty": 1.2}
    (folder / "generation_config.json").write_text(json.dumps(file))
    model, tokenizer = load_model(folder)
    with client_of(folder) as client:
        for given in ({}, {"temperature": 1.5}, {"top_k": 0, "repetition_penalty": 1.0}):
            sampling = {**file, **given}
            del sampling["do_sample"]
            expected = "".join(generate_text(model, tokenizer, "rose", 20, seed=3, **sampling))
            body = {"prompt": "rose", "max_tokens": 20, "seed": 3, "top_p": None, **given}
            assert completion(client, **body)["choices"][0]["text"] == expected


def test_a_long_context_is_not_reserved_for_every_sequence(tmp_path: Path) -> None:
    """Beyond the limit, the older half of a text is dropped, as beyond the model's own."""
    folder = tmp_path / "small"
    save_hf_model(folder, "gpt2")
    model, tokenizer = load_model(folder)
    prompt, short = "rose by any other name", 16
    model.max_seq_len = short  # of the context window of generate_text
    expected = "".join(generate_text(model, tokenizer, prompt, 30, temperature=0))
    body = {"prompt": prompt, "max_tokens": 30, "temperature": 0}
    for longest, size in ((short, short), (10**6, 64)):
        with client_of(folder, longest) as client:
            assert client.get("/api/card").json()["max_seq_len"] == size
            text = completion(client, **body)["choices"][0]["text"]
            assert (text == expected) == (size == short)
