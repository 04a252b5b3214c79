"""Token ids that continue prompts: the decoding loop over the kernel or the modules."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastllm.device import autocast
from fastllm.models.decoder import DecoderModel
from fastllm.ops import decode, dispatch
from fastllm.ops.embedding import check_token_ids
from fastllm.ops.sampling import Sampling, sample


def generate_tokens(
    model: DecoderModel,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    use_cache: bool = True,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    precision: str = "fp32",
) -> Iterator[int]:
    """Token after token that continues `prompt`: `generate_batch` for one."""
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    batch = generate_batch(model, [prompt], max_new_tokens, sampling, seed, use_cache, precision)
    return (token for (token,) in batch)


def generate_batch(
    model: DecoderModel,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 - it cannot be changed
    seed: int = 0,
    use_cache: bool = True,
    precision: str = "fp32",
) -> Iterator[list[int]]:
    """Token after token that continues each of B prompts, whatever their lengths.

    The model sees at most `max_seq_len - 1` tokens, the most that training gave it to predict
    from. When they are used up, the older half is forgotten: positions are absolute, so a window
    that slid with every token could keep nothing in the cache.

    Where something is attached to the model (hooks, replaced layers), its modules run one after the
    other; otherwise a step is one kernel, with the weights of the beginning (see `Decoding`).

    Args:
        model: as it stands; call `model.eval()` first.
        prompts: each of at least one token.
        sampling: how tokens are chosen.
        seed: the same seed gives the same text. It is the first prompt's; each further one has the
            next. A prompt's continuation does not depend on the others.
        use_cache: keep keys and values of earlier tokens; without, everything is computed again
            for every token, for the same result.
        precision: of the products: `fp32` (`bf16` under autocast to it), `bf16`, `fp16`, or `int8`
            for weights rounded to 8 bits, with a scale for each output. All but the first read less
            memory for a token.

    Yields:
        The next token of each prompt.

    Raises:
        ValueError: there is no prompt, or an empty one; a setting is out of range; or `int8` is
            asked of a model that the kernel cannot run.
        IndexError: a token of a prompt is outside the vocabulary.
    """
    if not prompts or not all(prompts):
        raise ValueError("the prompt is empty; give at least one token to continue")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative, got {max_new_tokens}")
    if not 0 <= seed <= 2**64 - len(prompts):
        raise ValueError(f"seed must be in [0, 2**64), for every prompt, got {seed}")
    sampling.check()
    for prompt in prompts:  # also what lies before the window
        check_token_ids(torch.tensor(prompt), model.vocab_size)
    window = max(1, model.max_seq_len - 1)
    longest = max(map(len, prompts)) + max_new_tokens
    capacity = max(1, min(window, longest))
    decoding = start_decoding(model, len(prompts), use_cache, precision, capacity)
    contexts = [list(prompt[-window:]) for prompt in prompts]
    unseen = list(contexts)  # what the caches do not hold yet
    seeds = [seed + b for b in range(len(prompts))]
    seen = None
    if sampling.repetition_penalty != 1:
        seen = torch.zeros(len(prompts), model.vocab_size, dtype=torch.bool)
        for row, prompt in zip(seen, prompts, strict=True):
            row[list(prompt)] = True
    for step in range(max_new_tokens):
        logits = decoding.extend(unseen)
        if model.padding_idx is not None:
            logits[:, model.padding_idx] = -math.inf  # never a target, so its logit means nothing
        tokens = sample(logits, sampling, seeds, step, seen).tolist()
        for b, token in enumerate(tokens):
            contexts[b].append(token)
            unseen[b] = [token]
            if seen is not None:
                seen[b, token] = True
            if len(contexts[b]) > window:
                contexts[b] = contexts[b][-max(1, window // 2) :]
                unseen[b] = contexts[b]
                decoding.clear(b)
        yield tokens


class ModuleDecoding:
    """What `decode.Decoding` does, by way of the modules: whatever is attached to them runs."""

    def __init__(
        self, model: DecoderModel, batch_size: int, use_cache: bool, precision: str
    ) -> None:
        self._model, self._use_cache, self._precision = model, use_cache, precision
        self._device = next(model.parameters()).device
        self._logits = [torch.empty(model.vocab_size, dtype=torch.float32)] * batch_size
        self._tokens: list[list[int]] = [[] for _ in range(batch_size)]
        self._caches = [model.new_caches() for _ in range(batch_size)]

    def extend(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        for b, new in enumerate(tokens):
            if new:
                self._logits[b] = self._forward(b, new)[-1]
        return torch.stack(self._logits)

    def append(self, tokens: Mapping[int, Sequence[int]], every: bool = False) -> Tensor:
        kept = slice(None) if every else slice(-1, None)
        return torch.cat([self._forward(b, new)[kept] for b, new in sorted(tokens.items())])

    def _forward(self, b: int, new: Sequence[int]) -> Tensor:
        self._tokens[b] += new
        ids = torch.tensor([new if self._use_cache else self._tokens[b]], device=self._device)
        # Around the forward only: the caller's own code runs between two tokens.
        with torch.no_grad(), self._autocast():
            logits = self._model(ids, caches=self._caches[b] if self._use_cache else None)
        return logits[0, -len(new) :].float().cpu()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._precision == "fp32":  # the caller's, if there is one
            return nullcontext()
        return autocast(self._device.type, self._precision)

    @property
    def lengths(self) -> list[int]:
        return [len(tokens) for tokens in self._tokens]

    def clear(self, sequence: int) -> None:
        self._tokens[sequence] = []
        self._caches[sequence] = self._model.new_caches()


def start_decoding(
    model: DecoderModel,
    batch_size: int,
    use_cache: bool = True,
    precision: str = "fp32",
    capacity: int | None = None,
) -> decode.Decoding | ModuleDecoding:
    """The kernel where it can serve, else the modules.

    Args:
        capacity: positions that a sequence needs; the kernel keeps memory for so many. The model's
            `max_seq_len` unless given.

    Raises:
        ValueError: the precision is unknown, or `int8` and the modules alone can serve.
    """
    if precision not in (*dispatch.PRECISIONS, "fp16"):
        known = ", ".join(dispatch.PRECISIONS)
        raise ValueError(f"there is no precision '{precision}'; choose from {known}, fp16")
    decoder = model.fused(torch.empty(1, capacity or model.max_seq_len), None)
    if decoder is None:
        reason: str | None = "something is attached to the model, or a part of it is replaced"
    elif precision == "fp16":
        reason = "the kernel does not know fp16"
    elif any(decoder.dropout_ps()):
        reason = "dropout is on; call model.eval() first"
    else:
        reason = decode.why_not(decoder)
    if use_cache and decoder is not None and reason is None:
        if precision == "fp32":  # autocast may ask for less
            precision = dispatch.PRECISIONS[dispatch.precision()]
        return decode.Decoding(decoder, batch_size, precision)
    if precision == "int8":
        raise ValueError(f"int8 needs the kernel and its cache: {reason or 'no cache asked'}")
    return ModuleDecoding(model, batch_size, use_cache, precision)
