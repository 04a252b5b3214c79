import json
import random
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from fastllm.models.architectures import ARCHITECTURES
from fastllm.training.config import TrainConfig, parse_train_config, read_config
from fastllm.training.presets import BY_HAND, PRESETS
from fastllm.training.run import resolve


def test_the_defaults_of_the_main_flags() -> None:
    config = parse_train_config(["--epochs", "1"])
    expected = {
        "file_path": None, "max_seq_len": 32, "batch_size": 16, "epochs": 1, "lr": 1e-3,
        "hidden_size": 64, "num_layers": 2, "num_heads": 2, "device": "cpu", "overlap": 0,
        "log_interval": 10, "dropout": 0.1, "optimizer": "adam", "max_grad_norm": 1.0,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("flags", "preset", "hidden_size", "lr"),
    [
        ("", "small", 128, 3e-3),
        ("book.txt --out_dir run --quiet --threads 2 --seed 1", "small", 128, 3e-3),
        ("book.txt --precision fp32 --max_minutes 1", "small", 128, 3e-3),
        ("--preset tiny", "tiny", 64, 5e-3),
        ("--preset medium --lr 0.5", "medium", 384, 0.5),
        ("--preset small --hidden_size 64", "small", 64, 3e-3),
        # The defaults of the flags, once one of them is given, even with its default.
        ("--hidden_size 64", None, 64, 1e-3),
        ("--log_interval 10", None, 64, 1e-3),
        ("--overlap=0", None, 64, 1e-3),
        ("--device cpu", None, 64, 1e-3),
        ("--epochs 2", None, 64, 1e-3),
        ("--launcher ray --num_workers 2", None, 64, 1e-3),
    ],
)
def test_presets(flags: str, preset: str | None, hidden_size: int, lr: float) -> None:
    config = parse_train_config(flags.split())
    assert (config.preset, config.hidden_size, config.lr) == (preset, hidden_size, lr)


