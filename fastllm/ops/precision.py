"""The precision that matrix products round their operands to; they always accumulate in fp32."""

import torch
from torch import Tensor

from fastllm.ops import extension

# In the order of `Precision` in csrc/kernels.h.
PRECISIONS = ("fp32", "bf16", "int8", "int4")


def product_precision() -> int:
    """bf16 under autocast, else fp32, as an index into `PRECISIONS`."""
    return PRECISIONS.index("bf16" if torch.is_autocast_enabled("cpu") else "fp32")


def why_not_autocast(dtype: torch.dtype) -> str | None:
    """Why the C++ kernels cannot compute products under autocast to `dtype`, or None."""
    if extension.kernels is None:
        return extension.problem
    if dtype is not torch.bfloat16:
        return f"autocast to {dtype} is on; on a CPU the kernels support torch.bfloat16 only"
    if not extension.kernels.native_bf16():
        return f"this CPU has no bf16 dot product ({extension.kernels.isa()} is in use)"
    return None


def autocast_input(x: Tensor, weight: Tensor) -> Tensor:
    """The bf16 output of another module under autocast as fp32, since the kernels round it again.

    Any other x is returned unchanged, such as the input of a module with bf16 weights.
    """
    rounded = x.dtype is torch.bfloat16 and weight.dtype is torch.float32 and x.is_cpu
    return x.float() if rounded and torch.is_autocast_enabled("cpu") else x
