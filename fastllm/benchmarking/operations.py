"""Single operations on a GPU against stock PyTorch, forward and backward, launches included.

The stock contestants are written for the purpose: `eager` goes step by step, `tuned` calls
PyTorch's own fused function if there is one, and `compile` is eager under torch.compile. An
operation is timed only after it has proved as accurate as eager.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.benchmarking.shapes import CONFIGS, Letter, MeasuredPrecision
from fastllm.benchmarking.steps import ParityError
from fastllm.benchmarking.timing import time_in_turns
from fastllm.command import log
from fastllm.device import TYPES
from fastllm.ops.attention import attention
from fastllm.ops.decoder import Dropout, Embedding, Linear, Mlp, Norm
from fastllm.ops.dropout import dropout
from fastllm.ops.embedding import embedding
from fastllm.ops.linear_cross_entropy import linear_cross_entropy
from fastllm.ops.mlp import mlp
from fastllm.ops.norm import norm
from fastllm.optim import Adam

SEED = 7  # for the masks of fastllm's dropout


class Operation(NamedTuple):
    """A call of an operation and its rivals, each a function of the same tensors.

    Attributes:
        flops: of its matrix products, forward and backward.
        size: bytes that it must read or write at least.
    """

    name: str
    tensors: Sequence[Tensor]
    ours: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    tuned: Callable[..., Tensor] | None
    flops: float
    size: float


class Case(NamedTuple):
    """The shapes, type and device that an operation is measured with."""

    letter: Letter
    device: str
    dtype: torch.dtype
    p: float

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        """A normally distributed tensor that requires a gradient."""
        values = scale * torch.randn(shape, device=self.device)
        return values.to(self.dtype).requires_grad_()

    def random_ids(self) -> Tensor:
        return CONFIGS[self.letter].random_ids().to(self.device)


def operations(
    device: str, precision: MeasuredPrecision, letter: Letter, p: float = 0.1
) -> Iterator[Operation]:
    """Every operation at the shapes of a configuration, with tensors of the precision's type."""
    case = Case(letter, device, TYPES.get(precision, torch.float32), p)
    yield attention_operation(case)
    yield mlp_operation(case)
    yield norm_operation(case, "norm", CONFIGS[letter].H)
    # A width at which the automatic choice is fastllm's kernel.
    yield norm_operation(case, "wide norm", 4096)
    yield embedding_operation(case)
    yield linear_cross_entropy_operation(case)
    yield dropout_operation(case)


def attention_operation(case: Case) -> Operation:
    H, _, N, S, B, *_ = CONFIGS[case.letter]
    D, p = H // N, case.p
    hidden = torch.ones(S, S, dtype=torch.bool, device=case.device).triu(1)

    def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT / math.sqrt(D)).masked_fill(hidden, -math.inf)
        return F.dropout(scores.softmax(-1), p) @ v

    return Operation(
        "attention",
        [case.random(B, N, S, D) for _ in range(3)],
        lambda q, k, v: attention(q, k, v, None, True, p, SEED),
        explicit,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p),
        flops=9 * B * N * S * S * D,  # two products and seven, of which causality needs half
        size=14 * B * S * H * case.dtype.itemsize,
    )


