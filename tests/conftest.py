"""Shared by the tests: the parity rule, instruction sets, texts, and a small run."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastllm import use
from fastllm.command import no_log
from fastllm.core.mlp import MLP
from fastllm.models.decoder import DecoderModel
from fastllm.ops import extension
from fastllm.ops.precision import why_not_autocast
from fastllm.training.config import TrainConfig, parse_train_config
from fastllm.training.loop import Trainer
from fastllm.training.run import prepare, resolve

REPOSITORY = Path(__file__).parent.parent
TEXTS = REPOSITORY.parent / "shared" / "data"

needs_extension = pytest.mark.skipif(
    extension.kernels is None, reason=f"no C++ kernels: {extension.problem}"
)


def assert_as_accurate(actual: Tensor, plain: Tensor, oracle: Tensor, name: str = "") -> None:
    """The error of `actual` is at most twice that of plain PyTorch plus 1e-6 of the scale.

    `oracle` is the reference in float64. Its NaNs and infinities must be in `actual` too.
    """
    assert actual.shape == oracle.shape
    finite = oracle.isfinite()
    # nan_to_num tells NaN and the two infinities apart.
    special = actual.double()[~finite].nan_to_num(nan=0.0), oracle[~finite].nan_to_num(nan=0.0)
    assert torch.equal(*special), f"{name} differs where the oracle is not finite"
    error = (actual.double() - oracle)[finite].abs().max().item() if finite.any() else 0.0
    plain_error = (plain.double() - oracle)[finite].abs().max().item() if finite.any() else 0.0
    scale = oracle[finite].abs().max().item() if finite.any() else 0.0
    bound = 2 * plain_error + 1e-6 * scale
    assert error <= bound, f"{name} error {error:.3g} exceeds {bound:.3g} at scale {scale:.3g}"


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that the operations allocate is NaN until it is written."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*arguments: Any, **keywords: Any) -> Tensor:
            memory = make(*arguments, **keywords)
            return memory.fill_(math.nan) if memory.is_floating_point() else memory

        return made

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "frombuffer"),
            (Tensor, "new_empty"),
        ):
            patch.setattr(owner, name, poisoned(getattr(owner, name)))
        yield


def use_rms_norms(model: DecoderModel) -> None:
    """Replaces every norm of a model by an RMS norm."""

    def rms_norm() -> nn.RMSNorm:
        return nn.RMSNorm(model.hidden_size, eps=1e-5)

    for block in model.transformer_blocks:
        block.norm1, block.norm2 = rms_norm(), rms_norm()
    if model.final_norm is not None:
        model.final_norm = rms_norm()


def use_swiglu(model: DecoderModel) -> None:
    """Replaces every MLP of a model by a gated one."""
    for block in model.transformer_blocks:
        I, p = block.mlp.intermediate_size, block.mlp.dropout.p
        settings = {"norm_first": block.norm_first, "include_norm_residual": False}
        block.mlp = MLP(model.hidden_size, I, "silu", p, gated=True, **settings)


def factors(runs: int = 1) -> list[float]:
    """Factors for the inputs of a parity test, one for each run.

    The few digits of bf16 may be right by luck, above all in a single number such as a loss. So
    errors in bf16 are the largest of several runs, which round differently.
    """
    runs = max(runs, 8 if torch.is_autocast_enabled("cpu") else 1)
    return [1 + 0.16 * i / runs for i in range(runs)]


def stacked(runs: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The results of several runs, stacked one by one."""
    return [torch.stack(results) for results in zip(*runs, strict=True)]


def assert_parity(
    function: Callable[..., Tensor],
    *tensors: Tensor,
    kinds_of_gradients: bool = True,
    runs: int = 1,
) -> None:
    """The C++ kernel's output and every gradient are as accurate as plain PyTorch's.

    An element that the kernel does not write fails as well. With infinite inputs a gradient is a
    sum of infinities: infinite or NaN, depending on the order. Without `kinds_of_gradients` either
    may replace the other, but not a finite number. Errors are the largest of `runs` runs.
    """

    def run(implementation: str, dtype: torch.dtype, factor: float) -> list[Tensor]:
        inputs = [(t.detach().to(dtype) * factor).requires_grad_() for t in tensors]
        with use(implementation), poisoned_memory() if implementation == "cpu" else nullcontext():
            out = function(*inputs)
            generator = torch.Generator().manual_seed(0)
            grad = torch.randn(out.shape, generator=generator).to(dtype)
            return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    kinds = (("cpu", torch.float32), ("ref", torch.float32), ("ref", torch.float64))
    # An infinity changes its sign if rounding moves its factor across 0.
    all_factors = factors(runs) if kinds_of_gradients else [1.0]
    results = (stacked([run(*kind, factor) for factor in all_factors]) for kind in kinds)
    for i, (actual, plain, oracle) in enumerate(zip(*results, strict=True)):
        if i and not kinds_of_gradients:
            actual, plain, oracle = (
                result.where(result.isfinite(), math.nan) for result in (actual, plain, oracle)
            )
        assert_as_accurate(actual, plain, oracle, f"gradient {i}" if i else "output")


