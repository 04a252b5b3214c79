"""Backward passes as users write them: accumulated, scaled, repeated, with frozen parameters."""

import gc

import pytest
import torch
from torch import Tensor, nn

import fastllm
from fastllm.ops import extension, memory
from fastllm.ops.attention import attention
from fastllm.ops.decoder import Embedding, Linear, Mlp, MultiHeadAttention, Norm
from fastllm.ops.embedding import embedding
from fastllm.ops.linear_cross_entropy import linear_cross_entropy
from fastllm.ops.mlp import mlp
from fastllm.ops.multi_head_attention import multi_head_attention
from fastllm.ops.norm import norm
from fastllm.optim import Adam
from tests.conftest import needs_extension
from tests.drop_in.cases import (
    Calls,
    Case,
    Scenario,
    assert_like_reference,
    each_kind,
    each_layer,
    each_model,
)


def accumulated(case: Case) -> dict[str, Tensor | None]:
    for seed in range(3):
        case.loss(seed).backward()
    return case.grads()


def scaled(case: Case) -> dict[str, Tensor | None]:
    (case.loss() * 0.3).backward()
    return case.grads()


def summed(case: Case) -> dict[str, Tensor | None]:
    (case.loss(0) + 2 * case.loss(1)).backward()
    return case.grads()


def repeated(case: Case) -> dict[str, Tensor | None]:
    loss = case.loss()
    loss.backward(retain_graph=True)
    (3 * loss).backward(retain_graph=True)
    loss.backward()
    return case.grads()


def zeroed_in_place(case: Case) -> dict[str, Tensor | None]:
    case.loss(0).backward()
    case.module.zero_grad(set_to_none=False)
    case.loss(1).backward()
    return case.grads()


def zero(case: Case) -> dict[str, Tensor | None]:
    (case.loss() * 0).backward()
    return case.grads()


def clipped(case: Case) -> dict[str, Tensor | None]:
    case.loss(0).backward()
    nn.utils.clip_grad_norm_(case.module.parameters(), 1e-2)
    case.loss(1).backward()
    return case.grads()


@each_kind
@pytest.mark.parametrize(
    "scenario",
    [accumulated, scaled, summed, repeated, zeroed_in_place, zero, clipped],
    ids=lambda scenario: scenario.__name__,
)
def test_gradients(kind: str, scenario: Scenario, calls: Calls) -> None:
    assert_like_reference(kind, scenario, calls)


@each_layer
def test_expanded_gradient_of_a_sum(kind: str, calls: Calls) -> None:
    """The gradient of `sum` is one number expanded to the output's shape."""

    def scenario(case: Case) -> dict[str, Tensor | None]:
        torch.manual_seed(0)
        case.module(case.x).sum().backward()
        return case.grads()

    assert_like_reference(kind, scenario, calls)


@each_kind
def test_a_second_backward_through_a_freed_graph_is_refused(kind: str) -> None:
    loss = Case(kind).loss()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@each_kind
