"""Several processes train as one does, however they divide the steps."""

import io
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from multiprocessing import get_context
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from fastllm import SimpleCharacterTokenizer
from fastllm.train import main
from fastllm.training.checkpoint import (
    CheckpointError,
    Progress,
    find_checkpoint,
    load_model,
    save_checkpoint,
)
from fastllm.training.config import parse_train_config
from fastllm.training.distributed import LostProcessError, ProcessError, ProcessGroup
from fastllm.training.loop import batches
from fastllm.training.metrics import read_metrics

SMALL = (
    "--max_seq_len 16 --batch_size 8 --hidden_size 32 --num_layers 3 --num_heads 2 --dropout 0 "
    "--log_interval 1 --threads 1 --quiet"
)
ODD = "--file_path {short} --max_seq_len 9 --val_fraction 0.03 --batch_size 5 --max_steps 24"
# Flags of runs that have the same results in one process and in two.
RUNS = {
    "ddp": "--max_steps 50",
    "fsdp": "--max_steps 50 --parallel fsdp",
    "pipeline": "--max_steps 50 --parallel pipeline",
    # 5 sequences for 2 ranks; the last batch of an epoch has one, for rank 1 alone.
    "ddp-odd": ODD,
    "fsdp-odd": ODD + " --parallel fsdp",
    "pipeline-odd": ODD + " --parallel pipeline",
    "ddp-accumulation": "--max_steps 9 --grad_accum 3 --lr_schedule cosine",
    "fsdp-accumulation": "--max_steps 9 --grad_accum 3 --lr_schedule cosine --parallel fsdp",
    "pipeline-accumulation": "--max_steps 9 --grad_accum 3 --parallel pipeline",
    "ddp-tied": "--max_steps 9 --tie_word_embeddings --optimizer adamw --weight_decay 0.1",
    "fsdp-tied": "--max_steps 9 --tie_word_embeddings --gradient_checkpointing --parallel fsdp",
    # Two sequences in a microbatch, and three rows of padding.
    "pipeline-rest": "--max_steps 9 --batch_size 13 --parallel pipeline",
    "ddp-muon": "--max_steps 9 --optimizer muon",
    "pipeline-muon": "--max_steps 9 --optimizer muon --parallel pipeline",
    "ddp-post": "--max_steps 9 --post_norm --pos_encoding learned",
    "pipeline-post": "--max_steps 9 --post_norm --pos_encoding learned --parallel pipeline",
    "fsdp-unclipped": "--max_steps 9 --max_grad_norm 0 --parallel fsdp",
}
# Flags of runs of two processes, and of resuming them: with another way of dividing a step, or with
# dropout, whose masks each process draws for itself.
RESUMED = {
    "ddp": ("--max_steps 10 --parallel pipeline", "--max_steps 20 --parallel ddp"),
    "fsdp": ("--max_steps 10 --parallel ddp", "--max_steps 20 --parallel fsdp"),
    "pipeline": ("--max_steps 10 --parallel fsdp", "--max_steps 20 --parallel pipeline"),
    "dropout-whole": ("--max_steps 8 --dropout 0.2", "--max_steps 8 --dropout 0.2"),
    "dropout-parts": ("--max_steps 3 --dropout 0.2", "--max_steps 8 --dropout 0.2"),
}
# Flags that two processes refuse with a message. Only rank 0 can notice those of MAIN_ONLY.
MAIN_ONLY = {
    "--file_path nowhere.txt": "nowhere.txt",
    "--out_dir {used}": "holds a run already; --resume continues it",
}
REFUSED = {
    **MAIN_ONLY,
    "--batch_size 1": "a batch of 1 cannot be sharded over 2 processes; start fewer",
    "--batch_size 1 --parallel fsdp": "a batch of 1 cannot be sharded over 2 processes",
    "--num_layers 1 --parallel pipeline": "1 layers cannot be divided among 2 processes",
    "--tie_word_embeddings --parallel pipeline": "pipeline cannot tie the embeddings",
    "--optimizer muon --parallel fsdp": "muon needs whole matrices",
    "--lr 0.{rank}1": "rank 1 has lr 0.11, but rank 0 has 0.01; start all processes with the same",
}


