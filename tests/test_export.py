"""The export command, and other programs that read its files."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastllm import DecoderModel, export
from fastllm.command import no_log
from fastllm.integrations import formats, onnx
from fastllm.models.gpt2 import convert_to_gpt2
from fastllm.tokenization import SubwordTokenizer, Tokenizer
from fastllm.training.checkpoint import find_checkpoint, load_model
from fastllm.training.run import prepare, resolve
from tests.conftest import make_config
from tests.integrations.samples import TEXT, assert_close, logits, random_ids

for module in ("onnx", "onnxscript", "onnxruntime", "gguf", "tokenizers", "transformers"):
    pytest.importorskip(module, reason=f"{module} is not installed: pip install '.[test]'")

FLAGS = {
    "default": "",
    "head-bias": "--lm_head_bias",
    "learned-tied": "--pos_encoding learned --tie_word_embeddings --num_heads 4"
    " --activation gelu_tanh",
    "bpe": "--tokenizer bpe --vocab_size 300 --tie_word_embeddings --num_layers 2",
    "rope": "--pos_encoding rope",
    "rms": "--pos_encoding rope --norm rms --mlp swiglu --num_kv_heads 1 --tie_word_embeddings",
    "llama": "--arch llama --num_kv_heads 1 --tokenizer bpe --vocab_size 300 --num_layers 2",
}


def train(run_dir: Path, flags: str) -> Path:
    """The folder of a short run; its text has characters of several bytes."""
    text = run_dir.with_name("text.txt")
    text.write_text(TEXT, encoding="utf-8")
    # A learning rate that gives every bias a noticeable size.
    config = make_config(run_dir, text, "--max_steps", "12", "--lr", "0.03", *flags.split())
    prepare(resolve(config, run_dir), no_log).train()
    return run_dir


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: train(tmp_path_factory.mktemp(name) / "run", flags) for name, flags in FLAGS.items()
    }


@pytest.fixture(params=FLAGS)
def run(request: pytest.FixtureRequest, trained: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of each run, to write into."""
    return shutil.copytree(trained[request.param], tmp_path / "run", symlinks=True)


