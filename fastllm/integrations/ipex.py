"""Intel's extension for PyTorch, for programs that still call it; nothing in fastllm needs it.

The project was archived in March 2026. Its last release, 2.8, works with torch 2.8 alone. Beside
another torch it prints so and dies of an AttributeError, so versions are compared before it is
imported.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

PACKAGE = "intel_extension_for_pytorch"
INSTEAD = (
    "There is no need for it: the project was archived in March 2026, with torch 2.8 as the last "
    "that it works with, and fastllm has kernels of its own, in its modules and, for models of "
    "transformers, by fastllm.integrations.huggingface.accelerate(model)"
)


def why_not() -> str | None:
    """Why the extension cannot serve here, by its version and torch's, or None.

    It is not imported for that: `optimize` may still find that its import fails.
    """
    try:
        installed = version(PACKAGE)
    except PackageNotFoundError:
        return f"Intel's extension for PyTorch is not installed (torch is {torch.__version__})"
    needed, present = (".".join(v.split(".")[:2]) for v in (installed, torch.__version__))
    if needed == present:
        return None
    return (
        f"Intel's extension for PyTorch {installed} works with torch {needed} alone, and torch is "
        f"{torch.__version__}"
    )


def optimize(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """`ipex.optimize`: a copy of the model whose layers are the extension's.

    Args:
        model: in training mode with an optimizer, in evaluation mode without one.
        optimizer: of the model's parameters; it is copied along and updates those of the copy.
        dtype: `torch.bfloat16` or `torch.float16` for weights of that type; None leaves them.

    Returns:
        The copy; with an optimizer, the pair of both copies.

    Raises:
        ImportError: the extension is not installed, is not for this torch, or fails to import. The
            message names the versions and what serves instead.
    """
    reason = why_not()
    if reason is not None:
        raise ImportError(f"{reason}. {INSTEAD}", name=PACKAGE)
    try:
        ipex = import_module(PACKAGE)
    # NameError: beside transformers 5. SystemExit: on a CPU without AVX2.
    except (ImportError, AttributeError, NameError, OSError, SystemExit) as error:
        raise ImportError(
            f"Intel's extension for PyTorch {version(PACKAGE)} is for torch {torch.__version__}, "
            f"but importing it fails ({type(error).__name__}: {error}); it knows transformers 4 at "
            f"most. {INSTEAD}",
            name=PACKAGE,
        ) from error
    return ipex.optimize(model, optimizer=optimizer, dtype=dtype)
