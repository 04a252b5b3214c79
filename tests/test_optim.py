import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastllm
from fastllm.ops import extension
from fastllm.optim import Adam, AdamW, Fp32Muon
from fastllm.training import engine
from fastllm.training.config import parse_train_config
from tests.conftest import assert_as_accurate, assert_same_bits, needs_extension

SHAPES = [(3, 5), (1,), (64, 64), (8191,), (8192,), (8193,), (20001,), (0,)]
PAIRS = [(Adam, torch.optim.Adam), (AdamW, torch.optim.AdamW)]


def make_params(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in SHAPES]


def set_grads(params: list[Tensor], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype)


def run(
    make: Callable[[list[Tensor]], torch.optim.Optimizer],
    dtype: torch.dtype = torch.float32,
    clip: float | None = None,
    steps: int = 5,
) -> list[Tensor]:
    """Parameters after some steps; `clip` is done by PyTorch, before each."""
    params = make_params(dtype)
    optimizer = make(params)
    for step in range(steps):
        set_grads(params, step)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("clip", [None, 1.0, 1e6])
@pytest.mark.parametrize(("ours", "torchs"), PAIRS, ids=["Adam", "AdamW"])
@pytest.mark.parametrize("impl", ["ref", "cpu"])
def test_as_accurate_as_torch(
    isa: str, impl: str, ours: type, torchs: type, clip: float | None, weight_decay: float
) -> None:
    settings: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "weight_decay": weight_decay}
    with fastllm.use(impl):
        actual = run(lambda p: ours(p, max_grad_norm=clip, **settings))
    plain = run(lambda p: torchs(p, **settings), clip=clip)
    oracle = run(lambda p: torchs(p, **settings), torch.float64, clip)
    for shape, a, p, o in zip(SHAPES, actual, plain, oracle, strict=True):
        assert_as_accurate(a, p, o, str(shape))


def test_same_bits(isa: str, threads: None) -> None:
    assert_same_bits(lambda: run(lambda p: Adam(p, max_grad_norm=0.5), steps=2))


def test_gradients_stay_as_they_are_and_their_norm_is_told() -> None:
    params = make_params()
    set_grads(params, 0, scale=100)
    before = [p.grad.clone() for p in params if p.grad is not None]
    optimizer = Adam(params, max_grad_norm=1.0)
    optimizer.step()
    for p, grad in zip(params, before, strict=True):
        assert p.grad is not None and torch.equal(p.grad, grad)
    expected = torch.nn.utils.get_total_norm(before)
    assert optimizer.grad_norm == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(("ours", "torchs"), PAIRS, ids=["Adam", "AdamW"])
def test_state_dicts_go_both_ways(ours: type, torchs: type) -> None:
    params, other = make_params(), make_params()
    optimizer: torch.optim.Optimizer = ours(params, lr=1e-2)
    twin: torch.optim.Optimizer = torchs(other, lr=1e-2)
    for step in range(6):
        # Every two steps, each optimizer continues from the other's state.
        if step in (2, 4):
            states = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(twin.state_dict())
            optimizer.load_state_dict(states[1])
            twin.load_state_dict(states[0])
        set_grads(params, step)
        set_grads(other, step)
        optimizer.step()
        twin.step()
    for a, b in zip(params, other, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert optimizer.state[params[0]]["step"] == 6


def test_state_that_needs_options_we_lack_is_refused() -> None:
    other = torch.optim.Adam(make_params(), amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad=True"):
        Adam(make_params()).load_state_dict(other.state_dict())


def test_decoupled_decay_does_not_become_coupled() -> None:
    adamw, adam = torch.optim.AdamW(make_params()), torch.optim.Adam(make_params())
    with pytest.raises(ValueError, match="decoupled_weight_decay=True"):
        Adam(make_params()).load_state_dict(adamw.state_dict())
    with pytest.raises(ValueError, match="decoupled_weight_decay=False"):
        AdamW(make_params()).load_state_dict(adam.state_dict())


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "step"])
@pytest.mark.parametrize("wrong", [torch.zeros(1), None], ids=["shape", "missing"])
def test_state_of_another_model_is_refused(name: str, wrong: Tensor | None) -> None:
    """The kernel would write past its end."""
    params = make_params()
    set_grads(params, 0)
    optimizer = Adam(params)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    if wrong is None:
        del state["state"][0][name]
    else:
        state["state"][0][name] = wrong
    with pytest.raises(ValueError, match=f"the state's {name} is .* it belongs to another model"):
        Adam(make_params()).load_state_dict(state)


def test_state_changed_by_hand_never_reaches_the_kernel() -> None:
    param = torch.zeros(8, requires_grad=True)
    param.grad = torch.ones(8)
    optimizer = Adam([param])
    optimizer.step()
    optimizer.state[param]["exp_avg"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match="size"):
        optimizer.step()


