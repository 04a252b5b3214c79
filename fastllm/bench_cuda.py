"""What `python -m fastllm.bench --device cuda` measures besides steps: the GPU, every operation.

An operation is timed forward and backward, launches included, against stock PyTorch written for
the purpose: `eager` step by step, `tuned` with PyTorch's own fused function where it has one, and
`compile`, eager under torch.compile. Before it is timed, it must be as accurate as eager.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastllm
from fastllm.bench import CONFIGS, Letter, ParityError, Precision, StepConfig, time_in_turns
from fastllm.command import TYPES, say
from fastllm.ops.attention import attention
from fastllm.ops.dropout import dropout
from fastllm.ops.embedding import Settings, embedding
from fastllm.ops.layer_norm import layer_norm
from fastllm.ops.linear_cross_entropy import linear_cross_entropy
from fastllm.ops.mlp import mlp
from fastllm.ops.parameters import Linear, Norm
from fastllm.optim import Adam


class Operation(NamedTuple):
    """A call of an operation and its rivals, each a function of the same tensors.

    Attributes:
        flops: of its matrix products, forward and backward.
        size: bytes that it must read or write at least.
    """

    name: str
    config: Letter
    tensors: Sequence[Tensor]
    ours: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    tuned: Callable[..., Tensor] | None
    flops: float
    size: float


def describe_gpu(precision: Precision) -> dict[str, Any]:
    """The GPU, and what it reaches at best: a large product of cuBLAS, and a copy."""
    dtype = TYPES.get(precision, torch.float32)
    n, size = 8192, 2**30
    a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
    source, target = (torch.zeros(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    runs = {"product": lambda _: a @ b, "copy": lambda _: target.copy_(source)}
    milliseconds = time_in_turns(runs, 1, lambda: None)
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "peak_gflops": 2 * n**3 / milliseconds["product"] / 1e6,
        "bandwidth_gbs": 2 * size / milliseconds["copy"] / 1e6,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "torch": torch.__version__,
        "fastllm": fastllm.__version__,
    }


def operations(
    device: str, precision: Precision, letter: Letter, p: float = 0.1
) -> Iterator[Operation]:
    """Every operation at the shapes of a configuration, with tensors of the precision's type."""
    config: StepConfig = CONFIGS[letter]
    H, _, N, S, B, V, _ = config
    D, I, R, seed = H // N, 4 * H, B * S, 7
    dtype = TYPES.get(precision, torch.float32)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, device=device)).to(dtype).requires_grad_()

    x = random(R, H)
    ids = torch.randint(V, (B, S), device=device)
    e = x.element_size()

    hidden = torch.ones(S, S, dtype=torch.bool, device=device).triu(1)

    def explicit_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT / math.sqrt(D)).masked_fill(hidden, -math.inf)
        return F.dropout(scores.softmax(-1), p) @ v

    yield Operation(
        "attention",
        letter,
        [random(B, N, S, D) for _ in range(3)],
        lambda q, k, v: attention(q, k, v, None, True, p, seed),
        explicit_attention,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p),
        9 * B * N * S * S * D,  # two products and seven, of which causality needs half
        14 * R * H * e,
    )
    yield Operation(
        "mlp",
        letter,
        [x, random(I, H, scale=H**-0.5), random(I), random(H, I, scale=I**-0.5), random(H)],
        lambda x, w1, b1, w2, b2: mlp(x, Linear(w1, b1), Linear(w2, b2), "gelu", p, seed),
        lambda x, w1, b1, w2, b2: F.linear(F.dropout(F.gelu(F.linear(x, w1, b1)), p), w2, b2),
        None,
        12 * R * H * I,
        (4 * R * H + 6 * R * I + 6 * H * I) * e,
    )
    # Also as wide as layer norms must be for the automatic choice to be ours.
    for name, width in (("layer_norm", H), ("wide layer_norm", 4096)):
        yield Operation(
            name,
            letter,
            [random(R, width), random(width), random(width), random(R, width)],
            lambda x, w, b, residual: layer_norm(x, Norm(w, b, 1e-5), residual),
            lambda x, w, b, residual: F.layer_norm(x + residual, w.shape, w, b),
            None,
            0,
            7 * R * width * e,
        )
    yield Operation(
        "embedding",
        letter,
        [random(V, H), random(S, H)],
        lambda w, positions: embedding(ids, w, positions, Settings(H**0.5, None, p, seed)),
        lambda w, positions: F.dropout(F.embedding(ids, w) * H**0.5 + positions, p),
        None,
        0,
        (4 * R * H + V * H) * e,
    )
    yield Operation(
        "linear_cross_entropy",
        letter,
        [x, random(V, H, scale=H**-0.5)],
        lambda x, w: linear_cross_entropy(x, Linear(w, None), ids.flatten()),
        lambda x, w: F.cross_entropy(F.linear(x, w), ids.flatten()),
        None,
        6 * R * H * V,
        (2 * R * H + 2 * H * V + 4 * R * V) * e,
    )
    yield Operation(
        "dropout",
        letter,
        [x],
        lambda x: dropout(x, p, seed),
        lambda x: F.dropout(x, p),
        None,
        0,
        4 * R * H * e,
    )


