"""What `--device` and `--precision` resolve to on this machine, and autocast to a precision."""

from typing import Literal

import torch

from fastllm.command import log
from fastllm.ops import dispatch

# The width from which on training was measured to be faster in bf16 on a CPU that has it.
NARROWEST_BF16 = 32

Device = Literal["cpu", "cuda"]
Precision = Literal["fp32", "bf16", "fp16", "auto"]
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(asked: Device) -> Device:
    """What `--device` comes to on this machine; warns where there is no CUDA."""
    if asked == "cuda" and not torch.cuda.is_available():
        log("warning: CUDA requested but not available, falling back to the CPU")
        return "cpu"
    return asked


def choose_precision(asked: Precision, hidden_size: int, device: Device) -> Precision:
    """What `--precision` comes to on this machine; warns where it cannot be had."""
    if asked == "auto":
        slow = dispatch.why_not_autocast(torch.bfloat16) or hidden_size < NARROWEST_BF16
        return "fp32" if slow or device == "cuda" else "bf16"  # on GPUs, nothing was measured
    if asked == "fp32" or device == "cuda":
        return asked
    reason = dispatch.why_not_autocast(torch.bfloat16)
    if asked == "fp16":
        reason = "that is for GPUs"
    if reason:
        log(f"warning: {asked} was asked for, but {reason}; computing in fp32")
        return "fp32"
    return asked


def check_quantize(quantize: str | None, precision: Precision) -> None:
    """Raises a `ValueError` where weights are to be rounded in two ways."""
    if quantize and precision in TYPES:
        raise ValueError(f"quantize and precision {precision} exclude each other: leave one out")


def autocast(device: str, precision: str) -> torch.autocast:
    """What is computed inside has products of this precision."""
    return torch.autocast(device, TYPES.get(precision), enabled=precision in TYPES)
