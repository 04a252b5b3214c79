"""Adam and AdamW with gradient clipping, all parameters in one pass over memory; Muon in fp32."""

from collections.abc import Callable
from operator import attrgetter, itemgetter
from typing import Any

import torch

from fastllm.ops.adam import AdamGroup, adam

_is_sparse = attrgetter("is_sparse")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor: all of it, unless it is a DTensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _loss_of(closure: Callable[[], Any] | None) -> Any:
    """What the closure of a step returns, computed with gradients; None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class Adam(torch.optim.Optimizer):
    """`torch.optim.Adam` that also clips the gradients; state dicts are interchangeable.

    Args:
        params: parameters or parameter groups, as in every `torch.optim.Optimizer`.
        lr: learning rate.
        betas: decay of the first and of the second moment, each in [0, 1).
        eps: added to the denominator.
        weight_decay: L2 penalty, added to the gradient.
        max_grad_norm: the update sees the gradients of all groups scaled so that their common norm
            is at most this, as after `torch.nn.utils.clip_grad_norm_`; `.grad` itself is
            unchanged. None for no clipping.

    Raises:
        ValueError: a setting is out of range.
        RuntimeError: a gradient is sparse; use `torch.optim.SparseAdam` for those.
    """

    _decoupled_weight_decay = False

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"Invalid learning rate: {lr}; it must not be negative")
        if not eps >= 0:
            raise ValueError(f"Invalid epsilon value: {eps}; it must not be negative")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"Invalid betas: {betas}; two numbers in [0, 1) are needed")
        if not weight_decay >= 0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}; it must not be negative")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(
                f"Invalid max_grad_norm: {max_grad_norm}; it must be positive, or None"
            )
        self.max_grad_norm = max_grad_norm
        self._grad_norm: float | torch.Tensor | None = None
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @property
    def grad_norm(self) -> float | None:
        """The norm of the gradients at the last step with clipping, unscaled."""
        return None if self._grad_norm is None else float(self._grad_norm)

    def __getstate__(self) -> dict[str, Any]:
        # PyTorch's method lists only its own attributes; a copy must clip as well.
        own = {"max_grad_norm": self.max_grad_norm, "_grad_norm": self.grad_norm}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for option, offered in (
                ("amsgrad", False),
                ("maximize", False),
                ("decoupled_weight_decay", self._decoupled_weight_decay),
            ):
                if group.get(option, offered) != offered:
                    raise ValueError(
                        f"the state was saved with {option}={group[option]}, which "
                        f"{type(self).__name__} does not support; use torch.optim"
                    )
        for param, entries in self.state.items():
            shapes = {"exp_avg": param.shape, "exp_avg_sq": param.shape, "step": torch.Size()}
            for name, shape in shapes.items():
                found = getattr(entries.get(name), "shape", None)
                if found != shape:
                    raise ValueError(
                        f"the state's {name} is {found and list(found)} for a parameter "
                        f"{list(param.shape)}, expected {list(shape)}: it belongs to another model"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update. `closure`, if given, recomputes the loss, which is then returned."""
        loss = _loss_of(closure)
        groups = []
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params]
            if any(map(_is_sparse, grads)):
                raise RuntimeError(
                    f"{type(self).__name__} does not support sparse gradients, "
                    "please consider torch.optim.SparseAdam instead"
                )
            states = [self.state[p] for p in params]
            for param, state in zip(params, states, strict=True):
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"] = torch.zeros_like(param)
                    state["exp_avg_sq"] = torch.zeros_like(param)
            exp_avgs, exp_avg_sqs, steps = (
                list(map(itemgetter(name), states)) for name in ("exp_avg", "exp_avg_sq", "step")
            )
            groups.append(
                AdamGroup(
                    list(map(local, params)),
                    list(map(local, grads)),
                    list(map(local, exp_avgs)),
                    list(map(local, exp_avg_sqs)),
                    steps,
                    float(group["lr"]),
                    beta1,
                    beta2,
                    group["eps"],
                    group["weight_decay"],
                )
            )
        max_grad_norm = -1.0 if self.max_grad_norm is None else self.max_grad_norm
        norm = adam(groups, self._decoupled_weight_decay, max_grad_norm)
        self._grad_norm = None if self.max_grad_norm is None else norm
        return loss


class AdamW(Adam):
    """`torch.optim.AdamW` that also clips the gradients: decoupled weight decay.

    The arguments are those of `Adam`; the weight decay is 0.01 unless given.
    """

    _decoupled_weight_decay = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, max_grad_norm)


class Fp32Muon(torch.optim.Muon):
    """`torch.optim.Muon` with its matrix products in fp32, for CPUs that only emulate bf16.

    The arguments and state dicts are the same, except that `adjust_lr_fn` stays its default.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update. `closure`, if given, recomputes the loss, which is then returned."""
        loss = _loss_of(closure)
        for group in self.param_groups:
            momentum = group["momentum"]
            for param in group["params"]:
                grad = param.grad
                if grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(grad)
                buffer = state["momentum_buffer"].lerp_(grad, 1 - momentum)
                update = grad.lerp(buffer, momentum) if group["nesterov"] else buffer
                update = _orthogonalized(
                    update.float(), group["ns_coefficients"], group["ns_steps"], group["eps"]
                )
                rows, columns = param.shape
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)
        return loss


def _orthogonalized(
    matrix: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """Newton-Schulz iterations, which bring the singular values close to 1."""
    a, b, c = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x