@pytest.fixture
def plain_run(trained: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(trained["default"], tmp_path / "run", symlinks=True)


def run_export(run: Path, format: str, *flags: str) -> Path:
    """Exports the run, and returns the folder written."""
    export.main(["--checkpoint", str(run), "--format", format, *flags])
    return run / format


def fails(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The message of an export that fails."""
    with pytest.raises(SystemExit) as stop:
        export.main(list(flags))
    assert str(stop.value.code).startswith("error: ")
    assert "\n" not in str(stop.value.code)
    return str(stop.value.code)


def loaded(run: Path) -> tuple[DecoderModel, Tokenizer]:
    model, tokenizer, _ = load_model(find_checkpoint(run))
    return model.eval(), tokenizer


def test_transformers_loads_model_and_tokenizer(run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run_export(run, "hf")
    ours, tokenizer = loaded(run)
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    ids = random_ids(ours, 3, ours.max_seq_len)
    with torch.no_grad():
        assert_close(theirs(ids).logits, logits(ours, ids), 1e-5)
    reader = AutoTokenizer.from_pretrained(folder)
    assert reader(TEXT).input_ids == tokenizer.encode(TEXT)
    assert reader.decode(tokenizer.encode(TEXT)) == TEXT
    assert reader.pad_token_id == tokenizer.pad_token_id
    # A program that scores texts puts one of these before them.
    for settings in (reader, theirs.config, theirs.generation_config):
        assert settings.bos_token_id == settings.eos_token_id == tokenizer.pad_token_id
    assert reader.model_max_length == ours.max_seq_len
    inputs = reader("He said", return_tensors="pt")
    out = theirs.generate(**inputs, max_length=ours.max_seq_len, do_sample=False)
    assert out.shape == (1, ours.max_seq_len)
    assert reader.decode(out[0]).startswith("He said")


def test_onnx_export(plain_run: Path) -> None:
    import onnxruntime
    from tokenizers import Tokenizer as LibraryTokenizer

    folder = run_export(plain_run, "onnx")
    model, tokenizer = loaded(plain_run)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    assert [(i.name, i.type) for i in session.get_inputs()] == [("input_ids", "tensor(int64)")]
    assert [(o.name, o.type) for o in session.get_outputs()] == [("logits", "tensor(float)")]
    ids = random_ids(model, 2, 5)
    assert_close(onnx.onnx_logits(folder / "model.onnx", ids), logits(model, ids), 1e-4)
    reader = LibraryTokenizer.from_file(str(folder / "tokenizer.json"))
    reader.encode_special_tokens = True
    assert reader.encode(TEXT).ids == tokenizer.encode(TEXT)
    with pytest.raises(Exception, match="broadcast"):  # it has no more positions
        onnx.onnx_logits(folder / "model.onnx", random_ids(model, 1, model.max_seq_len + 1))


def test_gguf_read_back(run: Path) -> None:
    """The model in the file has the logits and the shape of the run's model."""
    from gguf import GGUFReader

    file = run_export(run, "gguf") / "model.gguf"
    settings = {name: field.contents() for name, field in GGUFReader(file).fields.items()}
    ours, tokenizer = loaded(run)
    rotary = "llama" if ours.config.norm == "rms" else "gptneox"
    arch = rotary if ours.config.pos_encoding == "rope" else "gpt2"
    assert settings["general.architecture"] == arch
    assert settings["general.name"] == "run"
    theirs = DecoderModel.from_pretrained(file).eval()
    widened = theirs.hidden_size > ours.hidden_size
    assert widened == (ours.lm_head.bias is not None)
    assert theirs.tie_word_embeddings == ours.tie_word_embeddings
    assert theirs.config.mlp == ours.config.mlp
    assert settings[f"{arch}.attention.head_count"] == theirs.config.num_heads
    ids = random_ids(ours, 3, ours.max_seq_len)
    assert_close(logits(theirs, ids), logits(ours, ids), 1e-5)
    pad = tokenizer.pad_token_id
    assert settings["tokenizer.ggml.tokens"][pad] == "<PAD>"
    assert settings["tokenizer.ggml.token_type"][pad] == 3
    for name in ("bos", "eos", "padding"):
        assert settings[f"tokenizer.ggml.{name}_token_id"] == pad
    assert settings["tokenizer.ggml.add_bos_token"] is False


def test_quantized_gguf(tmp_path: Path) -> None:
    """Matrices are rounded as asked, rows that are no blocks of 32 numbers to f16."""
    from gguf import GGUFReader

    flags = "--hidden_size 64 --num_heads 2 --arch llama --dropout 0 --tokenizer bpe"
    run = train(tmp_path / "run", f"{flags} --vocab_size 300")
    ours, _ = loaded(run)
    ids = random_ids(ours, 2, ours.max_seq_len)
    expected = logits(ours, ids)
    errors = []
    for name in ("bf16", "q8_0", "q4_0"):
        out = tmp_path / f"{name}.gguf"
        flags = f"--checkpoint {run} --format gguf --quantize {name} --out {out}"
        export.main(flags.split())
        types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(out).tensors}
        assert types["blk.0.attn_q.weight"] == types["blk.0.ffn_gate.weight"] == name.upper()
        assert types["token_embd.weight"] == ("Q8_0" if name == "q4_0" else name.upper())
        assert types["blk.0.attn_norm.weight"] == "F32"
        actual = logits(DecoderModel.from_pretrained(out).eval(), ids)
        errors.append(((actual - expected).std() / expected.std()).item())
    # bf16 has 8 bits of each number, the others 8 and 4 of a block's largest.
    assert 0 < errors[0] < errors[1] < 0.02 and 4 * errors[1] < errors[2] < 0.4
    odd = train(tmp_path / "odd", "--hidden_size 48 --num_heads 2 --dropout 0")
    file = run_export(odd, "gguf", "--quantize", "q8_0") / "model.gguf"
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
    assert types["blk.0.attn_qkv.weight"] == "F16" and types["blk.0.ffn_down.weight"] == "Q8_0"
    assert types["position_embd.weight"] == "F32"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--format hf --quantize q8_0", "--quantize needs --format gguf"),
        ("--format gguf --quantize q3_k", "--quantize must be 'f16', 'bf16', 'q8_0'"),
    ],
)
def test_unknown_quantizations(
    capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    assert message in fails(capsys, "--checkpoint", "run", *flags.split())


def test_llama_cpp_computes_the_same(run: Path) -> None:
    if find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed: pip install llama-cpp-python")
    from llama_cpp import Llama

    file = run_export(run, "gguf") / "model.gguf"
    ours, tokenizer = loaded(run)
    theirs = Llama(str(file), n_ctx=ours.max_seq_len, logits_all=True, verbose=False)
    ids = tokenizer.encode(TEXT)[: ours.max_seq_len]
    theirs.eval(ids)
    expected = logits(ours, torch.tensor([ids]))[0]
    actual = torch.tensor(theirs.scores[: len(ids)])
    assert_close(actual, expected, 2e-2)
    # Subword tokenizers take a special token spelt out in a text for the token itself.
    special = isinstance(tokenizer, SubwordTokenizer)
    spelt = theirs.tokenize(TEXT.encode(), add_bos=False, special=special)
    assert spelt == tokenizer.encode(TEXT)
    assert theirs.detokenize(spelt, special=True).decode() == TEXT
    theirs.close()


@pytest.mark.parametrize(
    ("flags", "format", "message"),
    [
        ("--post_norm", "hf", "GPT-2's format cannot express this model: it is Post-LN"),
        ("--post_norm", "gguf", "GPT-2's format cannot express this model: it is Post-LN"),
        ("--activation leaky_relu", "hf", "its activation is leaky_relu"),
        ("--activation leaky_relu", "gguf", "its activation is leaky_relu"),
        ("--activation silu", "gguf", "supports only gelu, not silu"),
        ("--tokenizer wordpiece --vocab_size 300", "gguf", "it has WordPiece only for BERT"),
    ],
)
def test_models_that_a_format_cannot_express_are_refused_before_writing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, format: str, message: str
) -> None:
    run = train(tmp_path / "run", flags)
    assert message in fails(capsys, "--checkpoint", str(run), "--format", format)
    assert not (run / format).exists()


