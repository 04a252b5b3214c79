"""Inputs and parameters of every sort: what the kernels accept, and why they decline the rest."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastllm
from fastllm import MLP, DecoderModel, MultiHeadAttention, TransformerBlock
from fastllm.models import decoder
from fastllm.ops import (
    LAYER_BY_LAYER,
    OPERATIONS,
    WHOLE_MODEL,
    dispatch,
    implementation_line,
    implementations,
)
from fastllm.ops.decoder import Decoder, Dropout
from tests.conftest import needs_extension
from tests.drop_in.cases import (
    Calls,
    Case,
    assert_like_reference,
    each_kind,
    each_layer,
    each_model,
)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_fall_to_the_reference(kind: str, dtype: torch.dtype, calls: Calls) -> None:
    results = []
    for implementation in ("auto", "ref"):
        case = Case(kind, dtype)
        with fastllm.use(implementation):
            case.loss().backward()
        results.append(case.grads())
    assert not calls
    for name, grad in results[1].items():
        assert torch.equal(results[0][name], grad), name  # type: ignore[arg-type]
    with (
        fastllm.use("cpu"),
        pytest.raises(RuntimeError, match=f"'cpu' was requested.*{dtype}.*compute in"),
    ):
        Case(kind, dtype).loss()


@each_layer
def test_meta_tensors_fall_to_the_reference(kind: str, calls: Calls) -> None:
    case = Case(kind)
    case.module.to("meta")
    out = case.module(case.x.to("meta"))
    assert out.is_meta and out.shape == case.x.shape
    assert not calls


@each_kind
def test_parameters_that_are_not_contiguous(kind: str, calls: Calls) -> None:
    def scenario(case: Case) -> dict[str, Tensor | None]:
        if kind == "model-whole":  # the fused model declines; its operations make copies
            case.kernels = Case("model-by-operation").kernels
        for parameter in case.module.parameters():
            if parameter.ndim == 2:
                parameter.data = parameter.data.t().contiguous().t()
                assert not parameter.is_contiguous()
        case.loss().backward()
        return case.grads()

    assert_like_reference(kind, scenario, calls)


@each_layer
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x[:, ::2],
        lambda x: x[:1].expand(3, -1, -1),
        lambda x: x[:, :1],
        lambda x: x.flip(1),
    ],
    ids=["transposed", "strided", "expanded", "one-position", "flipped"],
)
def test_strides_of_the_input(kind: str, change: Callable[[Tensor], Tensor], calls: Calls) -> None:
    def scenario(case: Case) -> dict[str, Tensor | None]:
        case.loss(module=lambda x: case.module(change(x))).backward()
        return case.grads()

    assert_like_reference(kind, scenario, calls)


@each_layer
def test_strides_of_the_gradient(kind: str, calls: Calls) -> None:
    def scenario(case: Case) -> dict[str, Tensor | None]:
        torch.manual_seed(0)
        out = case.module(case.x)
        grad = torch.randn(16, 5, 2).to(out).permute(2, 1, 0)
        assert not grad.is_contiguous()
        out.backward(grad)
        return case.grads()

    assert_like_reference(kind, scenario, calls)


@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 1, 4, 16)], ids=str)
def test_mlp_takes_any_leading_dimensions(shape: tuple[int, ...], calls: Calls) -> None:
    def scenario(case: Case) -> dict[str, Tensor | None]:
        case.x = case.x.detach().flatten()[: torch.Size(shape).numel()].view(shape)
        case.x.requires_grad_()
        case.loss().backward()
        return case.grads()

    assert_like_reference("mlp", scenario, calls)


@each_layer
@pytest.mark.parametrize("shape", [(0, 5, 16), (2, 0, 16)], ids=str)
def test_nothing_in_nothing_out(kind: str, shape: tuple[int, ...], calls: Calls) -> None:
    case = Case(kind)
    x = torch.empty(shape, requires_grad=True)
    out = case.module(x)
    assert out.shape == shape
    out.sum().backward()
    assert calls.names() <= {"dropout"}
    assert x.grad is not None and x.grad.shape == shape
    for parameter in case.module.parameters():
        assert parameter.grad is None or not parameter.grad.any()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=str)
def test_a_model_of_nothing(shape: tuple[int, int]) -> None:
    case = Case("model-by-operation")
    ids = torch.zeros(shape, dtype=torch.long)
    assert case.module(ids).shape == (*shape, 11)
    assert case.module.loss(ids, ids).isnan()


@pytest.mark.parametrize("sequences", [2, 300], ids=["by-operation", "whole"])
def test_one_position_has_nothing_to_predict(sequences: int, calls: Calls) -> None:
    case = Case("model-whole")
    ids = torch.zeros(sequences, 1, dtype=torch.long)
    loss = case.module.loss(ids, ids)
    assert ("decoder_loss" in calls.names()) == (sequences == 300)
    assert loss.isnan()
    loss.backward()
    with fastllm.use("ref"):
        other = Case("model-whole")
        other.module.loss(ids, ids).backward()
    for name, grad in other.grads().items():
        assert torch.equal(case.grads()[name], grad), name  # type: ignore[arg-type]


@each_model
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_ids_and_labels_of_other_integers(kind: str, dtype: torch.dtype, calls: Calls) -> None:
    expected = Case(kind).loss()
    case = Case(kind)
    case.x = case.x.to(dtype)
    calls.clear()
    assert torch.equal(case.loss(), expected)
    assert calls.names() & {"decoder_loss", "embedding_fwd"}


@each_model
@pytest.mark.parametrize("change", [lambda ids: ids + 0.5, lambda ids: ids > 3])
def test_ids_must_be_integers(kind: str, change: Callable[[Tensor], Tensor], calls: Calls) -> None:
    """As in plain PyTorch; fractions are not truncated silently."""
    case = Case(kind)
    for ids, labels in ((change(case.x), case.x), (case.x, change(case.x))):
        with pytest.raises(RuntimeError, match="dtype|scalar types"):
            case.module.loss(ids, labels)


@each_model
@pytest.mark.parametrize("wrong", [-1, 11, 2**40, -(2**62)])
def test_ids_out_of_range_are_named_before_anything_is_computed(
    kind: str, wrong: int, calls: Calls
) -> None:
    case = Case(kind)
    outside = case.x.clone()
    outside[1, 5] = wrong
    with pytest.raises(IndexError, match=f"Token id {wrong} is outside the vocabulary of 11"):
        case.module.loss(outside, case.x)
    assert calls.names() <= {"decoder_loss"}  # it checks the ids first
    with pytest.raises(IndexError, match=f"Token id {wrong} is outside the vocabulary of 11"):
        case.module.loss(case.x, outside)
    assert "linear_cross_entropy" not in calls.names()
    first = case.x.clone()
    first[:, 0] = wrong  # the first label is not a target
    assert torch.equal(case.module.eval().loss(case.x, first), case.loss())


@each_model
def test_sequences_may_not_be_longer_than_the_model(kind: str, calls: Calls) -> None:
    case = Case(kind)
    ids = torch.zeros(len(case.x), 13, dtype=torch.long)
    with pytest.raises(ValueError, match="Sequence length 13 exceeds maximum sequence length 12"):
        case.module.loss(ids, ids)
    assert not calls


@each_model
def test_ids_and_labels_on_another_device_are_not_read(kind: str, calls: Calls) -> None:
    """Meta tensors have no address; PyTorch decides which error to raise."""
    case = Case(kind)
    with pytest.raises((RuntimeError, NotImplementedError)):
        case.module.loss(case.x, case.x.to("meta"))
    assert "decoder_loss" not in calls.names()


def shortened(*names: str) -> Callable[[nn.Module], None]:
    def change(module: nn.Module) -> None:
        for name in names:
            owner = module.get_submodule(name.rpartition(".")[0])
            parameter = module.get_parameter(name)
            setattr(owner, name.rpartition(".")[2], nn.Parameter(parameter[:3].clone()))

    return change


def exchanged(name: str, other: Callable[[], nn.Module]) -> Callable[[nn.Module], object]:
    return lambda module: module.set_submodule(name, other())


BLOCK = "transformer_blocks.1"


@pytest.mark.parametrize(
    "change",
    [
        shortened("lm_head.bias"),
        shortened("final_norm.weight", "final_norm.bias"),
        shortened("final_norm.bias"),
        *[
            shortened(f"{BLOCK}.{name}")
            for name in (
                "norm1.weight",
                "norm2.bias",
                "self_attn.qkv_proj.bias",
                "self_attn.out_proj.bias",
                "mlp.fc1.bias",
                "mlp.fc2.bias",
                "self_attn.qkv_proj.weight",
                "mlp.fc1.weight",
            )
        ],
        exchanged("lm_head", lambda: nn.Linear(8, 11)),
        exchanged(f"{BLOCK}.mlp.fc1", lambda: nn.Linear(16, 20)),
        exchanged(f"{BLOCK}.mlp.fc2", lambda: nn.Linear(24, 17)),
        exchanged(f"{BLOCK}.self_attn.out_proj", lambda: nn.Linear(8, 16)),
        exchanged("embedding_layer.token_embeddings", lambda: nn.Embedding(11, 8, padding_idx=3)),
        exchanged("embedding_layer.positional_encoding.pos_embedding", lambda: nn.Embedding(12, 8)),
        exchanged("embedding_layer.positional_encoding.pos_embedding", lambda: nn.Embedding(5, 16)),
        lambda module: setattr(module.transformer_blocks[0].self_attn, "num_heads", 3),
    ],
)
@each_model
def test_sizes_that_do_not_fit_are_refused_before_memory_is_read(
    kind: str, change: Callable[[nn.Module], None]
) -> None:
    """The kernels see only addresses and would read and write out of bounds."""
    case = Case(kind)
    change(case.module)
    with pytest.raises((RuntimeError, ValueError), match="(?i)size|shape|fit|divisible"):
        case.loss()


@pytest.mark.parametrize("vocabulary", [9, 20])
@each_model
def test_head_and_embedding_may_know_different_numbers_of_tokens(
    kind: str, vocabulary: int, calls: Calls
) -> None:
    def scenario(case: Case) -> dict[str, Tensor | None]:
        torch.manual_seed(3)
        case.module.lm_head = nn.Linear(16, vocabulary).to(case.module.lm_head.weight)
        case.x = case.x.clamp(max=8)
        case.loss().backward()
        return case.grads()

    assert_like_reference(kind, scenario, calls)


class Scaled(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize(
    "mlp",
    [
        lambda: MLP(16, activation=nn.Tanh()),
        lambda: MLP(16, activation=nn.LeakyReLU(0.2)),
        lambda: MLP(16, activation=nn.Sequential(nn.GELU(), nn.ReLU())),
        lambda: MLP(16, norm_type=lambda size, **kw: nn.RMSNorm(size)),
        lambda: MLP(16, norm_type=Scaled, norm_first=False),
        lambda: MLP(16, norm_type=lambda size, **kw: nn.LayerNorm((5, 16)), norm_first=False),
    ],
    ids=["tanh", "leaky-0.2", "sequential", "rms-of-any-eps", "subclass", "two-dimensions"],
)
def test_layers_unknown_to_the_kernels_go_through_the_modules(
    mlp: Callable[[], MLP], calls: Calls
) -> None:
    torch.manual_seed(0)
    module = mlp().eval()
    x = torch.randn(2, 5, 16)
    assert module.norm is not None
    inner = module.norm(x) if module.norm_first else x
    out = x + module.fc2(module.activation(module.fc1(inner)))
    expected = out if module.norm_first else module.norm(out)
    assert torch.equal(module(x), expected)
    assert not calls


def test_an_unknown_activation_in_a_block_leaves_the_attention_to_its_kernel(
    calls: Calls,
) -> None:
    block = TransformerBlock(16, 2, mlp_activation=nn.Tanh())
    block(torch.randn(2, 5, 16)).sum().backward()
    assert {"multi_head_attention_fwd", "multi_head_attention_bwd"} <= calls.names()
    assert "mlp_fwd" not in calls.names()


@pytest.mark.parametrize("activation", [nn.GELU("tanh"), nn.LeakyReLU(), nn.ReLU(inplace=True)])
def test_layers_known_to_the_kernels_are_fused(activation: nn.Module, calls: Calls) -> None:
    torch.manual_seed(0)
    module = MLP(16, activation=activation).eval()
    assert module.norm is not None
    x = torch.randn(2, 5, 16)
    out = module(x)
    assert calls.names() == {"mlp_fwd"}
    expected = x + module.fc2(activation(module.fc1(module.norm(x))))
    assert torch.allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize(
    "norm",
    [
        nn.RMSNorm,
        lambda size, **kw: nn.LayerNorm(size, bias=False, **kw),
        lambda size, **kw: nn.LayerNorm(size, elementwise_affine=False, **kw),
        lambda size, **kw: nn.RMSNorm(size, elementwise_affine=False, **kw),
    ],
    ids=["rms", "no-bias", "no-affine", "rms-no-affine"],
)
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre", "post"])
def test_norms_known_to_the_kernels_are_fused(
    norm: Callable[..., nn.Module], norm_first: bool, calls: Calls
) -> None:
    torch.manual_seed(0)
    module = MLP(16, norm_type=norm, norm_first=norm_first).eval()
    assert module.norm is not None
    x = torch.randn(2, 5, 16)
    out = module(x)
    assert calls.names() == {"mlp_fwd"}
    inner = module.fc2(module.activation(module.fc1(module.norm(x) if norm_first else x)))
    expected = x + inner if norm_first else module.norm(x + inner)
    assert torch.allclose(out, expected, atol=1e-6)


@needs_extension
def test_implementations_say_what_runs_and_why_others_do_not() -> None:
    answer = implementations()
    assert set(answer) == set(OPERATIONS)
    for operation, table in answer.items():
        last = LAYER_BY_LAYER if operation in WHOLE_MODEL else "ref"
        # The kernel of the whole attention rotates.
        cpu = [] if operation == "rope" else ["cpu"]
        states = [table[name] for name in (*cpu, last)]
        assert states == ["chosen", "available"][: len(states)]
        triton = [] if operation in ("sampling", *WHOLE_MODEL) else ["triton"]
        assert list(table) == [*cpu, *triton, last]
    with fastllm.use("ref"):
        for operation, table in implementations().items():
            if operation in WHOLE_MODEL:
                expected = {"cpu": "'ref' was requested", LAYER_BY_LAYER: "chosen"}
                assert table == expected
            else:
                assert table["ref"] == "chosen"
                assert table.get("cpu", "available") == "available"


@needs_extension
def test_the_line_says_why_a_model_runs_layer_by_layer() -> None:
    model = DecoderModel(5000, 16, 1, 2, 12)
    ids = torch.zeros(24, 12, dtype=torch.long)
    reason = model.why_not_fused_loss(ids)
    assert reason == "the logits of 5,000 tokens do not stay in the caches"
    line = implementation_line(declined={"decoder_loss": reason})
    assert line.startswith(f"decoder_loss: layer by layer ({reason}), decode: cpu, embedding: cpu")
    assert implementation_line().startswith("decoder_loss: cpu, ")
    assert "ref" not in implementation_line()


@needs_extension
@pytest.mark.parametrize(
    ("attach", "reason"),
    [
        (lambda m: m.lm_head.register_forward_hook(print), "lm_head is replaced, or something"),
        (lambda m: m.transformer_blocks[1].register_forward_hook(print), "to a transformer block"),
        (
            lambda m: m.transformer_blocks[1].mlp.fc1.register_forward_hook(print),
            "transformer_blocks.1 has a part unknown to the operations, or something is attac",
        ),
        (lambda m: setattr(m, "final_norm", torch.nn.Identity()), "final_norm is replaced"),
        (
            lambda m: m.embedding_layer.token_embeddings.register_forward_hook(print),
            "embedding_layer has a part unknown to the operations",
        ),
    ],
)
def test_the_reason_names_the_part_that_something_is_attached_to(
    attach: Callable[[DecoderModel], object], reason: str
) -> None:
    model = DecoderModel(11, 16, 2, 2, 12)
    ids = torch.zeros(24, 12, dtype=torch.long)
    assert model.why_not_fused_loss(ids) is None
    attach(model)
    assert reason in str(model.why_not_fused_loss(ids))


@needs_extension
def test_reasons_are_sentences_about_what_was_given() -> None:
    model = DecoderModel(11, 16, 1, 2, 12)
    ids = torch.zeros(24, 12, dtype=torch.long)
    whole = model.record(12)
    assert isinstance(whole, Decoder) and decoder.why_not(whole, ids, ids) is None
    assert "too few to share among threads" in str(decoder.why_not(whole, ids[:3], ids[:3]))
    assert "not integers" in str(decoder.why_not(whole, ids + 0.5, ids))
    dropped = whole._replace(embedding=whole.embedding._replace(dropout=Dropout(1.0)))
    assert "probability is outside [0, 1)" in str(decoder.why_not(dropped, ids, ids))
    with fastllm.use("ref"):
        assert "'ref' was requested" in str(decoder.why_not(whole, ids, ids))
    with torch.autocast("cpu", torch.float16):
        assert "autocast to torch.float16 is on" in str(decoder.why_not(whole, ids, ids))


@needs_extension
def test_asking_for_the_kernels_raises_with_the_reason_where_they_cannot_serve() -> None:
    attention = MultiHeadAttention(16, 2, p=1.0)
    with (
        fastllm.use("cpu"),
        pytest.raises(dispatch.ImplementationError, match=r"outside \[0, 1\); .*ref: can"),
    ):
        attention(torch.randn(2, 5, 16))
    with (
        fastllm.use("cpu"),
        pytest.raises(dispatch.ImplementationError, match="cannot run 'mlp' .*x is empty"),
    ):
        MLP(16)(torch.empty(0, 16))


@pytest.mark.parametrize("kind", ["attention", "block"])
def test_a_mask_changed_before_the_backward_is_noticed(kind: str) -> None:
    """As in plain PyTorch: the backward reads the mask again."""
    case = Case(kind)
    mask = torch.rand(5, 5) < 0.3
    out = case.module(case.x, mask)
    mask.logical_not_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("kind", ["attention", "block"])
def test_masks_of_every_shape(kind: str, calls: Calls) -> None:
    """Every combination that broadcasts to [B, N, S, S]; one row is fully masked."""

    def scenario(case: Case) -> dict[str, Tensor | None]:
        generator = torch.Generator().manual_seed(4)
        for shape in [(5,), (5, 5), (1, 1, 5), (2, 1, 1, 5), (2, 2, 5, 5)]:
            mask = torch.rand(shape, generator=generator) < 0.4
            if len(shape) == 4 and shape[2] == 5:
                mask[0, 0, 2] = True
            case.loss(module=lambda x, mask=mask: case.module(x, mask)).backward()
        return case.grads()

    assert_like_reference(kind, scenario, calls)
