"""The modules under PyTorch's modes and machinery: checkpointing, inference, copies, threads."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastllm
from fastllm import DecoderModel
from fastllm.ops import memory
from fastllm.ops.precision import why_not_autocast
from fastllm.optim import AdamW
from tests.conftest import isa_in_use, needs_extension
from tests.drop_in.cases import (
    Calls,
    Case,
    assert_like_reference,
    each_kind,
    each_layer,
    each_model,
)


@each_layer
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(kind: str, use_reentrant: bool, calls: Calls) -> None:
    """Dropout included: seeds are drawn again from the restored generator."""
    expected = Case(kind)
    expected.loss().backward()
    case = Case(kind)
    calls.clear()
    case.loss(module=lambda x: checkpoint(case.module, x, use_reentrant=use_reentrant)).backward()
    assert calls.names() == case.kernels
    forwards, backwards = (sum(name.endswith(end) for name, _ in calls) for end in ("_fwd", "_bwd"))
    assert forwards == 2 * backwards
    for name, grad in expected.grads().items():
        assert torch.equal(case.grads()[name], grad), name  # type: ignore[arg-type]


@each_model
def test_checkpointing_recomputes_with_the_implementation_of_the_forward(kind: str) -> None:
    """The `with` block may have ended before the backward."""
    grads = []
    for checkpointing in (False, True):
        case = Case(kind)
        case.module.gradient_checkpointing = checkpointing
        with fastllm.use("ref"):
            loss = case.loss()
        loss.backward()
        grads.append(case.grads())
    for name, grad in grads[0].items():
        assert torch.equal(grads[1][name], grad), name  # type: ignore[arg-type]


@each_kind
def test_saved_tensors_hooks(kind: str) -> None:
    """`save_on_cpu` and other hooks see the tensors saved for the backward."""
    expected = Case(kind)
    expected.loss().backward()
    case, packed = Case(kind), []
    pack, unpack = (lambda x: packed.append(x) or x.clone()), (lambda x: x)
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = case.loss()
    loss.backward()
    assert packed
    for name, grad in expected.grads().items():
        assert torch.equal(case.grads()[name], grad), name  # type: ignore[arg-type]


@each_kind
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_saved_and_the_result_is_the_same(
    kind: str, mode: type, calls: Calls
) -> None:
    expected = Case(kind).loss()
    case = Case(kind)
    calls.clear()
    with mode():
        loss = case.loss()
    assert not loss.requires_grad
    assert torch.equal(loss, expected)
    assert calls and calls.saved_addresses() == calls.grad_addresses() == []


@each_kind
def test_parameters_made_in_inference_mode(kind: str, calls: Calls) -> None:
    expected = Case(kind).loss()
    with torch.inference_mode():
        case = Case(kind)
        assert torch.equal(case.loss(), expected)
    with torch.no_grad():
        assert torch.equal(case.loss(), expected)
    assert calls.names() <= case.kernels


@each_kind
def test_evaluation_has_no_dropout_and_training_has_it_again(kind: str, calls: Calls) -> None:
    case = Case(kind)
    training = case.loss()
    case.module.eval()
    first, second = case.loss(0), case.loss(1)
    assert torch.equal(first, second) and not torch.equal(first, training)
    case.module.train()
    assert torch.equal(case.loss(), training)

    def scenario(case: Case) -> dict[str, Tensor | None]:
        case.module.eval()
        case.loss().backward()
        return case.grads()

    assert_like_reference(kind, scenario, calls)


@each_layer
def test_copies_and_pickles_compute_the_same_and_share_nothing(kind: str) -> None:
    case = Case(kind)
    case.loss().backward()
    expected = case.loss()
    for other in (copy.deepcopy(case.module), pickle.loads(pickle.dumps(case.module))):
        assert torch.equal(case.loss(module=other), expected)
        for parameter in other.parameters():
            parameter.data.zero_()
    assert torch.equal(case.loss(), expected)


@each_kind
def test_state_dict_does_not_depend_on_what_ran(kind: str) -> None:
    case, by_reference = Case(kind), Case(kind)
    before = list(case.module.state_dict())
    case.loss().backward()
    with fastllm.use("ref"):
        by_reference.loss().backward()
    state = case.module.state_dict()
    assert list(state) == before == list(by_reference.module.state_dict())
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    by_reference.module.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(by_reference.loss(), case.loss())


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore")  # Dynamo cannot trace the kernels, as intended
def test_compiled_block() -> None:
    """With dropout, by PyTorch's default compiler, which takes about ten seconds."""
    results = []
    for compile_ in (False, True):
        case = Case("block")
        module = torch.compile(case.module) if compile_ else None
        case.loss(module=module).backward()
        results.append(case.grads())
    for name, grad in results[0].items():
        assert torch.allclose(results[1][name], grad, atol=1e-6), name  # type: ignore[arg-type]


