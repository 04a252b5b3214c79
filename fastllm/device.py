"""What `--device` and `--precision` resolve to on this machine, and autocast to a precision."""

import torch

from fastllm.command import log
from fastllm.flags import Device, Precision
from fastllm.ops.precision import why_not_autocast

# On CPUs with bf16 dot products, training was measured to be faster in bf16 from this width on.
MIN_BF16_WIDTH = 32

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(asked: Device) -> Device:
    """The device that `--device` resolves to on this machine; warns if CUDA is not available."""
    if asked == "cuda" and not torch.cuda.is_available():
        log("warning: CUDA requested but not available, falling back to the CPU")
        return "cpu"
    return asked


def choose_precision(asked: Precision, hidden_size: int, device: Device) -> Precision:
    """The precision that `--precision` resolves to, never auto; warns if it is not supported."""
    if asked == "auto":
        slow = why_not_autocast(torch.bfloat16) or hidden_size < MIN_BF16_WIDTH
        return "fp32" if slow or device == "cuda" else "bf16"  # bf16 was not measured on GPUs
    if asked == "fp32" or device == "cuda":
        return asked
    reason = why_not_autocast(torch.bfloat16)
    if asked == "fp16":
        reason = "fp16 is for GPUs"
    if reason:
        log(f"warning: {asked} was asked for, but {reason}; computing in fp32")
        return "fp32"
    return asked


def autocast(device: str, precision: str) -> torch.autocast:
    """A context in which matrix products round their operands to this precision."""
    return torch.autocast(device, TYPES.get(precision), enabled=precision in TYPES)
