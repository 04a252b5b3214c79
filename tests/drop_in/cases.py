"""Modules as users drop them into their own code, each with an input, and the reference results."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fastllm
from fastllm import MLP, DecoderModel, MultiHeadAttention, TransformerBlock
from fastllm.ops import extension
from tests.conftest import assert_as_accurate


class Kind(NamedTuple):
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of the input: hidden states, or ids [B, S]
    kernels: set[str]  # called by a training step


def model() -> DecoderModel:
    return DecoderModel(11, 16, 2, 2, 12, 24, pos_encoding_learned=True, padding_idx=3)


KINDS = {
    "mlp": Kind(lambda: MLP(16, 24), (2, 5, 16), {"mlp_fwd", "mlp_bwd"}),
    "attention": Kind(
        lambda: MultiHeadAttention(16, 2, bias=True, is_causal=True),
        (2, 5, 16),
        {"multi_head_attention_fwd", "multi_head_attention_bwd"},
    ),
    "block": Kind(
        lambda: TransformerBlock(16, 2, 24, norm_first=False),
        (2, 5, 16),
        {"mlp_fwd", "mlp_bwd", "multi_head_attention_fwd", "multi_head_attention_bwd"},
    ),
    # The whole model runs as one operation with 24 sequences, but not with 3.
    "model-whole": Kind(model, (24, 12), {"decoder_loss"}),
    "model-by-operation": Kind(
        model,
        (3, 12),
        {
            "embedding_fwd",
            "embedding_bwd",
            "mlp_fwd",
            "mlp_bwd",
            "multi_head_attention_fwd",
            "multi_head_attention_bwd",
            "norm_fwd",
            "norm_bwd",
            "linear_cross_entropy",
        },
    ),
}
MODELS = ["model-whole", "model-by-operation"]
LAYERS = [name for name in KINDS if name not in MODELS]
each_kind = pytest.mark.parametrize("kind", KINDS)
each_model = pytest.mark.parametrize("kind", MODELS)
each_layer = pytest.mark.parametrize("kind", LAYERS)


class Case:
    """A module with dropout and its input, with the same values for every dtype."""

    def __init__(self, kind: str, dtype: torch.dtype = torch.float32) -> None:
        build, shape, self.kernels = KINDS[kind]
        torch.manual_seed(0)
        self.module = build()
        with torch.no_grad():  # zeros and ones would hide mistakes
            for parameter in self.module.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        self.module.to(dtype)
        self.is_model = len(shape) == 2
        if self.is_model:
            self.x = torch.randint(0, 11, shape)
        else:
            self.x = torch.randn(shape).to(dtype).requires_grad_()

    def loss(self, seed: int = 0, module: Callable[..., Tensor] | None = None) -> Tensor:
        """A scalar; the seed fixes the dropout masks."""
        torch.manual_seed(seed)
        if isinstance(self.module, DecoderModel):
            return self.module.loss(self.x, self.x)
        run = self.module if module is None else module
        return run(self.x).square().mean()

    def grads(self) -> dict[str, Tensor | None]:
        grads = {name: p.grad for name, p in self.module.named_parameters()}
        return grads if self.is_model else {**grads, "input": self.x.grad}


Scenario = Callable[[Case], dict[str, Tensor | None]]


def assert_like_reference(kind: str, scenario: Scenario, calls: "Calls") -> None:
    """The kernels run by default and match the reference."""
    results = []
    for implementation, dtype in (
        ("auto", torch.float32),
        ("ref", torch.float32),
        ("ref", torch.float64),
    ):
        case = Case(kind, dtype)
        calls.clear()
        with fastllm.use(implementation):
            results.append(scenario(case))
        assert calls.names() == (case.kernels if implementation == "auto" else set())
    actual, plain, oracle = results
    assert list(actual) == list(oracle)
    for name, expected in oracle.items():
        tensors = actual[name], plain[name]
        if expected is None:
            assert tensors == (None, None), name
        else:
            assert tensors[0] is not None and tensors[1] is not None, name
            assert_as_accurate(tensors[0], tensors[1], expected, name)


class Calls(list[tuple[str, dict[str, Any]]]):
    """Name and arguments of every kernel call, and of every record for one, since `clear`."""

    def names(self) -> set[str]:
        """The kernels alone; records and other classes are capitalised."""
        return {name for name, _ in self if name.islower()}

    def grad_addresses(self) -> list[int]:
        """Where kernels were told to write gradients; they compute no others."""
        addresses = []
        for name, fields in self:
            if name in ("LinearGrad", "NormGrad"):
                addresses += [fields["weight"], fields["bias"]]
            elif name == "decoder_loss":
                addresses += fields["grads"] or []
            elif name.islower():
                written = {"grad_x", "grad_q", "grad_k", "grad_v", "grad_weight", "grad_positions"}
                addresses += [fields[field] for field in written.intersection(fields)]
        return [address for address in addresses if address]

    def saved_addresses(self) -> list[int]:
        """Where kernels were told to save something for the backward."""
        addresses = []
        for name, fields in self:
            if name in ("ResidualSaved", "HeadNormSaved"):
                addresses += fields.values()
            elif name == "MlpSaved":  # qkv and attn_out of attention are its workspace as well
                addresses += [fields["hidden"], fields["up"]]
        return [address for address in addresses if address]


class Spy:
    """Replaces the extension and records the calls."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self.kernels = extension.kernels

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.kernels, name)
        if name in ("isa", "set_isa", "native_bf16"):  # these compute nothing
            return function

        def call(*arguments: Any, **fields: Any) -> Any:
            self.calls.append((name, fields))
            return function(*arguments, **fields)

        return call
