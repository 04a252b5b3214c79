import copy
import gc
import math
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

import fastllm
from fastllm import DecoderModel, TransformerBlock
from fastllm.generation.decoding import ModuleDecoding, start_decoding
from fastllm.models.config import DecoderConfig
from fastllm.ops import decode, extension
from fastllm.ops.decode import (
    Decoding,
    PackedDecoder,
    round_input,
    round_linear_layers,
    round_to_int4,
    round_to_int8,
)
from fastllm.ops.decoder import Decoder
from tests.conftest import (
    BAD,
    assert_as_accurate,
    isa_in_use,
    needs_extension,
    use_rms_norms,
    use_swiglu,
)

MODELS = {
    "plain": {},
    "post": {"norm_first": False},
    "learned": {"pos_encoding_learned": True, "scale_embeddings": False},
    "tied": {"tie_word_embeddings": True, "lm_head_bias": False},
    "no-bias": {"qkv_bias": False, "mlp_bias": False, "lm_head_bias": False},
    "relu": {"mlp_activation": "relu", "norm_first": False, "qkv_bias": False},
    "gelu_tanh": {"mlp_activation": "gelu_tanh"},
    "silu": {"mlp_activation": "silu"},
    "leaky_relu": {"mlp_activation": "leaky_relu"},
}
INTEGERS = ("int8", "int4")
PRECISIONS = ("fp32", "bf16", *INTEGERS)
REPLACE = {"rms": use_rms_norms, "swiglu": use_swiglu}
# V, N, D, I, L: sizes with and without a partial last vector
SIZES = {
    "odd": (67, 3, 7, 29, 2),
    "even": (66, 2, 32, 128, 2),
    "one": (1, 1, 1, 1, 1),
    "long": (300, 2, 48, 2100, 1),
    "no-layers": (20, 1, 8, 8, 0),
}
# The number of tokens that each of three sequences gets in each step: prompts of unequal lengths,
# single tokens, several after a prefix, none.
STEPS = [(5, 1, 33), (1, 1, 1), (1, 0, 1), (3, 30, 2), (1, 1, 1)]


def make_model(size: str = "odd", kind: str = "plain") -> DecoderModel:
    V, N, D, I, L = SIZES[size]
    torch.manual_seed(0)
    model = DecoderModel(V, N * D, L, N, 40, I, **MODELS.get(kind, {}))  # type: ignore[arg-type]
    if kind in REPLACE:
        REPLACE[kind](model)
    model.eval()
    with torch.no_grad():  # zeros and ones would hide mistakes
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def make_ids(model: DecoderModel) -> Tensor:
    return torch.randint(0, model.vocab_size, (3, 40), generator=torch.Generator().manual_seed(1))


def start(model: DecoderModel, batch_size: int = 3, precision: str = "fp32") -> Decoding:
    return Decoding(PackedDecoder(record(model), precision), batch_size)


def record(model: DecoderModel) -> Decoder:
    decoder = model.record(model.max_seq_len)
    assert isinstance(decoder, Decoder), decoder
    return decoder


def decoded(
    decoding: Decoding | ModuleDecoding, ids: Tensor, steps: Sequence[Sequence[int]] = STEPS
) -> Tensor:
    """Logits of every step, [steps, B, V]."""
    results = []
    for counts in steps:
        lengths = decoding.lengths
        ends = [length + count for length, count in zip(lengths, counts, strict=True)]
        tokens = [row[a:b].tolist() for row, a, b in zip(ids, lengths, ends, strict=True)]
        results.append(decoding.extend(tokens).clone())
        assert decoding.lengths == ends
    return torch.stack(results)


@torch.no_grad()
def recomputed(model: DecoderModel, ids: Tensor) -> Tensor:
    """The same logits from the reference, recomputed from the start at every step."""
    lengths = torch.tensor(STEPS).cumsum(0)
    with fastllm.use("ref"):
        rows = [
            model(ids[b : b + 1, :length])[0, -1].to(next(model.parameters()).dtype)
            for step in lengths
            for b, length in enumerate(step)
        ]
    return torch.stack(rows).view(len(STEPS), len(ids), -1)