@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_gradients_handed_out_are_never_overwritten(
    kind: str, large: bool, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Case(kind)
    expected.loss(0).backward()
    if large:  # memory of large gradients is reused
        monkeypatch.setattr(memory, "LARGE", 8)
    case = Case(kind)
    case.loss(0).backward()
    calls.clear()
    first = case.grads()
    for seed in range(1, 4):
        case.module.zero_grad()
        case.loss(seed).backward()
    assert ("Memory" in dict(calls)) == large
    for name, grad in expected.grads().items():
        if name != "input":  # which accumulates
            assert torch.equal(first[name], grad), name  # type: ignore[arg-type]


@needs_extension
@each_kind
def test_memory_of_large_gradients_is_used_again(
    kind: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(memory, "LARGE", 8)
    # Garbage of other tests would free memory of the same sizes, now or in the middle.
    gc.collect()
    gc.disable()
    request.addfinalizer(gc.enable)
    extension.kernels.Memory(12345)  # a size not in the free list empties it
    case = Case(kind)
    if not case.is_model:
        case.x.requires_grad_(False)
    before: set[int] = set()
    for seed in range(6):
        case.module.zero_grad()
        case.loss(seed).backward()
        addresses = {
            parameter.grad.data_ptr()  # type: ignore[union-attr]
            for name, parameter in case.module.named_parameters()
            if "pos_embedding" not in name  # PyTorch widens its gradient to the whole table
        }
        if seed == 5:
            assert addresses <= before
        before |= addresses


@each_model
def test_gradients_may_be_changed_though_the_graph_is_kept(kind: str) -> None:
    """A model computes gradients in its forward; the caller gets copies."""
    case = Case(kind)
    weights = list(case.module.parameters())
    loss = case.loss()
    first = torch.autograd.grad(loss, weights, retain_graph=True)
    expected = [grad.clone() for grad in first]
    for grad in first:
        grad.zero_()
    second = torch.autograd.grad(loss, weights)
    assert all(torch.equal(a, b) for a, b in zip(second, expected, strict=True))


@pytest.mark.parametrize(
    "trainable",
    [
        ["lm_head"],
        ["embedding_layer.token_embeddings"],
        ["embedding_layer.positional_encoding"],
        ["bias"],
        ["norm"],
        ["norm1.weight", "norm2.bias"],
        ["transformer_blocks.1"],
        ["transformer_blocks.0.mlp.fc1.weight"],
        ["qkv_proj.weight", "out_proj.bias"],
        ["embedding_layer", "transformer_blocks"],
    ],
    ids=" ".join,
)
@each_model
def test_frozen_parameters_get_no_gradient_and_the_others_the_same_as_before(
    kind: str, trainable: list[str], calls: Calls
) -> None:
    free = Case(kind)
    free.loss().backward()
    case = Case(kind)
    for name, parameter in case.module.named_parameters():
        parameter.requires_grad_(any(part in name for part in trainable))
    calls.clear()
    case.loss().backward()
    expected = free.grads()
    for name, parameter in case.module.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, expected[name]), name  # type: ignore[arg-type]
        else:
            assert parameter.grad is None, name
    # By operation, gradients of hidden states are added: one for each operation after the first
    # trained one.
    learning = [p for p in case.module.parameters() if p.requires_grad]
    states = len(calls.grad_addresses()) - len(learning)
    assert states in (range(1) if kind == "model-whole" else range(7))


@each_model
def test_nothing_before_the_first_trained_layer_is_differentiated(kind: str, calls: Calls) -> None:
    """With all but the head frozen, no layer runs backward or saves anything for it."""
    case = Case(kind)
    case.module.requires_grad_(False)
    case.module.lm_head.requires_grad_(True)
    case.loss().backward()
    assert not [name for name in calls.names() if name.endswith("_bwd")]
    assert len(calls.grad_addresses()) == 2
    assert calls.saved_addresses() == []


class LowRank(nn.Module):
    """LoRA (Hu et al. 2021) in place of a linear layer."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(rank, base.in_features))
        self.b = nn.Parameter(torch.randn(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.t() @ self.b.t()


@each_kind
def test_low_rank_layers_learn_alone(kind: str, calls: Calls) -> None:
    """Compared with merged weights: the chain rule gives the gradients of the two factors."""
    merged, case = Case(kind), Case(kind)
    name = {"mlp": "fc1", "attention": "qkv_proj", "block": "self_attn.out_proj"}.get(
        kind, "transformer_blocks.1.mlp.fc2"
    )
    case.module.requires_grad_(False)
    layer = LowRank(case.module.get_submodule(name))  # type: ignore[arg-type]
    case.module.set_submodule(name, layer)
    whole = merged.module.get_submodule(name).weight
    whole.data += layer.b.detach() @ layer.a.detach()
    merged.loss().backward()
    calls.clear()
    case.loss().backward()
    assert [n for n, p in case.module.named_parameters() if p.grad is not None] == [
        f"{name}.a",
        f"{name}.b",
    ]
    assert torch.allclose(layer.a.grad, layer.b.t() @ whole.grad, atol=1e-5)  # type: ignore[arg-type]
    assert torch.allclose(layer.b.grad, whole.grad @ layer.a.t(), atol=1e-5)  # type: ignore[arg-type]
    assert calls.names() or kind in ("mlp", "attention"), "the layers around it use the kernels"


@each_layer
def test_only_the_input_wants_a_gradient(kind: str, calls: Calls) -> None:
    free = Case(kind)
    free.loss().backward()
    case = Case(kind)
    case.module.requires_grad_(False)
    calls.clear()
    case.loss().backward()
    assert torch.equal(case.x.grad, free.x.grad)  # type: ignore[arg-type]
    assert all(p.grad is None for p in case.module.parameters())
    assert len(calls.grad_addresses()) == len(case.kernels) / 2


@each_layer
def test_only_the_parameters_want_a_gradient(kind: str, calls: Calls) -> None:
    free = Case(kind)
    free.loss().backward()
    case = Case(kind)
    case.x.requires_grad_(False)
    calls.clear()
    case.loss().backward()
    for name, grad in free.grads().items():
        if name != "input":
            assert torch.equal(case.grads()[name], grad), name  # type: ignore[arg-type]
    between = len(case.kernels) // 2 - 1  # gradients of the states between operations
    assert len(calls.grad_addresses()) == len(list(case.module.parameters())) + between


@each_kind
def test_no_gradient_is_wanted(kind: str, calls: Calls) -> None:
    case = Case(kind)
    case.module.requires_grad_(False)
    if not case.is_model:
        case.x.requires_grad_(False)
    calls.clear()
    assert not case.loss().requires_grad
    assert calls
    assert calls.saved_addresses() == calls.grad_addresses() == []


@each_model
def test_tied_weights_get_the_sum_of_both_gradients(kind: str, calls: Calls) -> None:
    untied = Case(kind)
    tokens = untied.module.embedding_layer.token_embeddings.weight
    untied.module.lm_head.weight.data = tokens.data.clone()
    untied.loss().backward()

    def scenario(case: Case) -> dict[str, Tensor | None]:
        weight = case.module.embedding_layer.token_embeddings.weight
        case.module.lm_head.weight = weight
        case.loss().backward()
        grads = case.grads()
        assert torch.allclose(
            weight.grad.float(),  # type: ignore[union-attr]
            tokens.grad + untied.module.lm_head.weight.grad,  # type: ignore[operator]
            atol=1e-6,
        )
        optimizer = torch.optim.SGD(case.module.parameters(), lr=0.1)
        for seed in (1, 2):
            optimizer.step()
            optimizer.zero_grad()
            case.loss(seed).backward()
        after = {f"{name} after": grad for name, grad in case.grads().items()}
        return {**grads, **after}

    assert_like_reference(kind, scenario, calls)


@each_model
def test_tied_weights_stay_tied_through_the_optimizer(kind: str) -> None:
    case = Case(kind)
    weight = case.module.embedding_layer.token_embeddings.weight
    case.module.lm_head.weight = weight
    before, loss = weight.detach().clone(), case.loss().item()
    optimizer = Adam(case.module.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        case.loss().backward()
        optimizer.step()
    assert case.module.lm_head.weight is case.module.embedding_layer.token_embeddings.weight
    assert not torch.equal(weight, before)
    assert case.loss().item() < loss


@needs_extension
@each_model
def test_large_gradients_of_a_tied_weight_add_up_in_place(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fresh memory for the sum would cost a page fault per 4 kB in every step."""
    monkeypatch.setattr(memory, "LARGE", 8)
    made: list[int] = []
    original = torch.frombuffer

    def frombuffer(*arguments: object, **keywords: object) -> Tensor:
        tensor = original(*arguments, **keywords)  # type: ignore[arg-type]
        made.append(tensor.data_ptr())
        return tensor

    monkeypatch.setattr(torch, "frombuffer", frombuffer)
    case = Case(kind)
    weight = case.module.embedding_layer.token_embeddings.weight
    case.module.lm_head.weight = weight
    case.loss().backward()
    assert weight.grad is not None and weight.grad.data_ptr() in made


@each_model
def test_a_block_used_twice_gets_the_sum(kind: str, calls: Calls) -> None:
    def scenario(case: Case) -> dict[str, Tensor | None]:
        case.module.transformer_blocks[1] = case.module.transformer_blocks[0]
        case.loss().backward()
        return case.grads()

    assert_like_reference(kind, scenario, calls)


H = 8
OPERATIONS = {
    "embedding": lambda x: embedding(torch.tensor([[1, 2, 0]]), Embedding(x, x[:3])),
    "norm": lambda x: norm(x, Norm(x[0], x[1], 1e-5)),
    "attention": lambda x: attention(*x.view(1, 2, 4, H).expand(3, 1, 2, 4, H)),
    "multi_head_attention": lambda x: multi_head_attention(
        x[None], MultiHeadAttention(Linear(x.repeat(3, 1), None), Linear(x, None), 2)
    ),
    "mlp": lambda x: mlp(x, Mlp(Linear(x, None), Linear(x, None))),
    "linear_cross_entropy": lambda x: linear_cross_entropy(x, Linear(x, None), torch.arange(H)),
}


@needs_extension
@pytest.mark.parametrize("operation", OPERATIONS)
def test_second_derivatives_are_refused_by_the_kernels_and_given_by_the_reference(
    operation: str,
) -> None:
    torch.manual_seed(0)
    run = OPERATIONS[operation]
    x = torch.randn(H, H, dtype=torch.float64)
    single = x.float().requires_grad_()
    loss = run(single).pow(3).sum()
    with pytest.raises(RuntimeError, match=r'no second derivatives.*fastllm.use\("ref"\)'):
        torch.autograd.grad(loss, single, create_graph=True)
    with fastllm.use("ref"):
        assert torch.autograd.gradgradcheck(lambda x: run(x).pow(3).sum(), x.requires_grad_())


@each_kind
def test_second_derivatives_of_modules(kind: str) -> None:
    """A gradient penalty is refused with a remedy, and the remedy works."""
    case = Case(kind)
    weight = next(p for p in case.module.parameters() if p.ndim == 2)
    with pytest.raises(RuntimeError, match=r'fastllm.use\("ref"\)'):
        torch.autograd.grad(case.loss(), weight, create_graph=True)
    with fastllm.use("ref"):
        (grad,) = torch.autograd.grad(case.loss(), weight, create_graph=True)
        grad.square().sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0