def spawn(count: int, target: Callable[..., None], *arguments: object) -> None:
    """Runs `target(rank, count, port, *arguments)` in processes that all end with status 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("spawn")
    children = [
        context.Process(target=target, args=(rank, count, port, *arguments))
        for rank in range(count)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(150)
    ended = [child.exitcode for child in children]
    for child in children:
        child.kill()
    assert ended == [0] * count


def train_together(
    rank: int, count: int, port: int, folder: Path, runs: dict[str, list[str]]
) -> None:
    """In a child process: each of the runs, as one of `count`; what they print goes into files."""
    connect(rank, count, port)
    for name, flags in runs.items():
        printed = io.StringIO()
        with redirect_stderr(printed):
            try:
                main([flag.format(rank=rank) for flag in flags])
            except SystemExit as end:
                printed.write(str(end))
        (folder / f"{name}.{rank}.txt").write_text(printed.getvalue())
    torch.distributed.destroy_process_group()
    # Everything is written. At exit, the remains of this many process groups may abort.
    os._exit(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with every run: of one process in `one`, of two in `two`."""
    folder = tmp_path_factory.mktemp("together")
    documentation = "\n".join(topics.values())
    long, short = folder / "long.txt", folder / "short.txt"
    long.write_text(documentation[:6000], "utf-8")
    short.write_text(documentation[:980], "utf-8")  # 106 training sequences of 9
    common = [*SMALL.split(), "--file_path", str(long)]

    def flags_of(where: str, name: str, flags: str) -> list[str]:
        run_dir = folder / where / name
        return [*common, *flags.format(short=short).split(), "--out_dir", str(run_dir)]

    for name, flags in RUNS.items():
        main(flags_of("one", name, flags))
    together = {name: flags_of("two", name, flags) for name, flags in RUNS.items()}
    for name, (first, then) in RESUMED.items():
        together[f"begun-{name}"] = flags_of("resumed", name, first)
        together[f"resumed-{name}"] = [*flags_of("resumed", name, then), "--resume"]
    used = folder / "one" / "ddp"
    for flags in REFUSED:
        own = flags.format(used=used, rank="{rank}").split()
        together[file_name(flags)] = [*flags_of("refused", "run", ""), *own]
    spawn(2, train_together, folder, together)
    yield folder


def file_name(flags: str) -> str:
    """The name of the files with the output of a refused command."""
    return flags.replace("/", "").replace(" ", "")


def losses(run_dir: Path, keys: str = "loss val_loss lr tokens grad_norm") -> torch.Tensor:
    lines = read_metrics(run_dir / "metrics.jsonl")
    values = [[line[key] or 0 for key in keys.split()] for line in lines]
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.processes
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(folder: Path, name: str) -> None:
    """Their losses agree to 1e-6 at every step, and so do their checkpoints."""
    one, two = (folder / where / name for where in ("one", "two"))
    expected, found = losses(one), losses(two)
    assert expected.shape == found.shape and len(expected) >= 9
    # Muon rounds to bf16, which may turn a difference in the last bit into one of 2^-8.
    rtol = 2**-8 if "muon" in name else 1e-6
    torch.testing.assert_close(found, expected, rtol=rtol, atol=0)
    for file in ("model.safetensors", "training_state/optimizer.safetensors"):
        ours, theirs = load_file(two / file), load_file(one / file)
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            # By norms: where a gradient is almost zero, as that of a key's bias always is, Adam
            # amplifies its rounding error to a full step.
            if not key.endswith("qkv_proj.bias") and "muon" not in name:
                difference, scale = (ours[key] - tensor).norm(), tensor.norm()
                assert difference <= 1e-4 * scale, f"{key}: {difference} of {scale}"
    _, _, config = load_model(find_checkpoint(two))
    assert config.parallel == name.partition("-")[0]
    progress = [
        json.loads((run / "training_state/progress.json").read_text()) for run in (one, two)
    ]
    assert progress[0]["tokens"] == progress[1]["tokens"]


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "pipeline"])
def test_a_run_resumes_with_another_way_of_dividing_it(folder: Path, kind: str) -> None:
    found = losses(folder / "resumed" / kind, "loss lr tokens")
    expected = losses(folder / "one/ddp", "loss lr tokens")[: len(found)]
    assert len(found) == 20
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.processes
def test_a_resumed_run_draws_the_same_dropout(folder: Path) -> None:
    whole, parts = (folder / "resumed" / f"dropout-{name}" for name in ("whole", "parts"))
    assert torch.equal(losses(whole, "loss lr tokens"), losses(parts, "loss lr tokens"))
    assert not torch.equal(losses(whole, "loss")[:8], losses(folder / "one/ddp", "loss")[:8])
    ours, theirs = (load_file(run / "model.safetensors") for run in (whole, parts))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.processes