def assert_parity(model: DecoderModel, precision: str = "fp32") -> None:
    ids = make_ids(model)
    actual = decoded(start(model, precision=precision), ids)
    oracle = recomputed(copy.deepcopy(model).double(), ids)
    if precision in INTEGERS:
        model = copy.deepcopy(model)
        round_linear_layers(model, precision)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        plain = recomputed(model, ids)
    assert_as_accurate(actual, plain, oracle)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", SIZES)
def test_parity_of_sizes(isa: str, size: str, precision: str) -> None:
    assert_parity(make_model(size), precision)


@pytest.mark.parametrize("precision", ["fp32", *INTEGERS])
@pytest.mark.parametrize("kind", [*MODELS, *REPLACE])
def test_parity_of_models(isa: str, kind: str, precision: str) -> None:
    assert_parity(make_model(kind=kind), precision)


@pytest.mark.parametrize("inputs", [1, 7, 31, 32, 33, 64, 160])
@pytest.mark.parametrize("outputs", [1, 16, 33, 95])
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 7, 30])
def test_products_of_integers(isa: str, inputs: int, outputs: int, tokens: int) -> None:
    """Without layers, the head's input is known exactly, and only its sums are rounded."""
    torch.manual_seed(0)
    model = DecoderModel(outputs, inputs, 0, 1, 40, pos_encoding_learned=True, norm_first=False)
    model.eval()
    with torch.no_grad():
        model.lm_head.bias.normal_()
        model.lm_head.weight[0] = 0  # a row with scale 0, and one with a scale larger than all
        model.lm_head.weight[-1, -1] = 1000
    ids = torch.randint(0, outputs, (1, tokens))
    x = round_input(model.hidden_states(ids)[0].detach()).double()
    weight = round_to_int8(model.lm_head.weight.detach()).double()
    bias = model.lm_head.bias.detach().double()
    # The sum of fp32 products, each with an error of a few units in its last place.
    bound = 8 * 2**-24 * (x.abs() @ weight.abs().T + bias.abs())
    for precision in INTEGERS:  # the head has 8 bits in both
        actual = start(model, 1, precision).append({0: ids[0].tolist()}, every=True)
        assert ((actual - (x @ weight.T + bias)).abs() <= bound).all()


@needs_extension
@pytest.mark.parametrize("precision", INTEGERS)
def test_layers_of_integers_are_those_of_the_rounded_model(precision: str) -> None:
    """Nearly all logits: a value between two integers may be rounded to the other one."""
    model = make_model("even")
    ids = make_ids(model)
    actual = decoded(start(model, precision=precision), ids)
    round_linear_layers(model, precision)
    expected = recomputed(model, ids)
    scale = expected.abs().max()
    assert ((actual - expected).abs() < 0.02 * scale).all()
    assert ((actual - expected).abs() / scale).median() < 1e-3


@needs_extension
def test_a_row_of_zeros_and_one_weight_alone() -> None:
    """Rows with scale 0, and with a scale much larger than the others."""
    model = make_model()
    with torch.no_grad():
        for weight in (model.lm_head.weight, model.transformer_blocks[0].mlp.fc1.weight):
            weight[3] = 0
            weight[4, 5] = 1000
            weight[5] = 1e-40
    for precision in INTEGERS:
        assert_parity(model, precision)


@needs_extension
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bad", BAD)
def test_not_a_number_and_infinity_come_out(precision: str, bad: float) -> None:
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[3, 7] = bad
    logits = start(model, 1, precision).extend([[1, 2]])[0]
    assert not logits[3].isfinite()
    assert logits[:3].isfinite().all() and logits[4:].isfinite().all()


