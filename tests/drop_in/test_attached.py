"""Every module honours what users attach to its submodules or put in their place.

Hooks and patches are compared with a replacement of an unknown class, which is never fused.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fastllm
from fastllm import MLP, DecoderModel
from tests.conftest import needs_extension
from tests.drop_in.cases import (
    Calls,
    Case,
    assert_like_reference,
    each_kind,
    each_layer,
    each_model,
)

PARTS = [
    *[("mlp", name) for name in ("norm", "fc1", "activation", "dropout", "fc2")],
    *[("attention", name) for name in ("norm", "qkv_proj", "out_proj", "dropout")],
    *[("block", name) for name in ("norm1", "self_attn", "norm2", "mlp")],
    *[("block", name) for name in ("self_attn.qkv_proj", "self_attn.dropout", "mlp.activation")],
]
# A linear layer inside each kind.
LINEAR = {
    "mlp": "fc1",
    "attention": "qkv_proj",
    "block": "mlp.fc2",
    "model-whole": "transformer_blocks.1.self_attn.out_proj",
    "model-by-operation": "lm_head",
}


class Wrapped(nn.Module):
    """Changes a module's input, output or gradient."""

    def __init__(self, base: nn.Module, which: str) -> None:
        super().__init__()
        self.base, self.which = base, which

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        out = self.base(x.sin() if self.which == "pre_hook" else x, *others, **named)
        if self.which == "backward_pre_hook":
            out.register_hook(lambda grad: grad * 5)
            return out
        return out if self.which == "pre_hook" else out / 2


def forward_hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, inputs, output: output / 2)


def pre_hook(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, inputs: (inputs[0].sin(), *inputs[1:]))


def backward_pre_hook(module: nn.Module) -> None:
    module.register_full_backward_pre_hook(lambda module, grads: (grads[0] * 5,))


def instance_patch(module: nn.Module) -> None:
    original = module.forward
    module.forward = lambda *args, **named: original(*args, **named) / 2  # type: ignore[method-assign]


def subclass(module: nn.Module) -> None:
    parent = type(module)
    body = {"forward": lambda self, *args, **named: parent.forward(self, *args, **named) / 2}
    module.__class__ = type("Halved", (parent,), body)


@pytest.mark.parametrize(("kind", "part"), PARTS, ids=[" ".join(part) for part in PARTS])
@pytest.mark.parametrize(
    "attach", [forward_hook, pre_hook, backward_pre_hook, instance_patch, subclass]
)
def test_parts(kind: str, part: str, attach: Callable[[nn.Module], None]) -> None:
    results = []
    for change in ("attached", "replaced", "nothing"):
        case = Case(kind)
        module = case.module.get_submodule(part)
        if change == "attached":
            attach(module)
        elif change == "replaced":
            case.module.set_submodule(part, Wrapped(module, attach.__name__))
        loss = case.loss()
        loss.backward()
        results.append([loss.detach(), *case.grads().values()])
    attached, replaced, nothing = results
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(attached, replaced, strict=True))
    assert not all(torch.allclose(a, b, atol=1e-6) for a, b in zip(attached, nothing, strict=True))


@each_kind
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_global_hooks_see_every_module(kind: str) -> None:
    case = Case(kind)
    forward: list[nn.Module] = []
    backward: list[nn.Module] = []
    hooks = [
        nn.modules.module.register_module_forward_hook(lambda m, *_: forward.append(m)),
        nn.modules.module.register_module_full_backward_hook(lambda m, *_: backward.append(m)),
    ]
    try:
        case.loss().backward()
    finally:
        for hook in hooks:
            hook.remove()
    leaves = {module for module in case.module.modules() if not list(module.children())}
    assert leaves <= set(forward)
    assert leaves <= set(backward)
    hooked = case.grads()
    plain = Case(kind)
    plain.loss().backward()
    for name, grad in plain.grads().items():
        assert torch.allclose(hooked[name], grad, atol=1e-6), name  # type: ignore[arg-type]


@each_kind
def test_tensor_hooks_on_parameters(kind: str, calls: Calls) -> None:
    """They see and change the kernels' gradients."""

    def scenario(case: Case) -> dict[str, Tensor | None]:
        for parameter in case.module.parameters():
            parameter.register_hook(lambda grad: grad * 2)
        case.loss().backward()
        return case.grads()

    assert_like_reference(kind, scenario, calls)