def measure_operations(
    device: str, precision: Precision, seconds: float, letters: Sequence[Letter] = ("D", "E")
) -> Iterator[dict[str, Any]]:
    """Milliseconds of every operation and of its rivals, which run for `seconds` together.

    Raises:
        ParityError: an operation is less accurate than eager PyTorch; it was not timed.
    """
    for letter in letters:
        for operation in operations(device, precision, letter, p=0.0):
            check_operation(operation)
        for operation in operations(device, precision, letter):
            rivals = {"eager": operation.eager, "tuned": operation.tuned}
            rivals["compile"] = torch.compile(operation.eager, dynamic=False)
            runs = {"fastllm": _forward_and_backward(operation.ours, operation.tensors)}
            for name, function in rivals.items():
                if function is not None:
                    runs[name] = _forward_and_backward(function, operation.tensors)
            yield _result(operation, _timed(operation.name, runs, seconds))
        yield _measure_adam(device, letter, seconds)


def check_operation(operation: Operation) -> None:
    """Compares output and gradients, without dropout, with eager PyTorch's in fp64.

    Raises:
        ParityError: an error, as a part of the result's norm, is more than twice that of eager.
    """

    def run(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        inputs = [t.detach().to(dtype).requires_grad_() for t in operation.tensors]
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))]

    dtype = operation.tensors[0].dtype
    kinds = ((operation.ours, dtype), (operation.eager, dtype), (operation.eager, torch.float64))
    for ours, plain, oracle in zip(*(run(*kind) for kind in kinds), strict=True):
        norm = oracle.norm() + torch.finfo(torch.float32).tiny
        error, allowed = ((x - oracle).norm() / norm for x in (ours, plain))
        if not error <= 2 * allowed + 1e-6:  # nor when it is not a number
            raise ParityError(
                f"{operation.name} at {operation.config} is off by {error:.1e}, PyTorch by "
                f"{allowed:.1e}; it was not timed"
            )


def _forward_and_backward(
    function: Callable[..., Tensor], tensors: Sequence[Tensor]
) -> Callable[[Any], Any]:
    def run(_: Any) -> None:
        out = function(*tensors)
        torch.autograd.grad(out, tensors, torch.ones_like(out))

    return run


def _timed(name: str, runs: dict[str, Callable[[Any], Any]], seconds: float) -> dict[str, float]:
    for rival, run in list(runs.items()):
        try:
            run(None)  # compiles, and measures tiles
        except Exception as error:  # the compiler's many layers raise what they like
            if rival != "compile":
                raise
            say(f"{name}: torch.compile cannot run: {str(error).partition(chr(10))[0]}")
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
    rival = torch.optim.Adam(stock, fused=True)

    def stock_step(_: Any) -> None:
        torch.nn.utils.clip_grad_norm_(stock, 1.0)
        rival.step()

    size = 32.0 * sum(math.prod(shape) for shape in shapes)
    nothing: Any = None
    operation = Operation("adam", letter, [], nothing, nothing, nothing, 0, size)
    runs: dict[str, Callable[[Any], Any]] = {"fastllm": lambda _: optimizer.step()}
    return _result(operation, _timed("adam", {**runs, "tuned": stock_step}, seconds))


def _result(operation: Operation, milliseconds: dict[str, float]) -> dict[str, Any]:
    ours = milliseconds["fastllm"]
    return {
        "operation": operation.name,
        "config": operation.config,
        "ms": ours,
        "gflops": operation.flops / ours / 1e6,
        "gbs": operation.size / ours / 1e6,
        "ratio": {
            rival: milliseconds[rival] / ours if rival in milliseconds else None
            for rival in ("eager", "tuned", "compile")
        },
    }


COLUMNS = ("ms", "% of peak", "% of bytes", "eager", "tuned", "compile")
OPERATIONS_HEAD = f"{'operation':>24}" + "".join(f"{column:>12}" for column in COLUMNS)


def operation_row(result: dict[str, Any], machine: dict[str, Any]) -> str:
    """The line of an operation: its time, parts of the GPU's limits, times of rivals over it."""
    cells = [
        result["ms"],
        100 * result["gflops"] / machine["peak_gflops"],
        100 * result["gbs"] / machine["bandwidth_gbs"],
        *result["ratio"].values(),
    ]
    name = f"{result['operation']} {result['config']}"
    return f"{name:>24}" + "".join(
        f"{'-' if cell is None else f'{cell:,.3f}':>12}" for cell in cells
    )