@needs_extension
def test_rounding_to_8_bits_is_by_half_a_step_at_most() -> None:
    weight = torch.randn(20, 33)
    step = weight.abs().amax(1, keepdim=True) / 127
    rounded = round_to_int8(weight)
    assert ((rounded - weight).abs() <= 0.501 * step).all()
    assert ((rounded / step).round() - rounded / step).abs().max() < 1e-4
    assert torch.equal(round_to_int8(torch.zeros(2, 3)), torch.zeros(2, 3))


@needs_extension
def test_rounding_to_4_bits_is_by_half_a_step_at_most() -> None:
    weight = torch.randn(20, 70)
    rounded = round_to_int4(weight)
    for group in (slice(0, 32), slice(32, 64), slice(64, 70)):
        low, high = weight[:, group].aminmax(dim=1, keepdim=True)
        # Half a step, and what rounding low and 15 steps to 8 bits of mantissa adds.
        bound = (high - low) / 15 / 2 + 2**-8 * (low.abs() + high - low)
        assert ((rounded - weight)[:, group].abs() <= bound).all()
    for same in (torch.zeros(2, 3), torch.full((2, 40), -0.5)):
        assert torch.equal(round_to_int4(same), same)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_same_bits(isa: str, threads: None, precision: str) -> None:
    """For any number of threads, and for a short prompt at once or token by token."""
    model = make_model("even")
    ids = make_ids(model)
    expected = None
    for count in (1, 2, 3, 4, 8):
        torch.set_num_threads(count)
        decoding = start(model, precision=precision)
        for _ in range(10):
            logits = decoded(decoding, ids)
            expected = logits if expected is None else expected
            assert torch.equal(logits, expected)
            for b in range(3):
                decoding.clear(b)
    one_by_one = decoded(start(model, precision=precision), ids, [(1, 1, 1)] * 36)
    assert torch.equal(
        one_by_one[35, 2], decoded(start(model, 1, precision), ids[2:], [(36,)])[0, 0]
    )


@needs_extension
def test_a_sequence_does_not_depend_on_the_others() -> None:
    model = make_model()
    ids = make_ids(model)
    together = decoded(start(model), ids)
    alone = decoded(start(model, 1), ids[:1], [counts[:1] for counts in STEPS])
    assert torch.equal(alone[:, 0], together[:, 0])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", ["odd", "even", "long"])
def test_rows_have_the_same_bits_in_every_batch(isa: str, size: str, precision: str) -> None:
    """Tiles of every height, more rows than one unit of work, and sequences that join and leave."""
    model = make_model(size)
    B, source = 130, torch.Generator().manual_seed(3)
    ids = torch.randint(0, model.vocab_size, (B, 12), generator=source).tolist()
    decoding, single = start(model, B, precision), start(model, 1, precision)
    alone = []  # for each sequence, its logits after a prompt of 5 tokens and each one more
    for row in ids:
        single.clear(0)
        steps = [row[:5], *([token] for token in row[5:])]
        alone.append([single.append({0: new})[0].clone() for new in steps])
    for members in (range(B), range(1), range(0, B, 9), range(3, 17), range(115), range(20, 43)):
        for b in members:
            decoding.clear(b)
        for step in range(8):
            # Some sequences get their prompts while others continue.
            tokens = {b: ids[b][:5] for b in members if step == b % 3}
            tokens |= {b: ids[b][step - b % 3 + 4 :][:1] for b in members if step > b % 3}
            if not tokens:
                continue
            logits = decoding.append(tokens)
            assert logits.shape == (len(tokens), model.vocab_size)
            for row, b in zip(logits, sorted(tokens), strict=True):
                assert torch.equal(row, alone[b][step - b % 3])


