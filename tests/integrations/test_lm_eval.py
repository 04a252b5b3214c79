"""lm-eval-harness with models of ours, on tasks in local files."""

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="pip install lm-eval brings the harness")
pytest.importorskip("transformers", reason="pip install '.[finetune]' brings transformers")

from lm_eval import evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM

from fastllm.integrations.lm_eval import FastllmLM
from tests.commands import run_command
from tests.conftest import MakeTrainer
from tests.hf_models import MODELS, save_hf_model

# No token spans a context and what continues it.
QUESTIONS = [
    {"text": "That which we call a", "choices": ["# name", "# world"], "answer": 0},
    {"text": "What's in", "choices": ["#the end.", "#1", "# a word that is longer"], "answer": 1},
]
TEXTS = ["What's in a name?", "That which we call a rose by any other word would smell as sweet"]


def write_lines(file: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The part of a task that reads these rows."""
    file.write_text("\n".join(map(json.dumps, rows)))
    return {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
    }  # fmt: skip


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    texts = [{"text": text} for text in TEXTS]
    return [
        {
            "task": "choices", "output_type": "multiple_choice",
            **write_lines(tmp_path / "questions.jsonl", QUESTIONS),
            "doc_to_text": "{{text}}", "doc_to_choice": "{{choices}}", "doc_to_target": "answer",
            "target_delimiter": "",
        },
        {
            "task": "perplexity", "output_type": "loglikelihood_rolling",
            **write_lines(tmp_path / "texts.jsonl", texts),
            "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "byte_perplexity"}],
        },
        {
            "task": "continue", "output_type": "generate_until",
            **write_lines(tmp_path / "prompts.jsonl", texts),
            "doc_to_text": "{{text}}", "doc_to_target": "{{text}}",
            "generation_kwargs": {"until": ["e"], "max_gen_toks": 12},
            "metric_list": [{"metric": "exact_match"}],
        },
    ]  # fmt: skip


def responses(model: Any, tasks: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """What the model answered to each request, by task."""
    # By their names, the harness would first read ten thousand tasks of its own.
    named = {task["task"]: ConfigurableTask(config=copy.deepcopy(task)) for task in tasks}
    found = evaluate(model, named, bootstrap_iters=0)
    return {
        task: [sample["filtered_resps"] for sample in samples]
        for task, samples in found["samples"].items()
    }


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_are_those_of_transformers(
    kind: str, batch_size: int, tasks: list[dict[str, Any]], tmp_path: Path
) -> None:
    theirs, tokenizer = save_hf_model(tmp_path / "small", kind)
    start = tokenizer.bos_token_id
    reference = HFLM(pretrained=theirs, tokenizer=tokenizer, prefix_token_id=start, max_length=24)
    ours = FastllmLM(tmp_path / "small", 24, prefix_token_id=start, batch_size=batch_size)
    if kind == "llama":  # where HFLM would also score the token that begins a text
        reference.add_bos_token = False
        ours.tokenizer.start_tokens = []
    found, expected = responses(ours, tasks), responses(reference, tasks)
    # Of bytes that are no character, transformers replaces some of those around too.
    texts = [re.sub("\ufffd+", "?", str(each["continue"])) for each in (found, expected)]
    assert texts[0] == texts[1]
    scores = [torch.tensor(each["perplexity"]) for each in (found, expected)]
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-4)
    for ours_each, theirs_each in zip(found["choices"], expected["choices"], strict=True):
        for (score, greedy), (other, also) in zip(ours_each, theirs_each, strict=True):
            assert score == pytest.approx(other, rel=1e-5, abs=1e-4) and greedy == also


def rolling(model: FastllmLM, text: str) -> float:
    (score,) = model.loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True
    )
    return score


def test_the_score_of_a_text_is_that_of_evaluate(tmp_path: Path) -> None:
    """Where the model expects a token before a text, both predict all tokens of the text."""
    save_hf_model(tmp_path / "small", "llama")
    (tmp_path / "text.txt").write_text(TEXTS[1])
    flags = ("--checkpoint", str(tmp_path / "small"), str(tmp_path / "text.txt"), "--json")
    result = json.loads(run_command("evaluate", *flags).stdout)
    model = FastllmLM(tmp_path / "small")
    assert len(model.tokenizer.encode(TEXTS[1])) == result["tokens"]
    expected = -result["loss"] * result["tokens"]
    assert rolling(model, TEXTS[1]) == pytest.approx(expected, rel=1e-5)


def test_a_run_of_train(make_trainer: MakeTrainer, text: Path) -> None:
    """Its texts begin with padding, for want of any other token that could."""
    trainer = make_trainer("book", "--max_steps", "2")
    trainer.train()
    model = FastllmLM.create_from_arg_string(f"checkpoint={trainer.run_dir},batch_size=4")
    assert model.max_length == 16
    assert model.prefix_token_id == model.eot_token_id == trainer.tokenizer.pad_token_id
    content = text.read_text()[:500]
    per_character = -rolling(model, content) / len(content)
    assert 0 < per_character < math.log(trainer.tokenizer.vocab_size) + 1