def test_a_config_file_also_chooses_by_hand(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("batch_size = 16\n")
    assert parse_train_config(["--config", str(file)]).preset is None
    file.write_text("seed = 16\n")
    assert parse_train_config(["--config", str(file)]).preset == "small"
    file.write_text('preset = "tiny"\nnum_layers = 1\n')
    config = parse_train_config(["--config", str(file)])
    assert (config.preset, config.num_layers, config.vocab_size) == ("tiny", 1, 512)


def test_a_run_keeps_what_its_preset_set(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(parse_train_config([]).to_json())
    resume = ["--resume", "--out_dir", str(tmp_path)]
    config = parse_train_config(resume)
    assert (config.preset, config.hidden_size, config.tokenizer) == (None, 128, "bpe")
    with pytest.raises(SystemExit, match="--preset is for new runs"):
        parse_train_config([*resume, "--preset", "tiny"])


def test_epochs_that_are_asked_for_replace_a_number_of_steps(tmp_path: Path) -> None:
    config = parse_train_config(["--preset", "tiny", "--epochs", "2"])
    assert (config.epochs, config.max_steps) == (2, 0)
    assert parse_train_config(["--preset", "tiny"]).max_steps == 500
    (tmp_path / "config.json").write_text(parse_train_config(["--max_steps", "9"]).to_json())
    resume = ["--resume", "--out_dir", str(tmp_path)]
    assert parse_train_config(resume).max_steps == 9
    assert parse_train_config([*resume, "--epochs", "3"]).max_steps == 0
    both = parse_train_config([*resume, "--epochs", "3", "--max_steps", "20"])
    assert (both.epochs, both.max_steps) == (3, 20)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_parameters_that_they_tell(name: str) -> None:
    preset = PRESETS[name]
    assert preset.settings.keys() - {"eval_interval", "precision"} <= BY_HAND
    config = parse_train_config(["--preset", name])
    with torch.device("meta"):
        model = config.build_model(config.vocab_size, 0)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert float(preset.expect.split()[0]) == pytest.approx(millions, rel=0.35)
    help_text = str(TrainConfig.model_fields["preset"].description)
    assert f"{name}: {preset.expect}." in " ".join(help_text.split())


def test_flags_with_underscores_hyphens_spaces_and_equals_signs() -> None:
    flags = "--max_seq_len 8 --batch-size=4 --post_norm --gradient-checkpointing --val-fraction .2"
    config = parse_train_config(flags.split())
    assert (config.max_seq_len, config.batch_size, config.val_fraction) == (8, 4, 0.2)
    assert config.gradient_checkpointing and not config.norm_first
    assert parse_train_config(["--norm_first"]).norm_first
    assert parse_train_config(["--no-quiet"]).quiet is False


def test_every_setting_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_train_config(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for name, field in TrainConfig.model_fields.items():
        assert field.description, name
        assert f"--{name}" in text


def test_flags_override_the_config_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('hidden_size = 32\nlr = 0.01\nnorm_first = false\nactivation = "relu"\n')
    config = parse_train_config(["--config", str(file), "--lr", "0.1"])
    assert (config.hidden_size, config.lr, config.norm_first) == (32, 0.1, False)
    assert config.activation == "relu"


def test_a_stray_environment_variable_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LR", "7")
    monkeypatch.setenv("SEED", "7")
    assert (parse_train_config([]).lr, parse_train_config([]).seed) == (3e-3, 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lr -1", "--lr must be greater than 0 (got '-1')"),
        ("--lr nan", "--lr must be a finite number"),
        ("--lr fast", "--lr must be a number"),
        ("--batch_size 0", "--batch_size must be greater than or equal to 1"),
        ("--batch_size 1.5", "--batch_size must be a whole number"),
        ("--optimizer sgd", "--optimizer must be 'adam', 'adamw' or 'muon'"),
        ("--dropout 1", "--dropout must be less than 1"),
        ("--max_seq_len 1", "--max_seq_len must be greater than or equal to 2"),
        ("--overlap 32", "--overlap (32) must be less than --max_seq_len (32)"),
        ("--num_heads 3", "--hidden_size (64) must be divisible by --num_heads (3)"),
        ("--min_lr 1", "--min_lr (1.0) must not exceed --lr (0.001)"),
        ("--patience 2 --val_fraction 0", "--patience needs a validation split"),
        ("--zero_stage 2", "--zero_stage needs --launcher deepspeed"),
        ("--launcher ray --offload cpu", "--offload needs --launcher deepspeed"),
        ("--launcher deepspeed --zero_stage 4", "--zero_stage must be less than or equal"),
        ("--launcher deepspeed --parallel fsdp", "--parallel fsdp and --launcher deepspeed"),
        ("--launcher deepspeed --precision fp16", "--precision fp16 and --launcher deepspeed"),
        ("--launcher deepspeed --optimizer muon", "--optimizer muon and --launcher deepspeed"),
        ("--launcher ray --num_workers 2 --dry_run", "--dry_run measures in this process"),
        ("--resume", "--resume needs --out_dir"),
        ("--config nowhere.toml", "cannot read the config file nowhere.toml"),
        ("--resume --out_dir nowhere", "nowhere/config.json does not exist"),
    ],
)
def test_invalid_flags_are_named_with_valid_values(flags: str, message: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_train_config(flags.split())
    assert message in str(exit_.value)


@pytest.mark.parametrize("flags", ["--hiden_size 3", "--lr"])
def test_unknown_flags_and_missing_values(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_train_config(flags.split())
    assert exit_.value.code == 2
    assert flags.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("lr = ", "is not TOML"),
        ("learning_rate = 1", "learning_rate: there is no such setting"),
        ("lr = 'fast'", "--lr must be a number"),
        ("[train]\nlr = 1", "train: there is no such setting"),
    ],
)
def test_invalid_config_files(tmp_path: Path, toml: str, message: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(toml)
    with pytest.raises(SystemExit) as exit_:
        parse_train_config(["--config", str(file)])
    assert message in str(exit_.value)


def test_config_json_holds_every_setting_and_the_version(tmp_path: Path) -> None:
    config = parse_train_config(["--lr", "0.5", "--tokenizer", "bpe", "--file_path", "a.txt"])
    file = tmp_path / "config.json"
    file.write_text(config.to_json())
    assert "fastllm_version" in json.loads(file.read_text())
    assert read_config(file, TrainConfig) == config


def test_settings_do_not_change() -> None:
    config = parse_train_config([])
    with pytest.raises(ValidationError, match="frozen"):
        config.lr = 1.0
    with pytest.raises(FrozenInstanceError):
        resolve(config, Path("run")).precision = "bf16"  # type: ignore[misc]


def test_what_settings_resolve_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """config.json records what they resolved to; the settings themselves stay as given."""
    monkeypatch.setattr("fastllm.training.run.choose_precision", lambda *arguments: "bf16")
    flags = "--precision auto --launcher ray --num_workers 2 --out_dir run --resume"
    config = parse_train_config(flags.split()[:-1])
    run = resolve(config, Path("run"), "cpu", resume=True)
    assert (run.precision, run.data_workers, run.resume) == ("bf16", 0, True)
    assert (run.config.precision, run.config.num_workers, run.config.resume) == ("auto", 2, False)
    recorded = json.loads(run.recorded.to_json())
    assert (recorded["precision"], recorded["num_workers"]) == ("bf16", 0)
    assert "launcher" not in recorded and "out_dir" not in recorded


def test_mutated_configs_load_or_fail_with_a_clear_message(tmp_path: Path) -> None:
    """1,000 settings files with bytes changed, removed or added, alternately TOML and JSON."""
    rng = random.Random(0)
    whole = parse_train_config(["--file_path", "a.txt"]).to_json().encode()
    toml = b'hidden_size = 32\nlr = 0.01\nnorm_first = false\nactivation = "relu"\nseed = 7\n'
    outcomes = {"loaded": 0, "refused": 0}
    for i in range(1000):
        source, file = (whole, tmp_path / "config.json") if i % 2 else (toml, tmp_path / "c.toml")
        data = bytearray(source)
        for _ in range(rng.randint(0, 3)):
            position = rng.randrange(len(data))
            data[position : position + rng.randint(0, 2)] = rng.randbytes(rng.randint(0, 2))
        file.write_bytes(data if rng.random() < 0.7 else data[: rng.randrange(len(data))])
        try:
            if i % 2:
                read_config(file, TrainConfig)
            else:
                parse_train_config(["--config", str(file)])
            outcomes["loaded"] += 1
        except ValueError as error:
            assert str(file) in str(error)
            outcomes["refused"] += 1
        except SystemExit as error:
            assert str(error).startswith("error: ")
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 50


def test_byte_order_marks_in_settings_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_bytes(b"\xef\xbb\xbfhidden_size = 32\n")
    config = parse_train_config(["--config", str(file)])
    assert config.hidden_size == 32
    saved = tmp_path / "config.json"
    saved.write_bytes(b"\xef\xbb\xbf" + config.to_json().encode())
    assert read_config(saved, TrainConfig).hidden_size == 32


SMALL = {"vocab_size": 7, "hidden_size": 48, "num_layers": 6, "num_heads": 4, "max_seq_len": 16}
FLAGS = "--hidden_size 48 --num_layers 6 --num_heads 4 --max_seq_len 16 --dropout 0".split()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_arch_makes_a_model_of_that_architecture(arch: str, tmp_path: Path) -> None:
    config = parse_train_config([*FLAGS, "--arch", arch])
    assert config.decoder_config(7, None) == ARCHITECTURES[arch](**SMALL)
    (tmp_path / "config.json").write_text(config.to_json())
    again = read_config(tmp_path / "config.json", TrainConfig)
    assert again.decoder_config(7, None) == config.decoder_config(7, None)


def test_flags_override_the_architecture() -> None:
    flags = (
        "--arch gemma3 --mlp swiglu --num_kv_heads 2 --head_dim 16 --window 0 --no-qk_norm "
        "--mlp_intermediate_size 48"
    )
    config = parse_train_config([*FLAGS, *flags.split(), "--rope_base", "500"])
    own = {
        "mlp": "swiglu", "num_kv_heads": 2, "head_dim": 16, "window": None, "qk_norm": None,
        "mlp_intermediate_size": 48,
    }  # fmt: skip
    own |= {"rope_base": 500, "local_rope_base": None}
    assert config.decoder_config(7, None) == ARCHITECTURES["gemma3"](**SMALL, **own)
    plain = parse_train_config([*FLAGS, "--arch", "llama", "--activation", "relu"])
    assert plain.decoder_config(7, None) == ARCHITECTURES["llama"](**SMALL, mlp="relu")
    by_preset = parse_train_config(["--preset", "medium", "--arch", "llama"])
    model = by_preset.decoder_config(7, None)
    assert (model.hidden_size, model.mlp_intermediate_size, model.tie_word_embeddings) == (
        384, 1024, True
    )  # fmt: skip


@pytest.mark.parametrize("flags", ["", "--hidden_size 48 --num_heads 4", "--arch llama"])
def test_only_runs_of_earlier_versions_have_a_bias_in_the_head(flags: str, tmp_path: Path) -> None:
    config = parse_train_config(flags.split())
    assert not config.decoder_config(7, None).lm_head_bias
    settings = json.loads(config.to_json())
    del settings["lm_head_bias"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    earlier = parse_train_config(["--resume", "--out_dir", str(tmp_path)])
    assert earlier.decoder_config(7, None).lm_head_bias == (config.arch is None)
    assert (
        parse_train_config([*flags.split(), "--lm_head_bias"]).decoder_config(7, None).lm_head_bias
    )


def test_flags_without_an_architecture() -> None:
    flags = "--norm rms --pos_encoding rope --num_kv_heads 2 --mlp swiglu --qk_norm --window 5"
    model = parse_train_config([*FLAGS, *flags.split()]).decoder_config(7, None)
    assert (model.norm, model.pos_encoding, model.num_kv_heads) == ("rms", "rope", 2)
    assert (model.mlp, model.qk_norm, model.window) == ("swiglu", "weight", 5)
    assert model.embedding_scale == 48**0.5  # as without these flags


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--num_kv_heads 3", "--num_kv_heads (3) must divide --num_heads (4)"),
        ("--arch gemma3 --norm layer", "norm_offset needs --norm rms"),
        ("--pos_encoding rope --head_dim 7", "7 elements, not an even number"),
        ("--arch lama", "--arch must be 'gpt2', 'llama'"),
    ],
)
def test_impossible_models_are_refused(
    flags: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        parse_train_config([*FLAGS, *flags.split()])
    assert reason in f"{error.value}{capsys.readouterr().err}"
