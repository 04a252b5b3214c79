import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastllm
from fastllm import DecoderModel
from fastllm.optim import Adam


def make_model(**settings) -> DecoderModel:
    torch.manual_seed(0)
    quiet = {"embedding_dropout_p": 0.0, "attn_dropout_p": 0.0, "mlp_dropout_p": 0.0}
    return DecoderModel(11, 16, 2, 2, 12, **{**quiet, **settings})


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 11, (3, 12), generator=torch.Generator().manual_seed(1))


def test_parts_and_state_dict() -> None:
    model = make_model(padding_idx=10)
    assert isinstance(model.transformer_blocks, nn.ModuleList)
    assert model.padding_idx == model.embedding_layer.padding_idx == 10
    keys = list(model.state_dict())
    assert keys[:2] == [
        "embedding_layer.token_embeddings.weight",
        "embedding_layer.positional_encoding.pe",
    ]
    assert "transformer_blocks.1.self_attn.qkv_proj.weight" in keys
    assert "transformer_blocks.0.mlp.fc2.bias" in keys
    assert keys[-4:] == ["final_norm.weight", "final_norm.bias", "lm_head.weight", "lm_head.bias"]
    post = make_model(norm_first=False, lm_head_bias=False)
    assert post.final_norm is None
    assert post.lm_head.bias is None


def test_loss_scores_the_next_token(ids: Tensor) -> None:
    model = make_model()
    log_probabilities = model(ids).log_softmax(-1)
    by_hand = [-log_probabilities[b, t, ids[b, t + 1]].item() for b in range(3) for t in range(11)]
    assert model.loss(ids, ids).item() == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)


def test_padding_and_ignored_labels_are_not_scored(ids: Tensor) -> None:
    model = make_model(padding_idx=10)
    labels = ids.clone()
    labels[0, 5:] = 10
    labels[1, 2:4] = -100
    labels[2, 0] = -100  # never a target anyway
    targets = labels[:, 1:].masked_fill(labels[:, 1:] == 10, -100)
    expected = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), targets.flatten())
    assert torch.allclose(model.loss(ids, labels), expected)
    other = labels.masked_fill(labels == -100, -5)
    assert torch.allclose(model.loss(ids, other, ignore_index=-5), expected)


def test_nothing_to_score_is_not_a_number(ids: Tensor) -> None:
    model = make_model()
    assert model.loss(ids, torch.full_like(ids, -100)).isnan()
    assert model.loss(ids[:, :1], ids[:, :1]).isnan()


def test_wrong_input_is_refused(ids: Tensor) -> None:
    model = make_model()
    with pytest.raises(IndexError, match="Token id 11 is outside the vocabulary of 11"):
        model(ids.clone().fill_(11))
    wrong = ids.clone()
    wrong[1, 3] = -7
    with pytest.raises(IndexError, match="Token id -7"):
        model.loss(ids, wrong)
    with pytest.raises(ValueError, match="must have the same shape"):
        model.loss(ids, ids[:, 1:])
    with pytest.raises(ValueError, match="Sequence length 13 exceeds maximum sequence length 12"):
        model(torch.zeros(1, 13, dtype=torch.long))


def test_causal(ids: Tensor) -> None:
    model = make_model()
    changed = ids.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 11
    assert torch.allclose(model(ids)[:, :6], model(changed)[:, :6], atol=1e-6)
    open_ = make_model(is_causal=False)
    assert not torch.allclose(open_(ids)[:, :6], open_(changed)[:, :6], atol=1e-6)


@pytest.mark.parametrize("learned", [False, True], ids=["sinusoidal", "learned"])
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre", "post"])
def test_caches_give_what_the_whole_sequence_gives(
    ids: Tensor, learned: bool, norm_first: bool
) -> None:
    model = make_model(pos_encoding_learned=learned, norm_first=norm_first).eval()
    caches = model.new_caches()
    pieces = [model(ids[:, a:b], caches=caches) for a, b in ((0, 5), (5, 6), (6, 12))]
    assert torch.allclose(torch.cat(pieces, 1), model(ids), atol=1e-5)
    with pytest.raises(ValueError, match="Sequence length 13 exceeds"):
        model(ids[:, :1], caches=caches)