def mlp_operation(case: Case) -> Operation:
    H, _, _, S, B, *_ = CONFIGS[case.letter]
    R, I, p = B * S, 4 * H, case.p

    def ours(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        layers = Linear(w1, b1), Linear(w2, b2)
        return mlp(x, Mlp(*layers, hidden_dropout=Dropout(p, SEED)))

    return Operation(
        "mlp",
        [
            case.random(R, H),
            case.random(I, H, scale=H**-0.5),
            case.random(I),
            case.random(H, I, scale=I**-0.5),
            case.random(H),
        ],
        ours,
        lambda x, w1, b1, w2, b2: F.linear(F.dropout(F.gelu(F.linear(x, w1, b1)), p), w2, b2),
        None,
        flops=12 * R * H * I,
        size=(4 * R * H + 6 * R * I + 6 * H * I) * case.dtype.itemsize,
    )


def norm_operation(case: Case, name: str, width: int) -> Operation:
    _, _, _, S, B, *_ = CONFIGS[case.letter]
    R = B * S
    return Operation(
        name,
        [case.random(R, width), case.random(width), case.random(width), case.random(R, width)],
        lambda x, w, b, residual: norm(x, Norm(w, b, 1e-5), residual),
        lambda x, w, b, residual: F.layer_norm(x + residual, w.shape, w, b),
        None,
        flops=0,
        size=7 * R * width * case.dtype.itemsize,
    )


def embedding_operation(case: Case) -> Operation:
    H, _, _, S, B, V, _ = CONFIGS[case.letter]
    ids, p = case.random_ids(), case.p

    def ours(weight: Tensor, positions: Tensor) -> Tensor:
        return embedding(ids, Embedding(weight, positions, H**0.5, dropout=Dropout(p, SEED)))

    return Operation(
        "embedding",
        [case.random(V, H), case.random(S, H)],
        ours,
        lambda w, positions: F.dropout(F.embedding(ids, w) * H**0.5 + positions, p),
        None,
        flops=0,
        size=(4 * B * S * H + V * H) * case.dtype.itemsize,
    )


def linear_cross_entropy_operation(case: Case) -> Operation:
    H, _, _, S, B, V, _ = CONFIGS[case.letter]
    R, targets = B * S, case.random_ids().flatten()
    return Operation(
        "linear_cross_entropy",
        [case.random(R, H), case.random(V, H, scale=H**-0.5)],
        lambda x, w: linear_cross_entropy(x, Linear(w, None), targets),
        lambda x, w: F.cross_entropy(F.linear(x, w), targets),
        None,
        flops=6 * R * H * V,
        size=(2 * R * H + 2 * H * V + 4 * R * V) * case.dtype.itemsize,
    )


def dropout_operation(case: Case) -> Operation:
    H, _, _, S, B, *_ = CONFIGS[case.letter]
    return Operation(
        "dropout",
        [case.random(B * S, H)],
        lambda x: dropout(x, case.p, SEED),
        lambda x: F.dropout(x, case.p),
        None,
        flops=0,
        size=4 * B * S * H * case.dtype.itemsize,
    )


def measure_operations(
    device: str,
    precision: MeasuredPrecision,
    seconds: float,
    letters: Sequence[Letter] = ("D", "E"),
) -> Iterator[dict[str, Any]]:
    """Milliseconds of every operation and its rivals, which share `seconds` for each operation.

    Raises:
        ParityError: an operation is less accurate than eager PyTorch; it was not timed.
    """
    for letter in letters:
        for operation in operations(device, precision, letter, p=0.0):
            check_operation(operation, letter)
        for operation in operations(device, precision, letter):
            rivals = {"eager": operation.eager, "tuned": operation.tuned}
            rivals["compile"] = torch.compile(operation.eager, dynamic=False)
            runs = {"fastllm": _forward_and_backward(operation.ours, operation.tensors)}
            for name, function in rivals.items():
                if function is not None:
                    runs[name] = _forward_and_backward(function, operation.tensors)
            milliseconds = _time_operation(operation.name, runs, seconds)
            yield _report(operation.name, letter, operation.flops, operation.size, milliseconds)
        yield _measure_adam(device, letter, seconds)


def check_operation(operation: Operation, letter: Letter) -> None:
    """Compares output and gradients, without dropout, with eager PyTorch's in fp64.

    Raises:
        ParityError: an error, as a fraction of the result's norm, is more than twice that of eager.
    """

    def run(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        inputs = [t.detach().to(dtype).requires_grad_() for t in operation.tensors]
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))]

    dtype = operation.tensors[0].dtype
    ours, eager = run(operation.ours, dtype), run(operation.eager, dtype)
    oracle = run(operation.eager, torch.float64)
    for actual, plain, expected in zip(ours, eager, oracle, strict=True):
        norm = expected.norm() + torch.finfo(torch.float32).tiny
        error, allowed = ((x - expected).norm() / norm for x in (actual, plain))
        if not error <= 2 * allowed + 1e-6:  # NaN fails too
            raise ParityError(
                f"{operation.name} at {letter} is off by {error:.1e}, PyTorch by {allowed:.1e}; "
                "it was not timed"
            )


def _forward_and_backward(
    function: Callable[..., Tensor], tensors: Sequence[Tensor]
) -> Callable[[Any], Any]:
    def run(_: Any) -> None:
        out = function(*tensors)
        torch.autograd.grad(out, tensors, torch.ones_like(out))

    return run


def _time_operation(
    name: str, runs: dict[str, Callable[[Any], Any]], seconds: float
) -> dict[str, float]:
    for rival, run in list(runs.items()):
        try:
            run(None)  # compiles, and tries out tile sizes
        except Exception as error:  # the compiler's layers raise exceptions of any type
            if rival != "compile":
                raise
            log(f"{name}: torch.compile cannot run: {str(error).partition(chr(10))[0]}")
            del runs[rival]
    return time_in_turns(runs, seconds, lambda: None)


def _measure_adam(device: str, letter: Letter, seconds: float) -> dict[str, Any]:
    """A step with clipping over the parameters of a configuration's layers and embeddings."""
    H, L, _, _, _, V, _ = CONFIGS[letter]
    shapes = [(V, H), *[(3 * H, H), (H, H), (4 * H, H), (H, 4 * H), (H,), (H,)] * L]

    def parameters() -> list[Tensor]:
        result = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
        for p in result:
            p.grad = torch.randn_like(p)
        return result

    ours, stock = parameters(), parameters()
    optimizer = Adam(ours, max_grad_norm=1.0)
    stock_optimizer = torch.optim.Adam(stock, fused=True)

    def stock_step(_: Any) -> None:
        torch.nn.utils.clip_grad_norm_(stock, 1.0)
        stock_optimizer.step()

    size = 32.0 * sum(math.prod(shape) for shape in shapes)
    runs: dict[str, Callable[[Any], Any]] = {
        "fastllm": lambda _: optimizer.step(),
        "tuned": stock_step,
    }
    return _report("adam", letter, 0, size, _time_operation("adam", runs, seconds))


def _report(
    name: str, letter: Letter, flops: float, size: float, milliseconds: dict[str, float]
) -> dict[str, Any]:
    ours = milliseconds["fastllm"]
    return {
        "operation": name,
        "config": letter,
        "ms": ours,
        "gflops": flops / ours / 1e6,
        "gbs": size / ours / 1e6,
        "ratio": {
            rival: milliseconds[rival] / ours if rival in milliseconds else None
            for rival in ("eager", "tuned", "compile")
        },
    }
