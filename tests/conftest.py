"""What the tests share: the parity rule, instruction sets, texts, and a small run to start from."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastllm import use
from fastllm.ops import dispatch
from fastllm.train import prepare
from fastllm.training.config import TrainConfig, parse_train_config
from fastllm.training.loop import Trainer

REPOSITORY = Path(__file__).parent.parent
TEXTS = REPOSITORY.parent / "shared" / "data"

needs_extension = pytest.mark.skipif(
    dispatch.kernels is None, reason=f"no C++ kernels: {dispatch.extension_problem}"
)


def assert_as_accurate(actual: Tensor, plain: Tensor, oracle: Tensor, name: str = "") -> None:
    """The error of `actual` is at most twice that of plain PyTorch plus 1e-6 of the scale.

    `oracle` is the reference in float64. Where it is not a number or infinite, so must `actual` be.
    """
    assert actual.shape == oracle.shape
    finite = oracle.isfinite()
    # Infinities with their signs, and numbers that are none: nan_to_num tells them apart.
    special = actual.double()[~finite].nan_to_num(nan=0.0), oracle[~finite].nan_to_num(nan=0.0)
    assert torch.equal(*special), f"{name} differs where the oracle is not finite"
    error = (actual.double() - oracle)[finite].abs().max().item() if finite.any() else 0.0
    plain_error = (plain.double() - oracle)[finite].abs().max().item() if finite.any() else 0.0
    scale = oracle[finite].abs().max().item() if finite.any() else 0.0
    bound = 2 * plain_error + 1e-6 * scale
    assert error <= bound, f"{name} error {error:.3g} exceeds {bound:.3g} at scale {scale:.3g}"


def assert_parity(function: Callable[..., Tensor], *tensors: Tensor) -> None:
    """The C++ kernel's output and every gradient are as accurate as plain PyTorch's."""

    def run(implementation: str, dtype: torch.dtype) -> list[Tensor]:
        inputs = [t.detach().to(dtype).requires_grad_() for t in tensors]
        with use(implementation):
            out = function(*inputs)
            generator = torch.Generator().manual_seed(0)
            grad = torch.randn(out.shape, generator=generator).to(dtype)
            return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    results = (run("cpu", torch.float32), run("ref", torch.float32), run("ref", torch.float64))
    for i, (actual, plain, oracle) in enumerate(zip(*results, strict=True)):
        assert_as_accurate(actual, plain, oracle, f"gradient {i}" if i else "output")


@pytest.fixture(params=dispatch.kernels.isas() if dispatch.kernels else ["none"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with the kernels of every instruction set that this CPU has."""
    if dispatch.kernels is None:
        pytest.skip(f"no C++ kernels: {dispatch.extension_problem}")
    before = dispatch.kernels.isa()
    dispatch.kernels.set_isa(request.param)
    yield request.param
    dispatch.kernels.set_isa(before)


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
        return prepare(config, tmp_path / name, tell=lambda *parts: None)

    return make


def make_config(run_dir: Path, text: Path, *flags: str) -> TrainConfig:
    small = (
        "--max_seq_len 16 --batch_size 4 --hidden_size 16 --num_layers 1 --quiet --log_interval 1"
    )
    resume = ["--out_dir", str(run_dir)]
    if "--resume" in flags:
        return parse_train_config([*resume, "--quiet", *flags])
    return parse_train_config([*small.split(), "--file_path", str(text), *resume, *flags])
