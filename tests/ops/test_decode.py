import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import fastllm
from fastllm import DecoderModel
from fastllm.generate import ModuleDecoding, start_decoding
from fastllm.ops import decode
from fastllm.ops.decode import Decoding, round_to_int8
from tests.conftest import assert_as_accurate, needs_extension, poisoned_memory

MODELS = {
    "plain": {},
    "post": {"norm_first": False},
    "learned": {"pos_encoding_learned": True, "scale_embeddings": False},
    "tied": {"tie_word_embeddings": True, "lm_head_bias": False},
    "no-bias": {"qkv_bias": False, "mlp_bias": False, "lm_head_bias": False},
    "relu": {"mlp_activation": "relu", "norm_first": False, "qkv_bias": False},
    "gelu_tanh": {"mlp_activation": "gelu_tanh"},
}
# V, N, D, I, L: widths that are no multiple of anything, and of everything
SIZES = {
    "odd": (67, 3, 7, 29, 2),
    "even": (66, 2, 32, 128, 2),
    "tiny": (1, 1, 1, 1, 1),
    "long": (300, 2, 48, 600, 1),
    "no-layers": (20, 1, 8, 8, 0),
}


def make_model(size: str = "odd", kind: str = "plain", S: int = 40) -> DecoderModel:
    V, N, D, I, L = SIZES[size]
    torch.manual_seed(0)
    model = DecoderModel(V, N * D, L, N, S, I, **MODELS[kind]).eval()
    with torch.no_grad():  # zeros and ones would hide mistakes
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def split(ids: Tensor, steps: Sequence[Sequence[int]]) -> list[list[list[int]]]:
    """Step by step the tokens that each sequence of ids [B, S] is given, by their counts."""
    positions = [0] * len(ids)
    result = []
    for counts in steps:
        ends = [p + c for p, c in zip(positions, counts, strict=True)]
        result.append([ids[b, p:e].tolist() for b, (p, e) in enumerate(zip(positions, ends))])
        positions = ends
    return result


def logits(decoding: Decoding | ModuleDecoding, steps: list[list[list[int]]]) -> list[Tensor]:
    return [decoding.extend(tokens).clone() for tokens in steps]


def recomputed(model: DecoderModel, steps: list[list[list[int]]]) -> list[Tensor]:
    """By the reference, everything again for every step."""
    with fastllm.use("ref"):
        decoding = ModuleDecoding(model, len(steps[0]), use_cache=False)
        decoding._logits = [row.to(next(model.parameters()).dtype) for row in decoding._logits]
        return logits(decoding, steps)


class InDouble(ModuleDecoding):
    """Keeps the oracle's digits, which generation does not need."""


def oracle(model: DecoderModel, ids: Tensor, steps: list[list[list[int]]]) -> list[Tensor]:
    double = copy.deepcopy(model).double()
    lengths = [0] * len(ids)
    last = [torch.zeros(model.vocab_size, dtype=torch.double) for _ in ids]
    result = []
    for tokens in steps:
        for b, new in enumerate(tokens):
            lengths[b] += len(new)
            if new:
                with torch.no_grad(), fastllm.use("ref"):
                    last[b] = double(ids[b : b + 1, : lengths[b]])[0, -1]
        result.append(torch.stack(last))
    return result