def test_nothing_is_overwritten(plain_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--checkpoint", str(plain_run), "--format", "gguf")
    folder = run_export(plain_run, "gguf")
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "model.gguf"]
    before = (folder / "model.gguf").read_bytes()
    assert f"{folder}/model.gguf exists already" in fails(capsys, *flags)
    # Another name beside the existing file works, unless its card exists.
    out = ("--out", str(folder / "other.gguf"))
    (folder / "other.md").touch()
    assert f"{folder}/other.md exists already" in fails(capsys, *flags, *out)
    wrong = ("--checkpoint", str(plain_run), "--format", "hf", *out)
    assert f"--format hf does not write .gguf: {folder}/other.gguf" in fails(capsys, *wrong)
    (folder / "other.md").unlink()
    export.main([*flags, *out])
    assert "other.gguf" in (folder / "other.md").read_text()
    assert (folder / "other.gguf").read_bytes() == before == (folder / "model.gguf").read_bytes()


def test_a_failed_export_leaves_no_files(
    plain_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slightly_wrong(model: DecoderModel) -> DecoderModel:
        result = convert_to_gpt2(model)
        result.lm_head.weight.data *= 1.001
        return result

    monkeypatch.setattr(formats, "convert_to_gpt2", slightly_wrong)
    message = fails(capsys, "--checkpoint", str(plain_run), "--format", "gguf")
    assert "the written files do not compute what this model does: a logit differs by " in message
    assert list((plain_run / "gguf").iterdir()) == []


def test_a_model_in_transformers_format_is_exported_too(
    plain_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = run_export(plain_run, "hf")
    message = fails(capsys, "--checkpoint", str(hf), "--format", "hf", "--out", str(tmp_path))
    assert f"{hf} is already in the format of Hugging Face's transformers" in message
    folder = run_export(hf, "onnx")
    file = folder / "model.onnx"
    card = (folder / "README.md").read_text()
    assert "\n# hf\n" in card and "A language model, written in this format by" in card
    ours, _ = loaded(plain_run)
    ids = random_ids(ours, 3, ours.max_seq_len)
    assert_close(onnx.onnx_logits(file, ids), logits(ours, ids), 1e-5)


def test_missing_packages_are_named(
    plain_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "find_spec", lambda name: None if "onnx" in name else name)
    message = fails(capsys, "--checkpoint", str(plain_run), "--format", "onnx")
    assert message == "error: onnx, onnxscript, onnxruntime missing: pip install '.[export]'"
    assert run_export(plain_run, "gguf").exists()


def card(folder: Path) -> tuple[dict[str, Any], str]:
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def test_the_card(run: Path) -> None:
    """Its head is for Hugging Face; its body says what the run recorded."""
    export.main(["--checkpoint", str(run), "--format", "hf", "--license", "cc-by-4.0"])
    head, text = card(run / "hf")
    assert head == {
        "license": "cc-by-4.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["fastllm", "hf"],
    }
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    state = json.loads((run / "training_state/progress.json").read_text())
    model, tokenizer = loaded(run)
    for expected in (
        "| text | text.txt |",
        f"| SHA-256 of the text | `{state['text_sha256']}` |",
        f"| tokens of the text | {len(tokenizer.encode(TEXT)):,} |",
        f"| parameters | {sum(p.numel() for p in model.parameters()):,} |",
        f"| training | 12 steps, over {lines[-1]['tokens']:,} tokens |",
        f"| training loss | {lines[-1]['loss']:.4f} ",
        f"| validation loss | {lines[-1]['val_loss']:.4f} ",
        "`cc-by-4.0`, according to the person who exported it",
        '"hidden_size": 16',
    ):
        assert expected in text
    assert ("GPT-2 has no bias in its head" in text) == (model.lm_head.bias is not None)
    assert str(run.parent) not in text
    assert not any(word in text for word in ("$file", "$length", "$half"))


def test_the_card_of_an_earlier_checkpoint(tmp_path: Path) -> None:
    """It describes that checkpoint, and says that the licence is unknown."""
    run = train(tmp_path / "run", "--max_steps 4 --save_interval 2 --keep_checkpoints 2")
    first = run / "checkpoints/step-00000002"
    export.main(["--checkpoint", str(first), "--format", "gguf"])
    head, text = card(run / "gguf")
    assert head["license"] == "unknown" and "library_name" not in head
    lines = [json.loads(l) for l in (run / "metrics.jsonl").read_text().splitlines()]
    assert f"| training loss | {lines[1]['loss']:.4f} " in text and lines[1]["step"] == 2
    assert "| training | 2 steps" in text
    assert "Unknown: no licence was given when this model was exported." in text


def test_a_folder_with_only_a_model(plain_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (copy / name).write_bytes((plain_run / name).read_bytes())
    _, text = card(run_export(copy, "gguf"))
    assert "# copy" in text and "| parameters | " in text
    assert "loss |" not in text and "SHA-256" not in text


@pytest.mark.parametrize("license", ["MIT", "my licence", ""])
def test_a_licence_is_spelt_as_hugging_face_does(
    capsys: pytest.CaptureFixture[str], license: str
) -> None:
    flags = ("--checkpoint", "run", "--format", "hf", "--license", license)
    assert "--license must be spelt as Hugging Face does" in fails(capsys, *flags)


def test_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, "--checkpoint", str(tmp_path / "nothing"), "--format", "hf")
    assert "nothing does not exist" in message


@pytest.mark.subprocess
def test_the_command(plain_run: Path, tmp_path: Path) -> None:
    """It logs only the files it wrote, to stderr."""
    flags = "--checkpoint run --format onnx --out book.onnx"
    result = subprocess.run(
        [sys.executable, "-m", "fastllm.export", *flags.split()],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    *files, last = result.stderr.splitlines()
    names = [line.split(" bytes  ")[1] for line in files]
    assert names == ["book.onnx", "tokenizer.json", "tokenizer_config.json", "book.md"]
    assert last.startswith("largest difference of a logit, on random tokens: ")
    assert (tmp_path / "book.onnx").exists()
