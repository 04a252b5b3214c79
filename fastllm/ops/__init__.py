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


def implementations() -> dict[str, dict[str, str]]:
    """For each operation: what this machine runs, and why it does not run the others.

    Returns:
        `{operation: {implementation: "chosen" | "available" | reason}}`, best first. The choice
        is the one for plain fp32 CPU tensors; other arguments may lead further down the list.
    """
    answer: dict[str, dict[str, str]] = {}
    for operation, table in OPERATIONS.items():
        chosen = dispatch.choose(operation, table)
        answer[operation] = {
            each.name: "chosen" if each is chosen else each.why_not() or "available"
            for each in table
        }
    return answer


def implementation_line() -> str:
    """Which implementation every operation runs by, on one line."""
    return ", ".join(
        f"{operation}: {next(name for name, why in table.items() if why == 'chosen')}"
        for operation, table in implementations().items()
    )