def test_a_row_for_every_token(isa: str) -> None:
    model = make_model()
    ids = make_ids(model)[:2].tolist()
    decoding, single = start(model), start(model, 1)
    decoding.append({2: ids[1][:3]})
    every = decoding.append({2: ids[1][3:9], 0: ids[0][:7]}, every=True)
    expected = []
    for row, first, count in ((ids[0], 0, 7), (ids[1], 3, 6)):
        single.clear(0)
        logits = [single.append({0: [token]})[0].clone() for token in row[: first + count]]
        expected += logits[first:]
    assert torch.equal(every, torch.stack(expected))
    with pytest.raises(IndexError, match="Token id 99 is outside"):
        decoding.append({0: [1], 1: [99]})
    with pytest.raises(ValueError, match="Sequence length 41 exceeds"):
        decoding.append({1: [1] * 41})
    assert decoding.lengths == [7, 0, 9]


@needs_extension
def test_a_cleared_sequence_starts_over() -> None:
    model = make_model()
    ids = make_ids(model)
    decoding = start(model)
    decoded(decoding, ids)
    decoding.clear(1)
    lengths = decoding.lengths
    assert lengths[1] == 0
    first = decoding.extend([[], ids[1, :5].tolist(), []])[1].clone()
    assert decoding.lengths == [lengths[0], 5, lengths[2]]
    assert torch.equal(first, start(model).extend([[], ids[1, :5].tolist(), []])[1])


@needs_extension
def test_bad_input_changes_nothing() -> None:
    model = make_model()
    decoding = start(model, 2)
    before = decoding.extend([[1, 2], [3]]).clone()
    for tokens, error, message in (
        ([[1], [67]], IndexError, "Token id 67 is outside the vocabulary of 67 tokens"),
        ([[-1], [1]], IndexError, "Token id -1 is outside"),
        ([[1], [1] * 40], ValueError, "Sequence length 41 exceeds maximum sequence length 40"),
        ([[1]], ValueError, "there are 2 sequences, got tokens for 1"),
    ):
        with pytest.raises(error, match=message):
            decoding.extend(tokens)
        assert decoding.lengths == [2, 1]
    for sequence in (2, -1):
        with pytest.raises(IndexError, match=f"there is no sequence {sequence} among 2"):
            decoding.clear(sequence)
    assert torch.equal(decoding.extend([[], []]), before)


@needs_extension
def test_threads_take_turns() -> None:
    """Every token gets its own position, whichever thread appends it."""
    model = make_model()
    decoding = start(model, 2)
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda _: decoding.extend([[1, 1], [1]]), range(20)):
            pass
    assert decoding.lengths == [40, 20]
    decoding.clear(0)
    again = decoding.extend([[2], [1]]).clone()
    assert torch.equal(again, start(model, 2).extend([[2], [1] * 21]))


@needs_extension
@pytest.mark.parametrize("precision", PRECISIONS)
def test_another_default_type_changes_nothing(precision: str) -> None:
    model = make_model()
    expected = start(model, precision=precision).extend([[1], [2], [3]])
    torch.set_default_dtype(torch.bfloat16)
    try:
        actual = start(model, precision=precision).extend([[1], [2], [3]])
    finally:
        torch.set_default_dtype(torch.float32)
    assert actual.dtype is torch.float32 and torch.equal(actual, expected)


@needs_extension
@pytest.mark.parametrize("kind", ["plain", "learned", "post"])
def test_later_changes_to_the_weights_have_no_effect(kind: str) -> None:
    """Except for the token embeddings, which are too large to be copied."""
    model = make_model(kind=kind)
    decoding, same = start(model), start(model)
    expected = same.extend([[1], [2], [3]])
    tokens = model.embedding_layer.token_embeddings.weight
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor is not tokens:
                tensor.fill_(math.nan)
    assert torch.equal(decoding.extend([[1], [2], [3]]), expected)


