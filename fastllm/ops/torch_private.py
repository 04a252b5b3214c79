"""Every private PyTorch API that fastllm uses, in one place; tests/ops/test_torch_private.py
checks that this PyTorch still has them all.

Tables of modules are read directly because `Module.__getattr__` looks everywhere else first, which
takes a microsecond per submodule or parameter; a small model's training step reads a hundred.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module


def in_functorch_transform() -> bool:
    """Whether a transform such as `torch.func.vmap` is active: tensors then hide their values."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def in_forward_ad() -> bool:
    """Whether forward-mode differentiation is active."""
    return torch.autograd.forward_ad._current_level >= 0


def graph_is_kept() -> bool:
    """Whether the running backward may be repeated (retain_graph=True)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def disable_dynamo(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps `torch.compile` out of a function; it runs eagerly inside compiled code."""
    return torch._disable_dynamo(function)


def any_global_hook() -> bool:
    """Whether a hook is registered on every module (`register_module_forward_hook`, ...)."""
    return torch_module._has_any_global_hook()


def anything_attached(*modules: Any) -> bool:
    """Whether a module has a hook, a `forward` of its own, or is compiled on its own."""
    for module in modules:
        attributes = module.__dict__
        if (
            "forward" in attributes
            or any(map(_acts, attributes["_forward_hooks"].values()))
            or attributes["_forward_pre_hooks"]
            or attributes["_backward_hooks"]
            or attributes["_backward_pre_hooks"]
            or module._compiled_call_impl is not None
        ):
            return True
    return False


def _acts(hook: Any) -> bool:
    """Whether a hook can change the result.

    transformers leaves hooks behind that only record outputs on request, and a model with such a
    request calls its modules anyway.
    """
    return getattr(hook, "__module__", None) != "transformers.utils.output_capturing"


def submodules(module: nn.Module, *names: str) -> list[Any]:
    """The submodules with these names."""
    table = module._modules
    return [table[name] for name in names]


def children(container: nn.Module) -> list[Any]:
    """All submodules of a container, in order."""
    return list(container._modules.values())


def weight_and_bias(module: Any) -> tuple[Any, Any]:
    """The parameters `weight` and `bias` of a module."""
    table = module._parameters
    try:
        return table["weight"], table["bias"]
    except KeyError:  # stored elsewhere, as under FSDP
        return module.weight, module.bias


def multiplies_bf16() -> bool:
    """Whether PyTorch multiplies matrices in bf16 on this CPU by oneDNN, and not one by one."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
