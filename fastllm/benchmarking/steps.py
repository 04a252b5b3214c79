"""Whole training steps by fastllm and by stock PyTorch: built, compared, timed."""

import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from fastllm.benchmarking.machine import process_memory_mb
from fastllm.benchmarking.shapes import CONFIGS, Letter, MeasuredPrecision, Rival, StepShape
from fastllm.benchmarking.stock import StockDecoder
from fastllm.benchmarking.timing import time_call, time_in_turns
from fastllm.command import log
from fastllm.device import Device, autocast
from fastllm.models.decoder import DecoderModel
from fastllm.ops import dispatch
from fastllm.optim import Adam

Step = Callable[[Tensor], None]


def build_fastllm(shape: StepShape) -> DecoderModel:
    """fastllm's model, untrained."""
    H, L, N, S, _, V, p = shape
    return DecoderModel(V, H, L, N, S, embedding_dropout_p=p, attn_dropout_p=p, mlp_dropout_p=p)


def build_stock(shape: StepShape, rival: Rival, model: DecoderModel) -> StockDecoder:
    """The module that `rival` trains, with the weights of `model`."""
    stock = StockDecoder(
        shape, "explicit" if rival == "eager" else "sdpa", chunked=rival == "chunked"
    )
    with torch.no_grad():
        for theirs, ours in zip(stock.parameters(), model.parameters(), strict=True):
            theirs.copy_(ours)  # both models hold them in the same order
    return stock


def fastllm_step(model: DecoderModel, precision: MeasuredPrecision = "fp32") -> Step:
    """A training step on token ids [B, S] with fastllm."""
    optimizer = Adam(model.parameters(), max_grad_norm=1.0)

    def step(ids: Tensor) -> None:
        with autocast(ids.device.type, precision):
            loss = model.loss(ids, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def stock_step(stock: StockDecoder, rival: Rival, precision: MeasuredPrecision = "fp32") -> Step:
    """The same step with PyTorch alone; the step of `compile` compiles when first called."""
    # By default torch.compile takes the second configuration in a process as a sign that sizes
    # vary, and generates slower code.
    compute_loss = torch.compile(stock, dynamic=False) if rival == "compile" else stock
    params = list(stock.parameters())
    optimizer = torch.optim.Adam(params, fused=None if rival == "eager" else True)
    if rival == "autocast":
        precision = "bf16"

    def step(ids: Tensor) -> None:
        with autocast(ids.device.type, precision):
            loss = compute_loss(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


class ParityError(Exception):
    """fastllm and stock PyTorch compute different things, so their times cannot be compared."""


def check_parity(
    model: DecoderModel, stock: StockDecoder, ids: Tensor, precision: MeasuredPrecision = "fp32"
) -> None:
    """Compares losses and gradients on token ids [B, S], without dropout.

    Raises:
        ParityError: in fp32 the losses differ by more than 1e-5 of their size, or the gradients of
            a parameter by more than 1e-5 of their norm; in bf16 a gradient of fastllm is more than
            twice as far from the stock one in fp32 as the stock one under autocast.
    """

    def run(
        network: DecoderModel | StockDecoder, precision: MeasuredPrecision = "fp32"
    ) -> list[Any]:
        network.eval()
        with autocast(ids.device.type, precision):
            loss = network.loss(ids, ids) if isinstance(network, DecoderModel) else network(ids)
        loss.backward()
        results = [loss.detach(), *(p.grad for p in network.parameters())]
        network.zero_grad()
        network.train()
        return results

    names = [name for name, _ in model.named_parameters()]
    ours, theirs = run(model), run(stock)
    if not math.isclose(ours[0], theirs[0], rel_tol=1e-5):
        raise ParityError(f"fastllm's loss is {ours[0]:.7f}, stock PyTorch's {theirs[0]:.7f}")
    bounds = [1e-5] * len(names)
    if precision == "bf16":
        bounds = [2 * error + 1e-5 for error in _gradient_errors(run(stock, "bf16"), theirs)]
        ours = run(model, "bf16")
    for name, error, bound in zip(names, _gradient_errors(ours, theirs), bounds, strict=True):
        if not error <= bound:  # NaN fails too
            raise ParityError(f"the gradients of {name} differ by {error:.1e} of their norm")


def _gradient_errors(actual: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Each gradient's error as a fraction of its norm; the first elements are the losses."""
    pairs = zip(actual[1:], expected[1:], strict=True)
    return [float((a - b).norm() / b.norm()) for a, b in pairs]


def time_steps(
    letter: Letter,
    rivals: list[Rival],
    seconds: float,
    precision: MeasuredPrecision = "fp32",
    device: Device = "cpu",
) -> dict[str, float]:
    """Median milliseconds of a training step, by `fastllm` and by each rival.

    If the machine cannot compile, `compile` is left out and the reason logged.

    Args:
        seconds: time for all of them together after warming up; at least three rounds are made.
        device: on a GPU the rivals use the same precision as fastllm.

    Raises:
        ParityError: fastllm and a rival disagree; nothing was timed.
    """
    shape = CONFIGS[letter]
    torch.manual_seed(0)
    model, ids = build_fastllm(shape).to(device), shape.random_ids().to(device)
    steps = {"fastllm": fastllm_step(model, precision)}
    for rival in rivals:
        stock = build_stock(shape, rival, model).to(device)
        try:
            check_parity(model, stock, ids, precision)
        except ParityError as error:
            raise ParityError(f"config {letter}, {rival}: {error}; nothing was timed") from None
        steps[rival] = stock_step(stock, rival, precision if device == "cuda" else "fp32")
    for name, step in list(steps.items()):
        if name != "compile":
            step(ids)
        elif not _can_compile(letter, step, ids):
            del steps[name]
    return time_in_turns(steps, seconds, lambda: shape.random_ids().to(device))


def _can_compile(letter: Letter, step: Step, ids: Tensor) -> bool:
    log(f"config {letter}: torch.compile is warming up, which takes about half a minute ...")
    try:
        seconds = time_call(step, ids)
    except Exception as error:  # the compiler's layers raise exceptions of any type
        reason = str(error).partition("\n")[0]
        log(f"config {letter}: torch.compile cannot run: {type(error).__name__}: {reason}")
        return False
    log(f"config {letter}: torch.compile took {seconds:.0f} s to warm up")
    return True


def measure_memory(
    letter: Letter, rivals: list[Rival], precision: MeasuredPrecision, implementation: str = "auto"
) -> dict[str, float]:
    """Peak memory of training steps beyond weights, gradients and optimizer moments, in MiB.

    Each contestant makes three steps in a process of its own.

    Args:
        implementation: of fastllm's operations; `auto` leaves the choice to `FASTLLM_IMPL`.
    """
    peaks = {}
    for name in ("fastllm", *rivals):
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            arguments = letter, name, precision, implementation, torch.get_num_threads()
            peaks[name] = process.submit(_peak_memory, *arguments).result()
    return peaks


def _peak_memory(
    letter: Letter, name: Any, precision: MeasuredPrecision, implementation: str, threads: int
) -> float:
    torch.set_num_threads(threads)
    shape = CONFIGS[letter]
    before = process_memory_mb("VmRSS")
    model = build_fastllm(shape)
    state = 4 * 4 * sum(p.numel() for p in model.parameters()) / 2**20
    if name == "fastllm":
        step = fastllm_step(model, precision)
    else:
        step = stock_step(build_stock(shape, name, model), name)
        del model
    with dispatch.use_implementation(implementation):
        for _ in range(3):
            step(shape.random_ids())
    return process_memory_mb("VmHWM") - before - state