@needs_extension
def test_memory_that_the_model_gives_up_is_not_read() -> None:
    """Moving or converting a model frees its old memory, which is soon reused."""
    model = make_model("even")
    decoding, same = start(model), start(model)
    expected = same.extend([[1], [2], [3]])
    shapes = [tensor.shape for tensor in (*model.parameters(), *model.buffers())]
    model.double()
    others = [torch.full(shape, math.nan) for shape in shapes for _ in range(20)]
    assert torch.equal(decoding.extend([[1], [2], [3]]), expected)
    assert len(others) > 20


@needs_extension
def test_reasons() -> None:
    model = make_model()
    decoder = record(model)
    assert decode.why_not(decoder) is None
    with fastllm.use("ref"):
        assert "'ref' was requested" in str(decode.why_not(decoder))
    assert "torch.float16" in str(decode.why_not(record(copy.deepcopy(model).half())))
    assert "dropout is on" in str(decode.why_not(record(copy.deepcopy(model).train())))
    with isa_in_use("base"):
        assert decode.why_not(decoder) is None


def other_heads() -> DecoderModel:
    model = DecoderModel(67, 32, 2, 2)
    model.transformer_blocks[1] = TransformerBlock(32, 8, is_causal=True)
    return model


def post_after_pre(first: bool) -> DecoderModel:
    model = DecoderModel(67, 32, 2, 2, norm_first=not first)
    model.transformer_blocks[0] = TransformerBlock(32, 2, norm_first=first, is_causal=True)
    return model


def post_with_a_final_norm() -> DecoderModel:
    model = DecoderModel(67, 32, 2, 2, norm_first=False)
    model.final_norm = nn.LayerNorm(32)
    return model


@needs_extension
@pytest.mark.parametrize(
    "make",
    [
        other_heads,
        lambda: post_after_pre(True),
        lambda: post_after_pre(False),
        post_with_a_final_norm,
    ],
    ids=["heads", "pre-post", "post-pre", "final-norm"],
)
def test_layers_may_differ(make: Callable[[], DecoderModel]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    assert decode.why_not(record(model)) is None
    ids = make_ids(model)
    actual = decoded(start_decoding(model, 3), ids)
    plain = recomputed(model, ids)
    assert_as_accurate(actual, plain, recomputed(copy.deepcopy(model).double(), ids))


@needs_extension
@pytest.mark.parametrize("precision", PRECISIONS)
def test_packed_weights_are_not_kept(precision: str) -> None:
    """Only the token embeddings, which are read in place, outlive the model."""
    model = make_model("even")
    arrays = {}
    for name, parameter in model.named_parameters():
        array = parameter.detach().numpy().copy()
        arrays[name] = weakref.ref(array)  # alive as long as a tensor uses its memory
        parameter.data = torch.from_numpy(array)
        del array, parameter
    decoding = start_decoding(model, 2, precision=precision)
    expected = decoding.extend([[1], [2]]).clone()
    again = start_decoding(model, 2, precision=precision)
    del model
    gc.collect()
    alive = [name for name, array in arrays.items() if array() is not None]
    assert alive == ["embedding_layer.token_embeddings.weight"]
    assert torch.equal(again.extend([[1], [2]]), expected)


def changes() -> dict[str, Callable[[DecoderModel], object]]:
    @torch.no_grad()
    def in_place(model: DecoderModel) -> None:
        model.transformer_blocks[0].mlp.fc1.weight.mul_(1.5)

    def data(model: DecoderModel) -> None:
        model.transformer_blocks[0].mlp.fc1.weight.data.mul_(1.5)

    def one_row(model: DecoderModel) -> None:
        model.lm_head.weight.data[5] += 3

    def swapped_rows(model: DecoderModel) -> None:
        weight = model.transformer_blocks[0].self_attn.qkv_proj.weight
        weight.data[[-1, -2]] = weight.data[[-2, -1]]

    def bias(model: DecoderModel) -> None:
        model.transformer_blocks[0].norm1.bias.data += 0.5

    def loaded(model: DecoderModel) -> None:
        torch.manual_seed(9)
        state = {k: v + 0.1 * torch.randn_like(v) for k, v in model.state_dict().items()}
        model.load_state_dict(state)

    def replaced(model: DecoderModel) -> None:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight * 2)

    def stepped(model: DecoderModel) -> None:
        model.loss(torch.ones(64, 8, dtype=torch.long), torch.ones(64, 8).long()).backward()
        fastllm.optim.Adam(model.parameters(), lr=0.1).step()

    def epsilon(model: DecoderModel) -> None:
        model.transformer_blocks[0].norm1.eps = 0.5

    functions = in_place, data, one_row, swapped_rows, bias, loaded, replaced, stepped, epsilon
    return {function.__name__: function for function in functions}