@each_kind
def test_optimizer_inside_the_backward(kind: str, calls: Calls) -> None:
    """A hook on each parameter takes the step and frees the gradient, to save memory."""

    def scenario(case: Case) -> dict[str, Tensor | None]:
        def step(parameter: Tensor) -> None:
            with torch.no_grad():
                parameter -= 0.1 * parameter.grad  # type: ignore[operator]
            parameter.grad = None

        for parameter in case.module.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        for seed in range(3):
            case.loss(seed).backward()
        assert all(parameter.grad is None for parameter in case.module.parameters())
        return {name: p.detach() for name, p in case.module.named_parameters()}

    assert_like_reference(kind, scenario, calls)


def new_weight_norm(module: nn.Module) -> None:
    parametrizations.weight_norm(module)
    module.parametrizations.weight.original0.data *= 1.5


def old_weight_norm(module: nn.Module) -> None:
    torch.nn.utils.weight_norm(module)
    module.weight_g.data *= 1.5


def pruned(module: nn.Module) -> None:
    prune.random_unstructured(module, "weight", amount=0.5)


@each_kind
@pytest.mark.parametrize("attach", [new_weight_norm, old_weight_norm, pruned])
@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated")
def test_parametrizations(kind: str, attach: Callable[[nn.Module], None]) -> None:
    """Setting the resulting weights by hand gives the same loss."""
    case, by_hand = Case(kind), Case(kind)
    module = case.module.get_submodule(LINEAR[kind])
    attach(module)
    loss = case.loss()
    loss.backward()
    linear = by_hand.module.get_submodule(LINEAR[kind])
    unchanged = by_hand.loss().item()
    linear.weight.data = module.weight.detach().clone()
    assert by_hand.loss().item() == pytest.approx(loss.item(), rel=1e-5)
    assert loss.item() != pytest.approx(unchanged, rel=1e-5)
    grads = [p.grad for p in module.parameters() if p.requires_grad]
    assert len(grads) >= 2 and all(grad is not None for grad in grads)


@each_kind
def test_functional_call_differentiates_by_the_parameters_given(kind: str, calls: Calls) -> None:
    def scenario(case: Case) -> dict[str, Tensor | None]:
        others = {
            name: (p.detach() * 1.1).requires_grad_() for name, p in case.module.named_parameters()
        }
        # The loss of a model is not its `forward`, so a module around it calls it.
        wrapper = Loss(case)
        given = {f"module.{name}": p for name, p in others.items()}
        torch.func.functional_call(wrapper, given, ()).backward()
        assert all(p.grad is None for p in case.module.parameters())
        return {name: p.grad for name, p in others.items()}

    assert_like_reference(kind, scenario, calls)


