"""Whole decoders of random architectures: the loss in one pass, and decoding with a cache."""

import os
import random
from collections.abc import Callable

import torch
from torch import Tensor

import fastllm
from fastllm.ops import decode, decoder_loss
from fastllm.ops.decode import Decoding, PackedDecoder
from fastllm.ops.decoder import Decoder, Embedding, Layer
from fastllm.ops.linear_cross_entropy import linear_cross_entropy
from tests.conftest import (
    assert_as_accurate,
    assert_same_bits,
    decided_by_more_runs,
    factors,
    needs_extension,
    stacked,
)
from tests.ops.layers import Maker, hidden_states, logits, tensors_of, with_tensors

H, V, B = 24, 31, 6

pytestmark = needs_extension


def with_decoder_tensors(decoder: Decoder, tensors: list[Tensor]) -> Decoder:
    rest = iter(tensors)

    def take(record: object) -> list[Tensor]:
        return [next(rest) for _ in tensors_of(record)]

    embedding: Embedding = with_tensors(decoder.embedding, take(decoder.embedding))
    layers = [
        Layer(with_tensors(a, take(a)), with_tensors(m, take(m)), parallel)
        for a, m, parallel in decoder.layers
    ]
    norm = decoder.norm and decoder.norm._replace(
        weight=None if decoder.norm.weight is None else next(rest),
        bias=None if decoder.norm.bias is None else next(rest),
    )
    bias = decoder.head.bias is not None
    head = decoder.head._replace(weight=next(rest), bias=next(rest) if bias else None)
    return decoder._replace(embedding=embedding, layers=layers, norm=norm, head=head)


def loss_of_operations(decoder: Decoder, ids: Tensor) -> Tensor:
    """The next-token loss by single operations."""
    targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    x = hidden_states(ids, decoder)
    return linear_cross_entropy(x, decoder.head, targets, -100, decoder.softcap)


def runs_of(
    decoder: Decoder, ids: Tensor
) -> tuple[Callable[[str, torch.dtype, float], list[Tensor]], list[Tensor]]:
    tensors = tensors_of(decoder)

    def run(name: str, dtype: torch.dtype, factor: float) -> list[Tensor]:
        leaves = [(tensor.to(dtype) * factor).requires_grad_() for tensor in tensors]
        record = with_decoder_tensors(decoder, leaves)
        with fastllm.use("ref" if name == "ref" else "auto"):
            if name == "whole":
                loss = decoder_loss.decoder_loss(record, ids, ids)
            else:
                loss = loss_of_operations(record, ids)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    return run, tensors


def assert_loss_parity(decoder: Decoder, ids: Tensor, runs: int) -> None:
    run, _ = runs_of(decoder, ids)
    assert decoder_loss.why_not(decoder, ids, ids) is None
    kinds = (
        ("whole", torch.float32), ("operations", torch.float32), ("ref", torch.float32),
        ("ref", torch.float64),
    )  # fmt: skip
    results = [stacked([run(*kind, factor) for factor in factors(runs)]) for kind in kinds]
    for i, (whole, operations, plain, oracle) in enumerate(zip(*results, strict=True)):
        assert_as_accurate(whole, plain, oracle, f"whole model, {i}")
        assert_as_accurate(operations, plain, oracle, f"operations, {i}")


# The number of tokens that three sequences get in each step.
STEPS = [(5, 1, 9), (1, 1, 1), (1, 0, 1), (3, 7, 2), (1, 1, 1)]


def decoded(decoder: Decoder, ids: Tensor, precision: str = "fp32") -> Tensor:
    """The logits of every step from the cache, [steps, B, V]."""
    decoding = Decoding(PackedDecoder(decoder, precision), len(ids))
    results = []
    for counts in STEPS:
        lengths = decoding.lengths
        tokens = [row[a : a + n].tolist() for row, a, n in zip(ids, lengths, counts, strict=True)]
        results.append(decoding.extend(tokens).clone())
    return torch.stack(results)


def recomputed(decoder: Decoder, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """The same from the reference, which sees all tokens at every step."""
    tensors = [tensor.to(dtype) for tensor in tensors_of(decoder)]
    record, lengths = with_decoder_tensors(decoder, tensors), torch.tensor(STEPS).cumsum(0)
    with fastllm.use("ref"):
        rows = [
            logits(ids[b : b + 1, :length], record)[0, -1]
            for step in lengths
            for b, length in enumerate(step)
        ]
    return torch.stack(rows).view(len(STEPS), len(ids), -1)


def causal(decoder: Decoder) -> Decoder:
    layers = [Layer(a._replace(causal=True), m, parallel) for a, m, parallel in decoder.layers]
    return decoder._replace(layers=layers)


def test_parity_of_40_random_decoders_slow(isa: str) -> None:
    """Drawn anew in each run; a failure names its seed, which FASTLLM_TEST_SEED repeats."""
    first = int(os.environ.get("FASTLLM_TEST_SEED", random.randrange(10**6)))
    for seed in range(first, first + 10):  # for each of four instruction sets
        m = Maker(seed)
        S = m.random.randint(15, 70)
        try:
            ids = torch.randint(0, V, (B * -(-64 // S), S), generator=m.generator)
            whole, decoder = m.decoder(S, H, V), causal(m.decoder(S, H, V))
            decided_by_more_runs(assert_loss_parity, whole, ids)
            assert decode.why_not(decoder) is None
            three = ids[:3]
            oracle = recomputed(decoder, three, torch.float64)
            plain = recomputed(decoder, three, torch.float32)
            assert_as_accurate(decoded(decoder, three), plain, oracle, "decoding")
        except AssertionError as error:
            raise AssertionError(f"FASTLLM_TEST_SEED={seed}: {error}") from error


def test_a_whole_decoder_has_the_bits_of_any_thread_count() -> None:
    m = Maker(5)
    decoder = m.decoder(20, H, V, 0.2)
    ids = torch.randint(0, V, (24, 20), generator=m.generator)
    run, _ = runs_of(decoder, ids)

    def results() -> list[Tensor]:
        torch.manual_seed(0)
        return run("whole", torch.float32, 1.0)

    assert_same_bits(results)


def test_decoding_in_a_window_has_the_bits_of_any_thread_count() -> None:
    m = Maker(1)
    attention = m.attention(900, H)._replace(
        causal=True, window=70, rope=m.rope(900, 4), mask=None, softcap=2.0
    )
    decoder = m.decoder(900, H, V)._replace(layers=[Layer(attention, m.mlp(H))], length=900)
    decoder = decoder._replace(embedding=decoder.embedding._replace(positions=None))
    ids = torch.randint(0, V, (900,), generator=m.generator).tolist()

    def last() -> list[Tensor]:
        decoding = Decoding(PackedDecoder(decoder), 1)
        decoding.extend([ids[:800]])
        return [decoding.extend([ids[800:]]).clone()]

    assert_same_bits(last)