def decided_by_more_runs(check: Callable[..., None], *arguments: Any) -> None:
    """check(*arguments, runs=...) for a problem drawn at random.

    Of thousands of comparisons, a few find an error of plain PyTorch that is small by luck; many
    runs decide whether it was luck.
    """
    try:
        check(*arguments, runs=8)
    except AssertionError:
        check(*arguments, runs=64)


def with_others_fixed(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], wanted: int
) -> Callable[[Tensor], Tensor]:
    """A function of one of its tensors; the others get no gradient."""

    def run(alone: Tensor) -> Tensor:
        return function(
            *(alone if i == wanted else t.to(alone.dtype) for i, t in enumerate(tensors))
        )

    return run


def assert_same_bits(run: Callable[[], Sequence[Tensor]]) -> None:
    """`run` gives the same bits for any number of threads and on every repeat."""
    expected = None
    for count in (1, 2, 3, 4, 8):
        torch.set_num_threads(count)
        for _ in range(20):  # a hundred in all
            results = [result.detach().clone() for result in run()]
            expected = expected or results
            for i, (result, first) in enumerate(zip(results, expected, strict=True)):
                assert not result.isnan().any()
                assert torch.equal(result, first), f"result {i} differs with {count} threads"


def bits(function: Callable[..., Tensor], *tensors: Tensor) -> Callable[[], Sequence[Tensor]]:
    """For `assert_same_bits`: the output of the C++ kernel, and every gradient."""
    inputs = [tensor.detach().requires_grad_() for tensor in tensors]

    def run() -> Sequence[Tensor]:
        with use("cpu"):
            out = function(*inputs)
            # Differs between elements and depends only on the bits of the output.
            return [out, *torch.autograd.grad(out, inputs, out.detach().cos())]

    return run


# Values that no computation may turn into a finite number.
BAD = (math.nan, math.inf, -math.inf)

# Memory layouts of a tensor.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.mT.contiguous().mT if t.ndim > 1 else t,
    "stepped": lambda t: torch.stack((t, torch.zeros_like(t)), -1).flatten(-2)[..., ::2],
    "sliced": lambda t: torch.cat((t, t), -1)[..., t.size(-1) :],
    # In the middle of a storage, at an address aligned to 4 bytes only.
    "offset": lambda t: torch.cat((torch.zeros(5), t.flatten()))[5:].view(t.shape),
}


# Shapes of masks that broadcast to [B, N, S, T].
MASKS = "T ST 1T S1 NST 1ST N11 BNST B11T B1ST 1NST 11ST BN1T BNS1 1111".split()


def named_sizes(letters: str, **sizes: int) -> list[int]:
    """The shape spelt by `letters`: each is the size of that name, or 1."""
    return [1 if letter == "1" else sizes[letter] for letter in letters]


def shape_name(letters: str) -> Callable[[tuple[int, ...]], str]:
    """A function from sizes to a test's id: `B1-N2-S63-D64`."""
    return lambda sizes: "-".join(f"{l}{size}" for l, size in zip(letters, sizes, strict=True))


@pytest.fixture(params=extension.kernels.isas() if extension.kernels else ["none"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once for every instruction set of this CPU."""
    with isa_in_use(request.param):
        yield request.param


@contextmanager
def isa_in_use(isa: str) -> Iterator[None]:
    """Runs the kernels of this instruction set; skips the test without the extension."""
    if extension.kernels is None:
        pytest.skip(f"no C++ kernels: {extension.problem}")
    before = extension.kernels.isa()
    extension.kernels.set_isa(isa)
    try:
        yield
    finally:
        extension.kernels.set_isa(before)


@pytest.fixture(params=[*(extension.kernels.isas() if extension.kernels else ["none"]), "bf16"])
def arithmetic(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with the kernels of every instruction set in fp32, and once in bf16.

    In bf16, autocast applies to the reference too; float64 stays float64.
    """
    if request.param != "bf16":
        with isa_in_use(request.param):
            yield request.param
    elif reason := why_not_autocast(torch.bfloat16):
        pytest.skip(reason)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            yield "bf16"


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the thread count that the test changes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


WORDS = "the quick brown fox jumps over the lazy dog and runs away from all of it\n"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """About 3,000 characters whose lines all differ."""
    path = tmp_path / "text.txt"
    words = WORDS.split()
    lines = [" ".join(words[i % len(words) :] + words[: i % 7]) for i in range(45)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def make_trainer(tmp_path: Path, text: Path) -> MakeTrainer:
    """Builds the trainer of a run in `tmp_path / name` from flags; `--resume` continues it."""

    def make(name: str, *flags: str) -> Trainer:
        config = make_config(tmp_path / name, text, *flags)
        return prepare(resolve(config, tmp_path / name), no_log)

    return make


def make_config(run_dir: Path, text: Path, *flags: str) -> TrainConfig:
    small = (
        "--max_seq_len 16 --batch_size 4 --hidden_size 16 --num_layers 1 --quiet --log_interval 1"
    )
    resume = ["--out_dir", str(run_dir)]
    if "--resume" in flags:
        return parse_train_config([*resume, "--quiet", *flags])
    return parse_train_config([*small.split(), "--file_path", str(text), *resume, *flags])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with kill tests take minutes: they come first, so that no process ends up with one
    while the others are idle."""
    slow = {item.path for item in items if item.get_closest_marker("kill")}
    items.sort(key=lambda item: item.path not in slow)