class Loss(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.module = case, case.module

    def forward(self) -> Tensor:
        return self.case.loss()


@each_layer
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # raised by PyTorch itself
def test_transforms(kind: str) -> None:
    """`grad`, `vmap` and `jvp` agree with ordinary gradients and loops."""
    case = Case(kind)
    case.module.eval()
    parameters = {name: p.detach() for name, p in case.module.named_parameters()}
    case.loss().backward()
    expected = case.grads()

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(case.module, parameters, (x,)).square().mean()

    x = case.x.detach()
    grads = torch.func.grad(loss)(parameters, x)
    for name, grad in grads.items():
        assert torch.allclose(grad, expected[name], atol=1e-6), name  # type: ignore[arg-type]

    each = torch.func.vmap(loss, (None, 0))(parameters, x[:, None])
    assert torch.allclose(each, torch.stack([loss(parameters, row[None]) for row in x]))

    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    _, derivative = torch.func.jvp(lambda p: loss(p, x), (parameters,), (tangents,))
    along = sum((grads[name] * tangent).sum() for name, tangent in tangents.items())
    assert torch.allclose(derivative, along, rtol=1e-4)  # type: ignore[arg-type]


@each_layer
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # raised by PyTorch itself
def test_forward_mode(kind: str) -> None:
    case = Case(kind)
    case.module.eval()
    torch.manual_seed(1)
    tangent = torch.randn_like(case.x)
    case.loss().backward()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(case.x.detach(), tangent)
        out = torch.autograd.forward_ad.unpack_dual(case.module(dual).square().mean())
    assert torch.allclose(out.tangent, (case.x.grad * tangent).sum(), rtol=1e-4)  # type: ignore[operator]


@each_model
def test_a_list_that_leaves_blocks_out_is_asked(kind: str) -> None:
    """For example LayerDrop (Fan et al. 2019), which runs some of the blocks each time."""

    class FirstOnly(nn.ModuleList):
        def __iter__(self):
            return iter([self[0]])

    results = []
    for blocks in (FirstOnly, lambda blocks: nn.ModuleList(blocks[:1])):
        case = Case(kind)
        case.module.transformer_blocks = blocks(case.module.transformer_blocks)
        results.append(case.loss())
    assert torch.allclose(*results)


@each_model
def test_weights_kept_elsewhere_are_found(kind: str) -> None:
    """A weight computed by another network is not a parameter; positions may become one."""
    expected = Case(kind)
    expected.loss().backward()
    for name in ("embedding_layer.token_embeddings", "lm_head", "transformer_blocks.0.mlp.fc1"):
        case = Case(kind)
        module = case.module.get_submodule(name)
        source = nn.Parameter(module.weight.detach().clone())
        del module.weight
        module.weight = source * 1
        case.loss().backward()
        assert torch.allclose(source.grad, expected.grads()[f"{name}.weight"], atol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("sequences", [3, 24])
def test_sinusoidal_positions_may_become_a_parameter(sequences: int) -> None:
    grads = []
    for implementation in ("auto", "ref"):
        torch.manual_seed(0)
        model = DecoderModel(11, 16, 1, 2, 12)
        ids = torch.randint(0, 11, (sequences, 8))
        encoding = model.embedding_layer.positional_encoding
        table = encoding.pe
        del encoding.pe
        encoding.pe = nn.Parameter(table)
        with fastllm.use(implementation):
            model.loss(ids, ids).backward()
        grads.append(encoding.pe.grad)
    assert torch.allclose(*grads, atol=1e-6)
    assert grads[0][0, :8].abs().sum() > 0 and grads[0][0, 8:].abs().sum() == 0


@each_model
def test_padding_is_ignored_as_the_model_says_when_the_embedding_was_exchanged(kind: str) -> None:
    expected = Case(kind)
    case = Case(kind)
    exchanged = nn.Embedding(11, 16)
    exchanged.weight = case.module.embedding_layer.token_embeddings.weight
    case.module.embedding_layer.token_embeddings = exchanged
    assert torch.allclose(case.loss(), expected.loss())


@needs_extension
@each_model
def test_loss_lies_beside_the_parameters_whatever_the_default_device(kind: str) -> None:
    case = Case(kind)
    with torch.device("meta"):
        loss = case.module.loss(case.x, case.x)
    assert loss.device.type == "cpu"


@pytest.mark.parametrize(
    ("kind", "part", "build"),
    [
        ("mlp", "fc1", lambda: nn.GELU()),
        ("mlp", "fc1", lambda: nn.LayerNorm(16)),
        ("attention", "out_proj", lambda: nn.ReLU()),
        ("block", "mlp", lambda: nn.Linear(16, 16)),
        ("block", "mlp", lambda: nn.LayerNorm(16)),
        ("model-whole", "embedding_layer", lambda: nn.Embedding(11, 16)),
        ("model-whole", "lm_head", lambda: MLP(16)),
    ],
)
def test_parts_of_another_class_that_we_know(
    kind: str, part: str, build: Callable[[], nn.Module]
) -> None:
    """They are called as they are, although elsewhere they would be fused."""

    def loss(implementation: str) -> Tensor:
        case = Case(kind)
        torch.manual_seed(1)
        owner, _, name = part.rpartition(".")
        replacement = build()
        if part == "fc1" and case.module.fc2.in_features != 16:  # it keeps the width
            case.module.fc2 = nn.Linear(16, 16)
        setattr(case.module.get_submodule(owner), name, replacement)
        with fastllm.use(implementation):
            return case.loss()

    assert torch.allclose(loss("auto"), loss("ref"), rtol=1e-5)