@pytest.mark.parametrize("optimizer_class", [Adam, torch.optim.Adam])
def test_backward_through_what_was_before_the_step_is_refused(optimizer_class: type) -> None:
    param = torch.ones(3, requires_grad=True)
    loss = param.pow(2).sum()
    param.grad = torch.ones(3)
    optimizer_class([param]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_missing_gradients_are_skipped() -> None:
    params = make_params()
    optimizer = Adam(params, max_grad_norm=1.0)
    before = [p.detach().clone() for p in params]
    set_grads(params, 0)
    params[2].grad = None
    optimizer.step()
    assert torch.equal(params[2], before[2])
    assert params[2] not in optimizer.state
    assert not torch.equal(params[0], before[0])
    for p in params:
        p.grad = None
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 1


def test_sparse_gradient_is_refused_as_in_torch() -> None:
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        Adam(embedding.parameters()).step()


def test_groups_schedulers_and_closures() -> None:
    def groups(params: list[Tensor]) -> list[dict[str, Any]]:
        return [
            {"params": params[:3], "lr": 1e-2, "weight_decay": 0.5},
            {"params": params[3:], "betas": (0.5, 0.6), "eps": 1e-3},
        ]

    results = []
    for optimizer_class in (AdamW, torch.optim.AdamW):
        params = make_params()
        optimizer = optimizer_class(groups(params), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for step in range(4):
            set_grads(params, step)
            assert optimizer.step(lambda step=step: step) == step
            scheduler.step()
        results.append(params)
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
def test_other_dtypes_take_the_reference(dtype: torch.dtype) -> None:
    ours = run(lambda p: Adam(p), dtype)
    torchs = run(lambda p: torch.optim.Adam(p), dtype)
    for a, b in zip(ours, torchs, strict=True):
        assert torch.allclose(a, b, atol=2e-2 if dtype is torch.bfloat16 else 1e-6)


@needs_extension
def test_asked_for_kernels_that_cannot_serve_raise() -> None:
    params = make_params(torch.float64)
    set_grads(params, 0)
    with fastllm.use("cpu"), pytest.raises(RuntimeError, match="float64"):
        Adam(params).step()


def test_parameter_that_is_not_contiguous() -> None:
    results = []
    for optimizer_class in (Adam, torch.optim.Adam):
        param = torch.arange(12.0).view(3, 4).t().requires_grad_()
        param.grad = torch.ones(4, 3)
        optimizer_class([param], lr=0.1).step()
        results.append(param.detach())
    assert torch.allclose(*results)


@pytest.mark.parametrize("impl", ["ref", "cpu"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_spoils_the_parameters_as_in_torch(impl: str, bad: float) -> None:
    if impl == "cpu" and extension.kernels is None:
        pytest.skip(f"no C++ kernels: {extension.problem}")
    for clip in (None, 1.0):
        ours, torchs = torch.zeros(20, requires_grad=True), torch.zeros(20, requires_grad=True)
        for p in (ours, torchs):
            p.grad = torch.ones(20)
            p.grad[3] = bad
        if clip:
            torch.nn.utils.clip_grad_norm_([torchs], clip)
        with fastllm.use(impl):
            Adam([ours], max_grad_norm=clip).step()
        torch.optim.Adam([torchs]).step()
        assert torch.allclose(ours, torchs, equal_nan=True)
        assert ours.isnan().any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate"),
        ({"eps": -1e-8}, "Invalid epsilon"),
        ({"betas": (0.9, 1.0)}, "Invalid betas"),
        ({"betas": (-0.1, 0.9)}, "Invalid betas"),
        ({"weight_decay": -0.1}, "Invalid weight_decay"),
        ({"max_grad_norm": 0.0}, "Invalid max_grad_norm"),
        ({"max_grad_norm": float("nan")}, "Invalid max_grad_norm"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adam(make_params(), **settings)


def test_pickles_and_copies() -> None:
    params = make_params()
    optimizer = AdamW(params, max_grad_norm=2.0)
    set_grads(params, 0)
    optimizer.step()
    for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert again.max_grad_norm == 2.0
        assert len(again.state) == len(optimizer.state)


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_in_fp32_differs_by_the_rounding_to_bf16(nesterov: bool) -> None:
    torch.manual_seed(0)
    start = [torch.randn(24, 16), torch.randn(16, 24)]
    grads = [[torch.randn_like(p) for p in start] for _ in range(3)]
    ends = []
    for optimizer_class in (torch.optim.Muon, Fp32Muon):
        params = [torch.nn.Parameter(p.clone()) for p in start]
        optimizer = optimizer_class(params, lr=0.02, weight_decay=0.1, nesterov=nesterov)
        for step in grads:
            for param, grad in zip(params, step, strict=True):
                param.grad = grad.clone()
            optimizer.step()
        ends.append((params, optimizer.state_dict()["state"]))
    # Five iterations in bf16 (2^-8), whose factors sum to about 10, in three steps of size lr.
    atol = 3 * 0.02 * 10 * 2**-8
    for i, (theirs, ours) in enumerate(zip(ends[0][0], ends[1][0], strict=True)):
        assert not torch.equal(theirs, start[i])
        assert torch.allclose(theirs, ours, rtol=0, atol=atol)
        buffers = (state[i]["momentum_buffer"] for _, state in ends)
        assert torch.equal(*buffers)


@pytest.mark.parametrize("native", [True, False])
def test_muon_avoids_bf16_where_it_is_emulated(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "multiplies_bf16", lambda: native)
    config = parse_train_config(["--optimizer", "muon"])
    muon, _ = engine.make_optimizers(config.build_model(9, 8), config)
    assert type(muon) is (torch.optim.Muon if native else Fp32Muon)
