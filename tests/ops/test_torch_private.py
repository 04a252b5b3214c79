"""Every private API that fastllm uses still exists with the expected meaning."""

import copy

import torch
from torch import nn

from fastllm.ops import torch_private as private


def test_functorch_transforms_and_forward_ad_are_seen() -> None:
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append((private.in_functorch_transform(), private.in_forward_ad()))
        return x * 2

    look(torch.ones(2))
    torch.func.vmap(look)(torch.ones(2))
    with torch.autograd.forward_ad.dual_level():
        look(torch.ones(2))
    assert seen == [(False, False), (True, False), (False, True)]


def test_a_backward_knows_whether_its_graph_is_kept() -> None:
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
            seen.append(private.graph_is_kept())
            return grad

    out = Look.apply(torch.ones(1, requires_grad=True))
    out.backward(retain_graph=True)
    out.backward()
    assert seen == [True, False]


def test_dynamo_skips_a_function() -> None:
    def function(x: int) -> bool:
        return torch.compiler.is_compiling()

    assert private.disable_dynamo(function)(1) is False


def test_attachments_are_seen() -> None:
    assert not private.any_global_hook()
    with_hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert private.any_global_hook()
    with_hook.remove()
    module = nn.Linear(2, 2)
    assert not private.anything_attached(module)

    def hook(*_: object) -> None:
        pass

    for register in (
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ):
        handle = getattr(module, register)(hook)
        assert private.anything_attached(module), register
        handle.remove()
        assert not private.anything_attached(module)
    patched, compiled = copy.deepcopy(module), copy.deepcopy(module)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    compiled.compile()
    assert private.anything_attached(patched) and private.anything_attached(compiled)


def test_hooks_that_only_record_are_not_attachments() -> None:
    def recorder(*_: object) -> None:
        pass

    recorder.__module__ = "transformers.utils.output_capturing"
    module = nn.Linear(2, 2)
    module.register_forward_hook(recorder)
    assert not private.anything_attached(module)


def test_tables_hold_submodules_and_parameters() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    assert private.submodules(module, "1", "0") == [module[1], module[0]]
    assert private.children(module) == [module[0], module[1]]
    assert private.weight_and_bias(module[0]) == (module[0].weight, module[0].bias)
    assert private.weight_and_bias(nn.Linear(2, 3, bias=False))[1] is None
