"""Estimates how much memory training takes, and refuses runs that the machine cannot hold."""

import math
import os
from contextlib import suppress
from pathlib import Path

import psutil

from fastllm.command import Log
from fastllm.models.config import DecoderConfig
from fastllm.models.decoder import DecoderModel
from fastllm.ops import decoder_loss, dispatch, extension
from fastllm.ops.memory import LARGE
from fastllm.threads import CGROUP_MEMBERSHIP, CGROUPS, cgroups
from fastllm.training.config import ResolvedRun, TrainConfig
from fastllm.training.distributed import ProcessGroup

# MiB of libraries that are loaded during training: PyTorch's own kernels, matplotlib.
LIBRARIES_MB = 125


def check_memory(
    run: ResolvedRun, model: DecoderModel, group: ProcessGroup, resident_mb: float, log: Log
) -> None:
    """Logs the peak memory that is expected on this machine, if it can be estimated.

    Args:
        model: may be on the meta device.
        resident_mb: of this process before it made anything of the run.

    Raises:
        ValueError: the machine has less.
    """
    if run.device != "cpu" or (group.size > 1 and run.config.parallel != "ddp"):
        return
    batch_size = math.ceil(run.config.batch_size / group.size)
    own = run.config.model_copy(update={"batch_size": batch_size})
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    needed = processes_here * (resident_mb + estimate_memory_mb(model, own, run.threads))
    log(f"memory      about {needed:,.0f} MiB at its peak")
    total, owner = available_mb()
    if needed > total:
        raise ValueError(
            f"training needs about {needed:,.0f} MiB of memory and {owner} has {total:,.0f}; "
            "choose a smaller model, batch_size or max_seq_len, or gradient_checkpointing"
        )


def available_mb(root: Path = CGROUPS, membership: Path = CGROUP_MEMBERSHIP) -> tuple[float, str]:
    """MiB of memory that this process may use at most, and what sets that limit."""
    total, owner = psutil.virtual_memory().total, "this machine"
    for cgroup in cgroups("memory", root, membership):
        for name in ("memory.max", "memory.limit_in_bytes"):  # of version 2, and 1
            with suppress(OSError, ValueError):  # no such file, or "max"
                limit = int((cgroup / name).read_text())
                if 0 < limit < total:
                    total, owner = limit, f"the container or cgroup ({cgroup / name})"
    return total / 2**20, owner


def estimate_memory_mb(model: DecoderModel, config: TrainConfig, threads: int) -> float:
    """MiB that training adds to the resident memory on a CPU, to about 10 %.

    The peak is either at the start of the backward, with weights, two moments and all activations,
    or at its end, with all gradients.

    Args:
        model: may be on the meta device.
    """
    B, S, L, H, V = (
        config.batch_size,
        config.max_seq_len,
        config.num_layers,
        config.hidden_size,
        model.vocab_size,
    )
    parameters = sum(p.numel() for p in model.parameters())
    # A tied weight has two gradients until autograd adds them up.
    gradients = parameters + (V * H if model.tie_word_embeddings else 0)
    if extension.kernels is None or dispatch.requested() == "ref":
        activations = _reference_floats(config, V)
        floats = 3 * parameters + max(activations, gradients)
    elif decoder_loss.why_not_shape(B, S, V) is None:
        # Each thread takes a group of sequences through all layers, and no more threads work than
        # there are groups. Weights are packed twice.
        sequences = math.ceil(decoder_loss.GROUP_ROWS / S)
        busy_threads = min(threads, math.ceil(B / sequences))
        per_row = L * _floats_of_layer(model.config) + 16 * H + V
        floats = 5 * parameters + gradients + busy_threads * sequences * S * per_row
    else:
        # The backward of a layer works on as many floats as it keeps. With gradient checkpointing,
        # a third of those remains in the allocator.
        layers = 1 + L // 3 if config.gradient_checkpointing else L
        activations = B * S * ((layers + 1) * _floats_of_layer(model.config) + L * H)
        logits = min(B * S * V, 2**24)
        floats = 3 * parameters + max(V * H + activations, gradients) + logits
        # Saving copies one weight at a time, in room that gradients have left, except gradients so
        # large that their memory goes back to the system.
        floats += 2 * max((p.numel() for p in model.parameters() if p.nbytes >= LARGE), default=0)
    return LIBRARIES_MB + 4 * floats / 2**20


def _floats_of_layer(config: DecoderConfig) -> int:
    """What the kernels keep of a layer for its backward, per token; 10 H for GPT-2's."""
    H, heads = config.hidden_size, config.num_heads + config.num_kv_heads
    inputs = 2 * H * (2 if config.norm_order == "sandwich" else 1)
    attention = heads * config.head_dim * (3 if config.qk_norm else 2)
    return inputs + attention + config.mlp_intermediate_size * (2 if config.gated else 1)


def _reference_floats(config: TrainConfig, V: int) -> int:
    """Activations and logits of the reference.

    A layer keeps 30 H + 3 N S floats a token with dropout and 27 H + 2 N S without (measured).
    With gradient checkpointing every layer keeps its input, one layer has all of that, and a third
    of it remains in the allocator for each of the others.
    """
    B, S, N, L, H = (
        config.batch_size,
        config.max_seq_len,
        config.num_heads,
        config.num_layers,
        config.hidden_size,
    )
    layer = B * S * (30 * H + 3 * N * S if config.dropout else 27 * H + 2 * N * S)
    kept = layer + L * (B * S * H + layer // 3) if config.gradient_checkpointing else L * layer
    return kept + 3 * B * S * V
