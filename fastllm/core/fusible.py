"""Whether a fused operation may replace modules, or their own forwards must run.

A fused operation takes the parameters of several modules and calls none of them. This is safe only
if each is an instance of a known class, without hooks, not compiled on its own, and with the
class's own `forward`, patched neither on the class nor on the instance.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from fastllm.ops.decoder import Norm
from fastllm.ops.torch_private import any_global_hook, anything_attached, weight_and_bias

# The original forward of every class that operations can replace.
FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    cls: cls.forward
    for cls in (
        *(nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding),
        *(nn.GELU, nn.ReLU, nn.SiLU, nn.LeakyReLU),
    )
}


def is_plain(*modules: Any, known: dict[type[nn.Module], Callable[..., Any]] = FORWARDS) -> bool:
    """Whether all of these are plain instances of known classes with nothing attached."""
    for module in modules:
        cls = type(module)
        if known.get(cls) is not cls.forward:
            return False
    return not any_global_hook() and not anything_attached(*modules)


def all_are(cls: type[nn.Module], *modules: Any) -> bool:
    """Whether all of these are of exactly this class; a plain module may be of another class."""
    return all(type(module) is cls for module in modules)


def plain_norm(module: Any, hidden_size: int) -> Norm | None:
    """The record of a plain norm over the last `hidden_size` elements, else None."""
    if not isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or not is_plain(module):
        return None
    if module.normalized_shape != (hidden_size,):
        return None
    if isinstance(module, nn.LayerNorm):
        return Norm(*weight_and_bias(module), module.eps)
    if module.eps is None:  # it depends on the type of the input
        return None
    return Norm(module.weight, None, module.eps, "rms", getattr(module, "offset", 0.0))


def plain_norms(*modules: tuple[Any, int]) -> list[Norm | None] | None:
    """As `plain_norm` for each module and its width, with None for no module; None if one of them
    is not plain."""
    norms: list[Norm | None] = []
    for module, size in modules:
        norms.append(None if module is None else plain_norm(module, size))
        if norms[-1] is None and module is not None:
            return None
    return norms


def sublayer_norms(
    norm: Any, out_norm: Any, hidden_size: int, residual: bool
) -> list[Norm | None] | None:
    """`plain_norms` of an attention or an MLP; None also if no operation has them.

    Args:
        residual: whether there is a residual connection. The operations have one if they have a
            norm, be it of the input or of the output.
    """
    if residual != (norm is not None or out_norm is not None):
        return None
    return plain_norms((norm, hidden_size), (out_norm, hidden_size))
