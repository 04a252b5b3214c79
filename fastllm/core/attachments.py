"""Whether anything was attached to a module, so that its own forward must run.

A fused operation takes the parameters of several modules and calls none of them. It may do so only
where each is just what it seems: no subclass, no hook, no `forward` patched on the class or on the
instance, not compiled by itself.
"""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from fastllm.ops.parameters import Norm

# The forward of every class that operations can stand for, as it was written.
FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    cls: cls.forward
    for cls in (nn.Linear, nn.LayerNorm, nn.Embedding, nn.GELU, nn.ReLU, nn.SiLU, nn.LeakyReLU)
}


def plain(*modules: Any, known: dict[type[nn.Module], Callable[..., Any]] = FORWARDS) -> bool:
    """Whether all of these are plain instances of known classes with nothing attached."""
    if torch_module._has_any_global_hook():
        return False
    for module in modules:
        cls = type(module)
        if known.get(cls) is not cls.forward:
            return False
        attributes = module.__dict__
        if (
            "forward" in attributes
            or any(map(_acts, attributes["_forward_hooks"].values()))
            or attributes["_forward_pre_hooks"]
            or attributes["_backward_hooks"]
            or attributes["_backward_pre_hooks"]
            or module._compiled_call_impl is not None
        ):
            return False
    return True


def _acts(hook: Any) -> bool:
    """Whether a hook is more than transformers' own, which look at outputs when they are asked for
    and stay behind; a model that is asked calls its modules."""
    return getattr(hook, "__module__", None) != "transformers.utils.output_capturing"


def all_are(cls: type[nn.Module], *modules: Any) -> bool:
    """Whether all of these are of just this class: what is plain may be of another one."""
    return all(type(module) is cls for module in modules)


# Below, tables are read instead of attributes: PyTorch looks for a submodule or a parameter
# everywhere else first, a microsecond each time, and a small model's step asks for a hundred.


def parts(module: nn.Module, *names: str) -> list[Any]:
    """The submodules of these names."""
    table = module._modules
    return [table[name] for name in names]


def weight_and_bias(module: Any) -> tuple[Any, Any]:
    """A module's parameters of these names."""
    table = module._parameters
    try:
        return table["weight"], table["bias"]
    except KeyError:  # somebody keeps them elsewhere, such as FSDP
        return module.weight, module.bias


def plain_norm(module: Any, hidden_size: int) -> Norm | None:
    """The parameters of a plain layer norm over the last `hidden_size` elements, else None."""
    if type(module) is not nn.LayerNorm or not plain(module):
        return None
    weight, bias = weight_and_bias(module)
    if module.normalized_shape != (hidden_size,) or weight is None or bias is None:
        return None
    return Norm(weight, bias, module.eps)