@needs_extension
@pytest.mark.parametrize("change", changes())
def test_an_unchanged_model_is_packed_once_and_a_changed_one_again(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, packed = make_model("even"), []
    original = decode.PackedDecoder
    monkeypatch.setattr(decode, "PackedDecoder", lambda *a: packed.append(a) or original(*a))
    before = start_decoding(model, 1).extend([[1]]).clone()
    assert torch.equal(start_decoding(model, 1, capacity=7).extend([[1]]), before)
    assert len(packed) == 1
    start_decoding(model, 1, precision="bf16")
    assert len(packed) == 2
    changes()[change](model)
    after = start_decoding(model, 1).extend([[1]])
    assert len(packed) == 3 and not torch.equal(after, before)
    with fastllm.use("ref"):
        expected = start_decoding(model, 1).extend([[1]])
    assert torch.allclose(after, expected, atol=1e-4)


@needs_extension
@given(st.integers(1, 3000), st.integers(0), st.integers(1, 2**32 - 1))
def test_checksum_notices_every_changed_bit(size: int, where: int, change: int) -> None:
    numbers = torch.arange(size, dtype=torch.float32)

    def checksum() -> int:
        return extension.kernels.checksum(numbers.data_ptr(), size, 2)

    before = checksum()
    assert checksum() == before
    word = numbers.numpy().view(np.uint32)
    word[where % size] ^= change
    assert checksum() != before
    word[where % size] ^= change
    assert checksum() == before


@needs_extension
@pytest.mark.parametrize("size", [512, 4096, 65_536, 3 * 65_536 + 17])
@pytest.mark.parametrize("factor", [-1, 2, 0.5, -4])
def test_checksum_notices_a_scaled_tensor(isa: str, size: int, factor: float) -> None:
    """All words change in the same few bits, which must not cancel."""
    numbers = torch.randn(size, generator=torch.Generator().manual_seed(size))
    scaled = numbers * factor
    assert extension.kernels.checksum(numbers.data_ptr(), size, 2) != extension.kernels.checksum(
        scaled.data_ptr(), size, 2
    )


@needs_extension
def test_replaced_token_embeddings_are_read_where_they_are() -> None:
    """The packed model reads them in place: equal numbers at another address are another model."""
    model = make_model("even")
    shared = model.embedding_layer.token_embeddings.weight
    start_decoding(model, 1)
    own = nn.Parameter(shared.detach().clone())
    model.embedding_layer.token_embeddings.weight = own
    expected = start_decoding(model, 1).extend([[1, 2]]).clone()
    shared.data.neg_()
    assert torch.equal(start_decoding(model, 1).extend([[1, 2]]), expected)


@needs_extension
@pytest.mark.parametrize("use_cache", [True, False])
def test_both_ways_to_decode_refuse_the_same_sequences(use_cache: bool) -> None:
    model = make_model("even")
    for decoding in (start_decoding(model, 2), ModuleDecoding(model, 2, use_cache, "fp32")):
        for wrong in (-1, 2):
            with pytest.raises(IndexError, match=f"sequences 0 to 1, not {wrong}"):
                decoding.append({0: [1], wrong: [1]})
        with pytest.raises(ValueError, match="sequence 1 needs at least one token"):
            decoding.append({0: [1], 1: []})


@needs_extension
def test_training_mode_frees_the_packed_weights() -> None:
    model = make_model("even")
    start_decoding(model, 1)
    assert model in decode._packed
    model.train()
    assert model not in decode._packed
    model.eval()
    copied = copy.deepcopy(model)
    start_decoding(model, 1)
    copy.deepcopy(model)  # packed weights do not prevent copies
    assert torch.equal(
        start_decoding(copied, 1).extend([[3]]), start_decoding(model, 1).extend([[3]])
    )


@needs_extension
def test_a_capacity_beyond_the_positions_is_refused() -> None:
    packed = PackedDecoder(record(make_model()))
    with pytest.raises(ValueError, match="capacity of 41 tokens exceeds the model's 40 positions"):
        Decoding(packed, 1, 41)


def windowed_model(window: int = 20, pattern: tuple[bool, ...] = (True, False)) -> DecoderModel:
    """The layers of the pattern have a window, so small that most keys are dropped."""
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=67, hidden_size=24, num_layers=3, num_heads=4, num_kv_heads=2, max_seq_len=1200,
        norm="rms", pos_encoding="rope", mlp="swiglu", window=window, window_pattern=pattern,
    )  # fmt: skip
    return DecoderModel.from_config(config).eval()


