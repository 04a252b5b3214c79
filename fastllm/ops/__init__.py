"""The operations, one file each: reference, autograd function, table of implementations."""

from fastllm.ops import (
    adam,
    attention,
    dispatch,
    dropout,
    embedding,
    layer_norm,
    linear_cross_entropy,
    mlp,
    multi_head_attention,
    sampling,
)

# Every operation with its table, best implementation first.
OPERATIONS = {
    "embedding": embedding.IMPLEMENTATIONS,
    "multi_head_attention": multi_head_attention.IMPLEMENTATIONS,
    "attention": attention.IMPLEMENTATIONS,
    "mlp": mlp.IMPLEMENTATIONS,
    "layer_norm": layer_norm.IMPLEMENTATIONS,
    "dropout": dropout.IMPLEMENTATIONS,
    "linear_cross_entropy": linear_cross_entropy.IMPLEMENTATIONS,
    "adam": adam.IMPLEMENTATIONS,
    "sampling": sampling.IMPLEMENTATIONS,
}


def implementations(device: str = "cpu") -> dict[str, dict[str, str]]:
    """For each operation: what this machine runs, and why it does not run the others.

    Args:
        device: `cpu` or `cuda`, where the tensors are.

    Returns:
        `{operation: {implementation: "chosen" | "available" | reason}}`, best first. The choice
        is the one for plain fp32 tensors; other arguments may lead further down the list.
    """
    foreign = {"cpu": "cuda", "triton": "cpu"}  # what a device's own kernels cannot take
    answer: dict[str, dict[str, str]] = {}
    for operation, table in OPERATIONS.items():
        fitting = [each for each in table if foreign.get(each.name) != device]
        if dispatch.requested() not in ("auto", *(each.name for each in fitting)):
            fitting = table  # asked for all the same: why not is said there
        chosen = dispatch.choose(operation, fitting)
        answer[operation] = {
            each.name: "chosen"
            if each is chosen
            else each.why_not() or ("available" if each in fitting else f"not for {device}")
            for each in table
        }
    return answer


def implementation_line(device: str = "cpu") -> str:
    """Which implementation every operation runs by on tensors of the device, on one line."""
    return ", ".join(
        f"{operation}: {next(name for name, why in table.items() if why == 'chosen')}"
        for operation, table in implementations(device).items()
    )
