import errno
import json
import os
import random
import resource
import shutil
import stat
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastllm import DecoderModel, files
from fastllm.command import warn_once
from fastllm.training import checkpoint as checkpoint_module
from fastllm.training.checkpoint import (
    CheckpointError,
    Progress,
    find_checkpoint,
    load_model,
    load_training_state,
    run_of,
    save_checkpoint,
)
from fastllm.training.engine import make_optimizers
from fastllm.training.loop import Trainer, TrainingError
from tests.conftest import MakeTrainer


@pytest.fixture
def trained(make_trainer: MakeTrainer) -> Trainer:
    trainer = make_trainer(
        "run", "--max_steps", "4", "--save_interval", "2", "--eval_interval", "2"
    )
    trainer.train()
    return trainer


def steps(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_layout_of_a_run(trained: Trainer) -> None:
    run_dir = trained.run_dir
    names = {str(p.relative_to(run_dir)) for p in run_dir.rglob("*") if p.is_file()}
    step = "checkpoints/step-00000004/"
    assert {
        "config.json", "tokenizer.json", "model.safetensors", "metrics.jsonl",
        step + "config.json", step + "tokenizer.json", step + "model.safetensors",
        step + "training_state/optimizer.safetensors", step + "training_state/progress.json",
    } <= names  # fmt: skip
    assert (run_dir / "training_state/progress.json").exists()
    assert find_checkpoint(run_dir) == run_dir / "checkpoints/step-00000004"
    assert find_checkpoint(run_dir / "checkpoints/step-00000004").name == "step-00000004"


def test_model_and_optimizer_are_restored_bit_for_bit(trained: Trainer) -> None:
    model, tokenizer, config = load_model(find_checkpoint(trained.run_dir))
    assert config.to_json() == trained.run.recorded.to_json()
    assert tokenizer.fingerprint == trained.tokenizer.fingerprint
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert all(p.requires_grad for p in model.parameters())
    optimizers = make_optimizers(model, config)
    progress = load_training_state(find_checkpoint(trained.run_dir), model, optimizers)
    assert progress == trained.progress
    assert progress.step == 4
    ours, theirs = optimizers[0].state_dict(), trained.engine.optimizers[0].state_dict()
    assert json.dumps(ours["param_groups"]) == json.dumps(theirs["param_groups"])
    for index, entries in theirs["state"].items():
        for name, tensor in entries.items():
            assert torch.equal(ours["state"][index][name], tensor)


def test_a_tied_weight_is_saved_once(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("tied", "--max_steps", "2", "--tie_word_embeddings")
    trainer.train()
    checkpoint = find_checkpoint(trainer.run_dir)
    assert "lm_head.weight" not in load_file(checkpoint / "model.safetensors")
    model, _, _ = load_model(checkpoint)
    assert model.tie_word_embeddings
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    edit_config(checkpoint, tie_word_embeddings=False)
    (checkpoint / "checksums.json").unlink()
    with pytest.raises(CheckpointError, match="'lm_head.weight' is missing, expected"):
        load_model(checkpoint)


def test_old_checkpoints_are_removed_and_the_best_stays(make_trainer: MakeTrainer) -> None:
    flags = "--max_steps 9 --save_interval 2 --keep_checkpoints 2 --val_fraction 0"
    trainer = make_trainer("run", *flags.split())
    trainer.progress.best_step = 4
    trainer.train()
    assert steps(trainer.run_dir) == ["step-00000004", "step-00000008", "step-00000009"]


def test_the_newest_checkpoint_is_the_one_with_the_highest_step(make_trainer: MakeTrainer) -> None:
    """Whatever the clock said when it was written."""
    flags = "--max_steps 6 --save_interval 2 --keep_checkpoints 2 --val_fraction 0"
    trainer = make_trainer("run", *flags.split())
    trainer.total_steps = 4
    trainer.train()
    tomorrow = time.time() + 86_400
    os.utime(trainer.run_dir / "checkpoints/step-00000002", (tomorrow, tomorrow))
    assert find_checkpoint(trainer.run_dir).name == "step-00000004"
    trainer.total_steps = 6
    trainer.train()
    assert steps(trainer.run_dir) == ["step-00000004", "step-00000006"]


@pytest.mark.parametrize("fail_at", ["write", "flush", "rename"])
def test_a_failing_disk_leaves_the_last_checkpoint_whole(
    trained: Trainer, monkeypatch: pytest.MonkeyPatch, fail_at: str
) -> None:
    before = find_checkpoint(trained.run_dir)

    def no_space(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = {
        "write": (checkpoint_module, "save_file"),
        "flush": (files, "flush"),
        "rename": (Path, "rename"),
    }[fail_at]
    monkeypatch.setattr(*target, no_space)
    trained.progress.step = 5
    with pytest.raises(
        CheckpointError, match=r"No space left on device.*continue with --resume, from .*step-"
    ):
        trained.save()
    monkeypatch.undo()
    newest = find_checkpoint(trained.run_dir)
    assert newest == before
    load_model(newest)
    load_training_state(newest, trained.model, make_optimizers(trained.model, trained.config))
    assert not [name for name in steps(trained.run_dir) if name.startswith("writing")]


def test_a_failing_disk_at_the_first_checkpoint(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint_module, "save_file", no_space)
    with pytest.raises(CheckpointError, match=r"Free some space .*, then start the run again$"):
        make_trainer("run").save()


def test_a_disk_that_is_really_full(trained: Trainer) -> None:
    """The system refuses to let a file grow, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    trained.progress.step = 7
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="File too large"):
            trained.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert find_checkpoint(trained.run_dir).name == "step-00000004"
    load_model(find_checkpoint(trained.run_dir))


@pytest.mark.parametrize("fault", ["links", "folders", "removing"])
def test_housekeeping_that_fails_is_not_a_failed_save(
    trained: Trainer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: str,
) -> None:
    warn_once.cache_clear()
    fsync = os.fsync

    def refuse(*args: object, **kwargs: object) -> None:
        number = {"links": errno.EOPNOTSUPP, "folders": errno.EINVAL, "removing": errno.EBUSY}
        raise OSError(number[fault], os.strerror(number[fault]))

    def flush_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            refuse()
        fsync(descriptor)

    if fault == "links":
        monkeypatch.setattr(Path, "symlink_to", refuse)
    elif fault == "folders":
        monkeypatch.setattr(os, "fsync", flush_files)
    else:
        monkeypatch.setattr(shutil, "rmtree", refuse)
    for step in (5, 6):
        trained.progress.step = step
        trained.save()
    newest = find_checkpoint(trained.run_dir)
    assert newest.name == "step-00000006"
    load_model(newest)
    errors = capsys.readouterr().err
    assert errors.count("warning") == (fault != "folders"), errors
    if fault == "links":
        assert (trained.run_dir / "latest.txt").read_text() == "checkpoints/step-00000006\n"


def test_weights_that_are_not_finite_are_not_saved(trained: Trainer) -> None:
    next(trained.model.parameters()).data[0] = torch.nan
    with pytest.raises(TrainingError, match="is nan at step"):
        trained.save()
    model, _, _ = load_model(find_checkpoint(trained.run_dir))
    assert all(t.isfinite().all() for t in model.state_dict().values())


def test_leftovers_of_a_kill_do_not_count_as_checkpoints(trained: Trainer) -> None:
    run_dir = trained.run_dir
    newest = find_checkpoint(run_dir)
    for name in ("writing-" + 32 * "9", "removing-step-00000001"):
        shutil.copytree(newest, run_dir / "checkpoints" / name)
    assert find_checkpoint(run_dir) == newest
    trained.progress.step = 5
    trained.save()
    assert all(name.startswith("step-") for name in steps(run_dir))


def test_the_run_of_a_checkpoint_that_is_the_current_folder(
    trained: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(find_checkpoint(trained.run_dir))
    assert run_of(Path()) == trained.run_dir.resolve()
    monkeypatch.chdir(tmp_path)
    assert run_of(Path()) == tmp_path.resolve()


def test_folders_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)


def copy_without_checksums(trained: Trainer, to: Path) -> Path:
    """A copy to edit by hand: without checksums, the other checks must find what is wrong."""
    shutil.copytree(find_checkpoint(trained.run_dir), to)
    (to / "checksums.json").unlink()
    return to


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 32},
        {"num_layers": 1000},
        {"max_seq_len": 2**20},
        {"hidden_size": 2**16},
        {"tie_word_embeddings": True},
    ],
    ids=str,
)
def test_settings_that_do_not_match_the_weights(
    trained: Trainer, tmp_path: Path, changes: dict[str, object]
) -> None:
    """Found from the shapes alone: a wrong setting must not allocate a huge model."""
    folder = copy_without_checksums(trained, tmp_path / "copy")
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=r"model.safetensors does not fit config.json"):
        load_model(folder)


def test_foreign_files(trained: Trainer, tmp_path: Path) -> None:
    folder = copy_without_checksums(trained, tmp_path / "copy")
    torch.save({"a": torch.ones(3)}, folder / "model.safetensors")  # a pickle
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read as safetensors"):
        load_model(folder)
    (folder / "config.json").write_text("[1, 2]")
    with pytest.raises(CheckpointError, match=r"config.json is not a run's config.json"):
        load_model(folder)


def test_a_folder_in_hugging_faces_format_is_no_run(tmp_path: Path) -> None:
    DecoderModel(
        11, 16, 1, 2, 12,
        pos_encoding_learned=True, lm_head_bias=False, scale_embeddings=False,
        tie_word_embeddings=True, mlp_activation="gelu_tanh",
    ).save_gpt2(tmp_path / "gpt2")  # fmt: skip
    with pytest.raises(CheckpointError, match=r"holds a model in .*; finetune trains it"):
        load_model(find_checkpoint(str(tmp_path / "gpt2")))


def test_optimizer_state_of_another_run(trained: Trainer, make_trainer: MakeTrainer) -> None:
    other = make_trainer("other", "--max_steps", "1", "--optimizer", "muon")
    other.train()
    with pytest.raises(CheckpointError, match="does not fit this run"):
        load_training_state(
            find_checkpoint(trained.run_dir),
            other.model,
            make_optimizers(other.model, other.config),
        )


def test_checksums_reveal_damage(trained: Trainer) -> None:
    checkpoint = find_checkpoint(trained.run_dir)
    file = checkpoint / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged.*another checkpoint"):
        load_model(checkpoint)


@pytest.mark.parametrize("with_checksums", [True, False])
def test_mutated_checkpoints_load_or_fail_with_a_clear_message(
    trained: Trainer, tmp_path: Path, with_checksums: bool
) -> None:
    """500 checkpoints with a file whose bytes changed, or that is longer, truncated or missing."""
    rng = random.Random(1)
    folder = tmp_path / "copy"
    shutil.copytree(find_checkpoint(trained.run_dir), folder)
    if not with_checksums:
        (folder / "checksums.json").unlink()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    optimizers = make_optimizers(trained.model, trained.config)
    refused = 0
    for _ in range(500):
        file = rng.choice(files)
        whole = file.read_bytes()
        data = bytearray(whole)
        # Changes to headers and JSON matter most.
        position = rng.randrange(min(len(data), rng.choice([8, 300, len(data)])))
        # A folder without checksums is an export, and not damaged.
        gone = ["gone"] if file.name != "checksums.json" else []
        change = rng.choice(["flip", "insert", "cut", *gone])
        if change == "flip":
            data[position] ^= 1 << rng.randrange(8)
        elif change == "insert":
            data[position:position] = rng.randbytes(rng.randint(1, 9))
        elif change == "cut":
            del data[position:]
        file.write_bytes(data)
        if change == "gone":
            file.unlink()
        try:
            load_model(folder)
            load_training_state(folder, trained.model, optimizers)
        except CheckpointError as error:
            assert str(folder) in str(error)
            refused += 1
        file.write_bytes(whole)
    assert refused == 500 if with_checksums else refused > 250
    load_model(folder)


def test_saving_a_step_twice_replaces_its_checkpoint(trained: Trainer) -> None:
    trained.save()
    assert steps(trained.run_dir)[-1] == "step-00000004"
    load_model(find_checkpoint(trained.run_dir))


def test_a_kill_between_the_renames_of_a_step_saved_twice(
    trained: Trainer, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint that was set aside is found, resumed from, and put back by the next save."""
    rename = Path.rename

    def die_before_the_new_one_gets_its_name(path: Path, target: Path) -> Path:
        if target.name == "step-00000004":
            raise SystemExit("killed")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", die_before_the_new_one_gets_its_name)
    with pytest.raises(SystemExit, match="killed"):
        trained.save()
    monkeypatch.undo()
    assert "step-00000004" not in steps(trained.run_dir)
    newest = find_checkpoint(trained.run_dir)
    assert newest.name == "replaced-step-00000004"
    model, _, _ = load_model(newest)
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    resumed = make_trainer("run", "--resume", "--max_steps", "5", "--keep_checkpoints", "9")
    assert resumed.progress.step == 4
    resumed.train()
    assert steps(trained.run_dir)[-2:] == ["step-00000004", "step-00000005"]
    assert all(name.startswith("step-") for name in steps(trained.run_dir))


def test_read_only_folder(trained: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        # Root may write anywhere, so the error of a read-only folder is simulated.
        def refuse(*args: object, **kwargs: object) -> None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr(Path, "mkdir", refuse)
    else:
        (trained.run_dir / "checkpoints").chmod(0o500)
    with pytest.raises(CheckpointError, match=r"Permission denied.*make the folder writable"):
        save_checkpoint(
            trained.run_dir, trained.config, trained.tokenizer, trained.model, [], Progress(9)
        )
    if os.geteuid() != 0:
        (trained.run_dir / "checkpoints").chmod(0o700)
    monkeypatch.undo()
    load_model(find_checkpoint(trained.run_dir))