def test_one_process_resumes_the_run_of_two(folder: Path) -> None:
    run_dir = folder / "two" / "fsdp-accumulation"
    main(["--resume", "--out_dir", str(run_dir), "--max_steps", "14", "--quiet"])
    longer = folder / "one" / "fsdp-accumulation"
    main(["--resume", "--out_dir", str(longer), "--max_steps", "14", "--quiet"])
    torch.testing.assert_close(losses(run_dir), losses(longer), rtol=1e-6, atol=0)


@pytest.mark.processes
@pytest.mark.parametrize("flags", REFUSED)
def test_refused(folder: Path, flags: str) -> None:
    for rank in (0, 1):
        printed = (folder / f"{file_name(flags)}.{rank}.txt").read_text()
        others = "rank 0 failed; its message says why"
        assert (others if rank and flags in MAIN_ONLY else REFUSED[flags]) in printed
        assert printed.count("\n") == 0


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_any_number_of_ranks_reads_every_sequence_once(count: int) -> None:
    """Three epochs of 22 sequences in batches of 5: all ranks together read what one does."""
    readers = [
        batches(22, 5, seed=1, epoch=0, first_batch=0, data_group=ProcessGroup(rank, count))
        for rank in range(count)
    ]
    alone = batches(22, 5, seed=1, epoch=0, first_batch=0)
    for _ in range(15):
        shares = [next(reader) for reader in readers]
        assert [index for share in shares for index in share] == next(alone)
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1


def connect(rank: int, count: int, port: int) -> ProcessGroup:
    torch.distributed.init_process_group(
        "gloo", f"tcp://127.0.0.1:{port}", world_size=count, rank=rank
    )
    return ProcessGroup(rank, count)


def save_with_failures(rank: int, count: int, port: int, folder: Path) -> None:
    """In a child process: rank 0 fails in its own part of saving, then both save.

    Every rank lives until the end, so the others are told of a failure, and do not conclude it from
    a closed connection.
    """
    group = connect(rank, count, port)
    config = parse_train_config("--hidden_size 8 --num_layers 1".split())
    tokenizer = SimpleCharacterTokenizer(["abc"])
    model = config.build_model(tokenizer.vocab_size, None)

    def save() -> str:
        try:
            save_checkpoint(folder, config, tokenizer, model, [], Progress(1), group)
        except (CheckpointError, ProcessError) as error:
            return f"{type(error).__name__}: {error}"
        return "saved"

    def fail(*arguments: object) -> None:
        raise OSError("the disk is full")

    outcomes = []
    for step in ("tidy", "_write_checksums"):
        with pytest.MonkeyPatch.context() as patch:
            if rank == 0:
                patch.setattr(f"fastllm.training.checkpoint.{step}", fail)
            outcomes.append(save())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcp.HuggingFaceStorageWriter, "finish", lambda *args, **kwargs: None)
        outcomes.append(save())
    outcomes.append(save())
    (folder / f"outcomes.{rank}.json").write_text(json.dumps(outcomes))
    torch.distributed.destroy_process_group()


def test_all_ranks_learn_that_rank_0_cannot_save(tmp_path: Path) -> None:
    spawn(2, save_with_failures, tmp_path)
    first, second = (
        json.loads((tmp_path / f"outcomes.{rank}.json").read_text()) for rank in (0, 1)
    )
    assert [outcome.startswith("CheckpointError: ") for outcome in first] == [True] * 3 + [False]
    assert all("the disk is full" in outcome for outcome in first[:2])
    assert "consolidated files instead of one" in first[2]
    assert second[:3] == ["ProcessError: rank 0 failed; its message says why"] * 3
    assert first[3] == second[3] == "saved"


def lose_rank_1(rank: int, count: int, port: int, folder: Path) -> None:
    """In a child process: rank 1 ends while rank 0 waits for it."""
    group = connect(rank, count, port)
    group.all_reduce(1.0)
    if rank == 1:
        os._exit(0)
    lost = pytest.raises(LostProcessError, match="another process of this run has ended")
    with lost, group.reporting_peer_loss():
        group.all_reduce(1.0)
    os._exit(0)


def test_the_loss_of_a_process_is_reported_in_one_line(tmp_path: Path) -> None:
    """The wording of gloo's error, by which it is recognized, is still that of this PyTorch."""
    spawn(2, lose_rank_1, tmp_path)
