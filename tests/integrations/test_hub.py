"""Names of models and tokenizers, in folders and files; the commands' tests load them."""

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from fastllm.data.sources import is_local
from fastllm.integrations.hub import go_offline_if_unreachable, load_tokenizer


@pytest.mark.parametrize("name", ["./model", "/model", "model/", "m.gguf", "a/b.json", "runs/a/b"])
def test_paths_are_local_even_if_nothing_is_there(name: str) -> None:
    assert is_local(name)


@pytest.mark.parametrize("name", ["gpt2", "org/name"])
def test_names_are_on_the_hub_unless_they_exist_here(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_local(name)
    Path(name).mkdir(parents=True)
    assert is_local(name)


def test_local_names_do_not_ask_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: pytest.fail("it asks"))
    go_offline_if_unreachable(["./model", "words.json"])


def test_a_tokenizer_file_gets_the_roles_of_its_special_tokens(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    words = ["[PAD]", "</s>", "[MASK]", "a"]
    vocabulary = {word: number for number, word in enumerate(words)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = load_tokenizer(str(name))
        assert tokenizer.pad_token == "[PAD]" and tokenizer.eos_token == "</s>"
        assert tokenizer.mask_token == "[MASK]" and tokenizer.cls_token is None
