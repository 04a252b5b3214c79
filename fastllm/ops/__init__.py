"""The operations, one file each: reference, autograd function, table of implementations."""

from collections.abc import Mapping, Sequence

from fastllm.ops import (
    adam,
    attention,
    decode,
    decoder_loss,
    dispatch,
    dropout,
    embedding,
    linear_cross_entropy,
    mlp,
    multi_head_attention,
    norm,
    rope,
    sampling,
)
from fastllm.ops.dispatch import Implementation

# Operations of a whole model. If they decline, the model runs layer by layer and each operation
# chooses its own implementation, so they have no reference of their own.
WHOLE_MODEL: dict[str, list[Implementation]] = {
    "decoder_loss": decoder_loss.IMPLEMENTATIONS,
    "decode": decode.IMPLEMENTATIONS,
}
# Every operation with its table, best implementation first.
OPERATIONS: dict[str, list[Implementation]] = WHOLE_MODEL | {
    "embedding": embedding.IMPLEMENTATIONS,
    "multi_head_attention": multi_head_attention.IMPLEMENTATIONS,
    "rope": rope.IMPLEMENTATIONS,
    "attention": attention.IMPLEMENTATIONS,
    "mlp": mlp.IMPLEMENTATIONS,
    "norm": norm.IMPLEMENTATIONS,
    "dropout": dropout.IMPLEMENTATIONS,
    "linear_cross_entropy": linear_cross_entropy.IMPLEMENTATIONS,
    "adam": adam.IMPLEMENTATIONS,
    "sampling": sampling.IMPLEMENTATIONS,
}

LAYER_BY_LAYER = "layer by layer"


def implementations(device: str = "cpu") -> dict[str, dict[str, str]]:
    """For each operation, the implementation that runs on this machine, and why others do not.

    Args:
        device: the tensors' device, `cpu` or `cuda`.

    Returns:
        `{operation: {implementation: "chosen" | "available" | reason}}`, best first. The choice
        is the one for plain fp32 tensors; other arguments may lead further down the list. If the
        operation of a whole model cannot run, "layer by layer" is chosen.
    """
    answer = {}
    for operation, table in OPERATIONS.items():
        reasons = {each.name: _why_not_on(device, each) for each in table}
        if operation in WHOLE_MODEL:
            if (reason := dispatch.why_not_requested(*reasons)) is not None:
                reasons = dict.fromkeys(reasons, reason)
            reasons[LAYER_BY_LAYER] = None
            chosen = next(name for name, reason in reasons.items() if reason is None)
        else:
            chosen = _chosen(operation, table, device)
        answer[operation] = {
            name: "chosen" if name == chosen else reason or "available"
            for name, reason in reasons.items()
        }
    return answer


def _why_not_on(device: str, implementation: Implementation) -> str | None:
    foreign = {"cpu": "cuda", "triton": "cpu"}  # the device whose tensors its kernels cannot take
    reason = implementation.why_not_here()
    return reason or (f"not for {device}" if foreign.get(implementation.name) == device else None)


def _chosen(operation: str, table: Sequence[Implementation], device: str) -> str:
    fitting = [each for each in table if _why_not_on(device, each) is None]
    if dispatch.requested() in {each.name for each in table} - {each.name for each in fitting}:
        fitting = list(table)  # so that the error says why the requested one cannot run
    return dispatch.choose_here(operation, fitting).name


def implementation_line(device: str = "cpu", declined: Mapping[str, str] | None = None) -> str:
    """The implementation of every operation for tensors on the device, on one line.

    On a CPU, an operation without a kernel is left out: it is part of another one's kernel.

    Args:
        declined: reasons why operations of `WHOLE_MODEL` do not run for this model.
    """
    chosen = {
        operation: next(name for name, reason in table.items() if reason == "chosen")
        for operation, table in implementations(device).items()
        if device != "cpu" or "cpu" in table
    }
    for operation, reason in (declined or {}).items():
        if chosen[operation] != LAYER_BY_LAYER:
            chosen[operation] = f"{LAYER_BY_LAYER} ({reason})"
    return ", ".join(f"{operation}: {name}" for operation, name in chosen.items())