@pytest.mark.parametrize("window", [1, 20, 300])
@pytest.mark.parametrize("pattern", [(True,), (True, False)], ids=["all", "some"])
def test_keys_outside_of_a_window_are_dropped(
    isa: str, window: int, pattern: tuple[bool, ...]
) -> None:
    """With the results of the model that keeps them, however a sequence is cut into calls."""
    model = windowed_model(window, pattern)
    ids = torch.randint(0, 67, (2, 1200), generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), fastllm.use("ref"):
        plain = model(ids)
        oracle = copy.deepcopy(model).double()(ids)
    packed = PackedDecoder(record(model))
    expected = None
    for cuts in ([1200], [700, 1, 255, 1, 1, 242], [256, 256, 257, 431], [300, *[1] * 900]):
        decoding, end = Decoding(packed, 2), 0
        rows = []
        for count in cuts:
            new = {b: ids[b, end : end + count].tolist() for b in range(2)}
            rows.append(decoding.append(new, every=True).clone().view(2, count, -1))
            end += count
        actual = torch.cat(rows, 1)
        assert_as_accurate(actual, plain, oracle)
        expected = actual if expected is None else expected
        # More than 512 keys are summed in parts, whose size depends on the prompt.
        assert torch.equal(actual, expected) or pattern != (True,)


@needs_extension
def test_sequences_that_are_cleared_or_wait_drop_their_own_keys() -> None:
    model = windowed_model()
    ids = torch.randint(0, 67, (2, 1200)).tolist()
    packed = PackedDecoder(record(model))
    alone = Decoding(packed, 1).append({0: ids[1][:900]})
    decoding = Decoding(packed, 2)
    decoding.append({0: ids[0], 1: ids[0][:700]})
    decoding.clear(1)
    decoding.append({1: ids[1][:600]})
    decoding.clear(0)
    decoding.append({0: ids[0][:800]})
    assert torch.equal(decoding.append({1: ids[1][600:900]}), alone)


@needs_extension
def test_the_cache_of_a_window_does_not_grow_with_the_capacity() -> None:
    model = windowed_model()
    model.transformer_blocks = model.transformer_blocks[:1]
    packed = PackedDecoder(record(model))
    position = 2 * 2 * 6 * 4  # keys and values of two heads of 6 elements, in fp32
    assert Decoding(packed, 1, 1200).cache_bytes == Decoding(packed, 1, 900).cache_bytes
    assert Decoding(packed, 1, 1200).cache_bytes < 1200 * position * 1.5