@each_kind
def test_compiled_in_place(kind: str) -> None:
    """`Module.compile` of a submodule: the compiled one is called."""
    expected = Case(kind)
    expected.loss().backward()
    case, taken = Case(kind), []
    linear = next(module for module in case.module.modules() if isinstance(module, nn.Linear))
    linear.compile(backend="eager")
    compiled = linear._compiled_call_impl
    linear._compiled_call_impl = lambda *inputs: taken.append(1) or compiled(*inputs)
    case.loss().backward()
    assert taken
    for name, grad in expected.grads().items():
        assert torch.allclose(case.grads()[name], grad, atol=1e-6), name  # type: ignore[arg-type]


def train(settings: tuple[int, int, int, int]) -> list[Tensor]:
    """The weights after a few steps, without dropout: threads would share its seeds."""
    seed, width, layers, sequences = settings
    generator = torch.Generator().manual_seed(seed)
    model = DecoderModel(
        11, width, layers, 2, 24, embedding_dropout_p=0, attn_dropout_p=0, mlp_dropout_p=0
    )
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    optimizer = AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)
    for _ in range(4):
        ids = torch.randint(0, 11, (sequences, 24), generator=generator)
        model.loss(ids, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


@needs_extension
@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_models_trained_at_once_in_several_threads_end_as_one_after_the_other(
    large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:  # gradients use memory shared by all threads
        monkeypatch.setattr(memory, "LARGE", 8)
    torch.set_num_threads(2)
    # Two alike, one of another size, and one with so few sequences that it runs by operation.
    settings = [(0, 32, 2, 16), (0, 32, 2, 16), (1, 48, 1, 24), (2, 32, 2, 3)]
    expected = [train(each) for each in settings]
    with ThreadPoolExecutor(len(settings)) as pool:
        results = list(pool.map(train, settings))
    for weights, others in zip(results, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


@each_kind
def test_autocast_computes_in_bf16(kind: str, calls: Calls) -> None:
    """In the forward, and in the backward after it."""
    if reason := why_not_autocast(torch.bfloat16):
        pytest.skip(reason)

    def scenario(case: Case) -> dict[str, Tensor | None]:
        with torch.autocast("cpu", torch.bfloat16):
            loss = case.loss()
        loss.backward()
        return case.grads()

    assert_like_reference(kind, scenario, calls)
    in_fp32 = Case(kind)
    in_fp32.loss().backward()
    in_bf16 = scenario(Case(kind))
    assert not any(
        torch.equal(in_bf16[name], grad)  # type: ignore[arg-type]
        for name, grad in in_fp32.grads().items()
    )


@each_layer
def test_inputs_that_autocast_made(kind: str, calls: Calls) -> None:
    if reason := why_not_autocast(torch.bfloat16):
        pytest.skip(reason)
    case = Case(kind)
    with torch.autocast("cpu", torch.bfloat16):
        x = nn.Linear(16, 16)(case.x)
        assert x.dtype is torch.bfloat16
        x.retain_grad()
        case.loss(module=lambda _: case.module(x)).backward()
    assert calls.names() == case.kernels
    assert x.grad is not None and x.grad.dtype is torch.bfloat16 and x.grad.any()


@each_layer
def test_modules_of_bf16_weights_stay_so_under_autocast(kind: str, calls: Calls) -> None:
    """Like PyTorch's own modules, on any CPU."""
    case = Case(kind)
    case.module.bfloat16()
    x = case.x.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        under = case.module(x)
    assert calls.names() <= {"dropout"}
    assert under.dtype is torch.bfloat16 and under.isfinite().all()


@each_kind
def test_autocast_goes_through_the_modules_without_bf16(kind: str, calls: Calls) -> None:
    results = []
    for implementation in ("auto", "ref"):
        case = Case(kind)
        calls.clear()
        with isa_in_use("base"), torch.autocast("cpu", torch.bfloat16):
            with fastllm.use(implementation):
                case.loss().backward()
            assert calls.names() <= {"dropout"}
            results.append(case.grads())
            with (
                fastllm.use("cpu"),
                pytest.raises(RuntimeError, match="no bf16 dot product .base is in use"),
            ):
                Case(kind).loss()
    for name, grad in results[1].items():
        assert torch.equal(results[0][name], grad), name  # type: ignore[arg-type]


@needs_extension
def test_autocast_to_another_type_goes_through_the_modules() -> None:
    with (
        torch.autocast("cpu", torch.float16),
        fastllm.use("cpu"),
        pytest.raises(RuntimeError, match="autocast to torch.float16 is on"),
    ):
        Case("mlp").loss()