def test_gradient_checkpointing_changes_nothing(ids: Tensor) -> None:
    grads = []
    for checkpointing in (False, True):
        model = make_model(attn_dropout_p=0.2, mlp_dropout_p=0.2, embedding_dropout_p=0.2)
        model.gradient_checkpointing = checkpointing
        torch.manual_seed(5)
        model.loss(ids, ids).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def learn(sequences: Tensor, steps: int = 150) -> float:
    """Loss on the sequences after training on them."""
    torch.manual_seed(0)
    model = DecoderModel(
        8, 32, 2, 2, 16, embedding_dropout_p=0.0, attn_dropout_p=0.0, mlp_dropout_p=0.0
    )
    optimizer = Adam(model.parameters(), lr=3e-3, max_grad_norm=1.0)
    for step in range(steps):
        batch = sequences[step % len(sequences)]
        loss = model.loss(batch, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    batch = sequences[-1]
    return model.eval().loss(batch, batch).item()


def test_a_periodic_text_is_learnt_and_a_random_one_is_not() -> None:
    """A model that copies its input would do well on both."""
    generator = torch.Generator().manual_seed(3)
    starts = torch.randint(0, 8, (150, 16, 1), generator=generator)
    periodic = (starts + torch.arange(16)) % 8
    assert learn(periodic) < 0.05
    noise = torch.randint(0, 8, (150, 16, 16), generator=generator)
    assert learn(noise) > 0.95 * torch.tensor(8.0).log().item()


def halved(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    return output / 2


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize(
    "name",
    [
        "embedding_layer",
        "embedding_layer.token_embeddings",
        "embedding_layer.positional_encoding.dropout",
        "transformer_blocks.0",
        "transformer_blocks.0.norm1",
        "transformer_blocks.1.self_attn",
        "transformer_blocks.1.self_attn.qkv_proj",
        "transformer_blocks.1.self_attn.dropout",
        "transformer_blocks.0.mlp.activation",
        "transformer_blocks.0.mlp.fc2",
        "final_norm",
        "lm_head",
        "",
    ],
)
def test_attachments_are_honoured(name: str, ids: Tensor) -> None:
    """Forward hooks, backward hooks, a `forward` patched on the instance, a replaced module."""
    plain = make_model().loss(ids, ids)

    hooked = make_model()
    hooked.get_submodule(name).register_forward_hook(halved)
    assert not torch.equal(hooked.loss(ids, ids), plain)

    seen: list[str] = []
    watched = make_model()
    watched.get_submodule(name).register_full_backward_hook(lambda *_: seen.append(name))
    watched.loss(ids, ids).backward()
    assert seen == [name]

    patched = make_model()
    module = patched.get_submodule(name)
    original = module.forward
    module.forward = lambda *args, **kwargs: original(*args, **kwargs) / 2  # type: ignore[method-assign]
    assert not torch.equal(patched.loss(ids, ids), plain)

    if name:
        exchanged = make_model()
        exchanged.set_submodule(name, Halved(exchanged.get_submodule(name)))
        assert not torch.equal(exchanged.loss(ids, ids), plain)


class Halved(nn.Module):
    """Like a LoRA layer, it holds the module that it replaces."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, *args, **kwargs) -> Tensor:
        return self.base(*args, **kwargs) / 2


def test_class_patch_parametrization_and_subclass_are_honoured(
    ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make_model().loss(ids, ids)

    parametrized = make_model()
    nn.utils.parametrizations.weight_norm(parametrized.transformer_blocks[0].mlp.fc1)
    assert torch.allclose(parametrized.loss(ids, ids), plain, atol=1e-5)
    g = parametrized.transformer_blocks[0].mlp.fc1.parametrizations.weight.original0
    g.data *= 2
    assert not torch.equal(parametrized.loss(ids, ids), plain)

    class Twice(DecoderModel):
        def forward(self, *args, **kwargs):
            return 2 * super().forward(*args, **kwargs)

    twice = make_model()
    twice.__class__ = Twice
    assert not torch.equal(twice.loss(ids, ids), plain)

    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x @ self.weight.t())
    without_bias = make_model()
    without_bias.lm_head.bias.data += torch.arange(11.0)
    assert torch.allclose(without_bias.loss(ids, ids), make_model().loss(ids, ids))


def test_autocast_is_honoured(ids: Tensor) -> None:
    model = make_model()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(ids).dtype == torch.bfloat16


def test_torch_func(ids: Tensor) -> None:
    model = make_model()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    loss = model.loss(ids, ids)
    loss.backward()

    def functional_loss(parameters: dict[str, Tensor]) -> Tensor:
        logits = torch.func.functional_call(model, parameters, (ids,))[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    grads = torch.func.grad(functional_loss)(parameters)
    assert torch.allclose(grads["lm_head.weight"], model.lm_head.weight.grad, atol=1e-6)

    def sample_loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, parameters, (sample[None],))[0, :-1]
        return F.cross_entropy(logits, sample[1:])

    per_sample = torch.func.vmap(torch.func.grad(sample_loss), (None, 0))(parameters, ids)
    assert torch.allclose(per_sample["lm_head.weight"].mean(0), grads["lm_head.weight"], atol=1e-6)


def test_copies_pickles_and_state_dicts_give_the_same_model(ids: Tensor) -> None:
    model = make_model()
    expected = model(ids)
    assert torch.equal(copy.deepcopy(model)(ids), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids), expected)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = DecoderModel(11, 16, 2, 2, 12).eval()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(ids), expected)


def make_tied(**settings) -> DecoderModel:
    return make_model(tie_word_embeddings=True, lm_head_bias=False, **settings)


def remade(model: DecoderModel) -> DecoderModel:
    """The model with its parameters recreated by `to_empty`."""
    state = copy.deepcopy(model.state_dict())
    model.to_empty(device="cpu").load_state_dict(state)
    return model


def assigned(model: DecoderModel) -> DecoderModel:
    other = make_tied()
    other.load_state_dict(model.state_dict(), assign=True)
    return other


def on_meta_first(model: DecoderModel) -> DecoderModel:
    with torch.device("meta"):
        other = make_tied()
    other.to_empty(device="cpu").load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize(
    "carry",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: model.double().float(),
        lambda model: nn.Sequential(model).to(torch.float32)[0],
        remade,
        assigned,
        on_meta_first,
    ],
    ids="copy pickle dtype parent to_empty assign meta".split(),
)
def test_a_tied_weight_stays_one(carry, ids: Tensor) -> None:
    model = make_tied()
    expected = model(ids).detach().clone()
    count = sum(p.numel() for p in make_model(lm_head_bias=False).parameters())
    other = carry(model)
    assert other.tie_word_embeddings
    assert other.lm_head.weight is other.embedding_layer.token_embeddings.weight
    assert sum(p.numel() for p in other.parameters()) == count - 11 * 16
    assert all(p.requires_grad for p in other.parameters())
    assert torch.equal(other(ids), expected)
    optimizer = Adam(other.parameters(), lr=0.1)
    other.loss(ids, ids).backward()
    optimizer.step()
    assert other.lm_head.weight is other.embedding_layer.token_embeddings.weight


def test_a_head_in_place_of_the_tied_one_is_left_alone() -> None:
    model = make_tied()
    model.lm_head = nn.Linear(16, 11)
    assert not model.tie_word_embeddings
    assert model.double().lm_head.weight is not model.embedding_layer.token_embeddings.weight
    model.lm_head = nn.Identity()
    assert not model.float().tie_word_embeddings


def test_state_dicts_of_tied_and_untied_models(ids: Tensor) -> None:
    tied, untied = make_tied(), make_model(lm_head_bias=False)
    embeddings, head = "embedding_layer.token_embeddings.weight", "lm_head.weight"
    separate = copy.deepcopy(untied.state_dict())
    untied.load_state_dict(tied.state_dict())
    assert torch.equal(untied(ids), tied(ids))
    again = make_tied()
    with torch.no_grad():
        again.lm_head.weight.fill_(7.0)
    again.load_state_dict(untied.state_dict())  # both are there, and equal
    assert torch.equal(again(ids), tied(ids))
    for name in (embeddings, head):
        once = {key: value for key, value in separate.items() if key != name}
        again.load_state_dict(once)
        assert torch.equal(
            again.lm_head.weight, separate[head if name == embeddings else embeddings]
        )
    with pytest.raises(RuntimeError, match=f"'{embeddings}' and '{head}' differ, but the model"):
        again.load_state_dict(separate)
    with pytest.raises(RuntimeError, match=f"Missing key.*{head}"):
        again.load_state_dict({})


@pytest.mark.parametrize("sequences", [3, 24], ids=["by-operation", "whole"])
def test_tied_padding_row_starts_at_zero_and_is_trained_by_the_head(sequences: int) -> None:
    """As in autograd: the row gets no gradient from the embedding, but one from the head."""
    model = make_tied(padding_idx=10)
    assert not model.lm_head.weight[10].any()
    ids = torch.randint(0, 11, (sequences, 12))
    grads = []
    for implementation in ("auto", "ref"):
        with fastllm.use(implementation):
            grads += torch.autograd.grad(model.loss(ids, ids), model.lm_head.weight)
    assert torch.allclose(*grads, atol=1e-6)
    assert grads[0][10].any()


@pytest.mark.compile
def test_compiled_model_gives_the_same_loss_and_gradients(ids: Tensor) -> None:
    losses, grads = [], []
    for compile_ in (False, True):
        model = make_model(mlp_dropout_p=0.1)
        logits = torch.compile(model, backend="aot_eager") if compile_ else model
        torch.manual_seed(4)
        loss = F.cross_entropy(logits(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        losses.append(loss.item())
        grads.append(model.transformer_blocks[0].mlp.fc1.weight.grad)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert torch.allclose(*grads, atol=1e-6)


def test_manual_seed_repeats_dropout(ids: Tensor) -> None:
    model = make_model(attn_dropout_p=0.3, mlp_dropout_p=0.3, embedding_dropout_p=0.3)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model.loss(ids, ids).item())
    assert losses[0] == losses[1] != losses[2]


def test_meta_and_other_dtypes() -> None:
    with torch.device("meta"):
        model = DecoderModel(11, 16, 1, 2)
        assert model(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, 11)
    assert all(t.is_meta for t in model.state_dict().values())
    double = DecoderModel(11, 16, 1, 2, dtype=torch.float64)
    assert double(torch.tensor([[1, 2]])).dtype == torch.float64
