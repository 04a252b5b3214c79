"""Training steps of a model in Hugging Face's format, by fastllm and by transformers."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastllm.benchmarking.shapes import MeasuredPrecision
from fastllm.benchmarking.steps import ParityError, Step, fastllm_step
from fastllm.benchmarking.timing import time_in_turns
from fastllm.device import Device, autocast
from fastllm.models.decoder import DecoderModel
from fastllm.models.pretrained import find_folder

SEQUENCES, LONGEST = 4, 256


class ModelTimes(NamedTuple):
    """Median milliseconds of a training step on `tokens` tokens."""

    tokens: int
    fastllm: float
    transformers: float


def time_model_steps(
    source: str, seconds: float, precision: MeasuredPrecision, device: Device
) -> ModelTimes:
    """Times steps on random tokens, in turns, after both have given the same loss without dropout.

    Args:
        source: a folder, or a name on the hub.
        seconds: time for both together after warming up; at least three rounds are made.
        precision: of both.

    Raises:
        FileNotFoundError, ValueError: there is no such model, or fastllm cannot compute it.
        ImportError: transformers is not installed.
        ParityError: the losses differ.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ImportError("--model compares with transformers: pip install transformers") from error

    folder = find_folder(source)
    model = DecoderModel.from_pretrained(folder).to(device)
    stock: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stock.to(device)
    shape = SEQUENCES, min(LONGEST, model.max_seq_len)

    def random_ids() -> Tensor:
        return torch.randint(model.vocab_size, shape, device=device)

    ids = random_ids()
    with torch.no_grad():
        ours, theirs = model.eval().loss(ids, ids), stock.eval()(ids, labels=ids).loss
    if not math.isclose(ours, theirs, rel_tol=1e-5):
        raise ParityError(f"fastllm's loss is {ours:.7f}, transformers' {theirs:.7f}")
    steps = {
        "fastllm": fastllm_step(model.train(), precision),
        "transformers": transformers_step(stock.train(), precision),
    }
    for step in steps.values():
        step(ids)
    return ModelTimes(ids.numel(), **time_in_turns(steps, seconds, random_ids))


def transformers_step(stock: Any, precision: MeasuredPrecision) -> Step:
    """A training step on token ids [B, S], with PyTorch's fused Adam."""
    params = list(stock.parameters())
    optimizer = torch.optim.Adam(params, fused=True)

    def step(ids: Tensor) -> None:
        with autocast(ids.device.type, precision):
            loss = stock(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step
