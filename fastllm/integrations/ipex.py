"""Intel's extension for PyTorch, for programs that still call it; fastllm does not need it.

The project was archived in March 2026. Its last release, 2.8, works only with torch 2.8. With
another torch its import prints an error and raises AttributeError, so versions are compared first.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

PACKAGE = "intel_extension_for_pytorch"
INSTEAD = (
    "You do not need it: the project was archived in March 2026 and supports no torch after 2.8, "
    "and fastllm has kernels of its own, in its modules and, for models of transformers, by "
    "fastllm.integrations.huggingface.accelerate(model)"
)


def why_not() -> str | None:
    """Why the versions of the extension and of torch do not fit, or None.

    This does not import the extension, so its import in `optimize` may still fail.
    """
    try:
        installed = version(PACKAGE)
    except PackageNotFoundError:
        return f"Intel's extension for PyTorch is not installed (torch is {torch.__version__})"
    needed, present = (".".join(v.split(".")[:2]) for v in (installed, torch.__version__))
    if needed == present:
        return None
    return (
        f"Intel's extension for PyTorch {installed} works only with torch {needed}, and torch is "
        f"{torch.__version__}"
    )


def optimize(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """`ipex.optimize`: a copy of the model with the extension's layers.

    Args:
        model: in training mode with an optimizer, in evaluation mode without one.
        optimizer: of the model's parameters; its copy updates the parameters of the copy.
        dtype: the type of the weights, `torch.bfloat16` or `torch.float16`; None leaves it.

    Returns:
        The copy; with an optimizer, both copies as a pair.

    Raises:
        ImportError: the extension is not installed, does not fit this torch, or fails to import.
            The message names the versions and the replacement.
    """
    reason = why_not()
    if reason is not None:
        raise ImportError(f"{reason}. {INSTEAD}", name=PACKAGE)
    try:
        ipex = import_module(PACKAGE)
    # NameError: with transformers 5. SystemExit: on a CPU without AVX2.
    except (ImportError, AttributeError, NameError, OSError, SystemExit) as error:
        raise ImportError(
            f"Intel's extension for PyTorch {version(PACKAGE)} is for torch {torch.__version__}, "
            f"but importing it fails ({type(error).__name__}: {error}); it supports "
            f"transformers up to 4. {INSTEAD}",
            name=PACKAGE,
        ) from error
    return ipex.optimize(model, optimizer=optimizer, dtype=dtype)
