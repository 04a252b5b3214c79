"""Token ids that continue prompts, from the fused kernel or from the modules."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastllm.device import Device, Precision, autocast, choose_device, choose_precision
from fastllm.models.decoder import DecoderModel
from fastllm.ops import decode
from fastllm.ops.embedding import check_token_ids
from fastllm.ops.precision import PRECISIONS, product_precision
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
    """Yields the tokens that continue `prompt`: `generate_batch` for a single prompt."""
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    batch = generate_batch(model, [prompt], max_new_tokens, sampling, seed, use_cache, precision)
    return (token for (token,) in batch)


def generate_batch(
    model: DecoderModel,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 - immutable
    seed: int = 0,
    use_cache: bool = True,
    precision: str = "fp32",
) -> Iterator[list[int]]:
    """Continues B prompts of any lengths, all by one token in each step.

    Prompts and continuations may be longer than `max_seq_len`: see `ContextWindow`.

    If anything is attached to the model (hooks, replaced layers), a step runs its modules.
    Otherwise it is one kernel call, with all weights but the token embeddings as they were at the
    start.

    Args:
        model: used in its present mode; call `model.eval()` first.
        prompts: each of at least one token.
        sampling: how tokens are chosen.
        seed: of the first prompt; each further prompt has the next one. The same seed gives the
            same continuation, whatever the other prompts are.
        use_cache: keep the keys and values of earlier tokens. Without, everything is recomputed for
            every token, with the same result.
        precision: of matrix products: `fp32` (`bf16` under autocast to it), `bf16`, `fp16`, or
            `int8` or `int4` for weights rounded to 8 or 4 bits. All but `fp32` read less memory for
            each token.

    Yields:
        The next token of each prompt.

    Raises:
        ValueError: there are no prompts, or an empty one; a setting is out of range; or integers
            are requested for a model that the kernel cannot run.
        IndexError: a token of a prompt is outside the vocabulary.
    """
    if not prompts or not all(prompts):
        raise ValueError("the prompt is empty; give at least one token to continue")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative, got {max_new_tokens}")
    if not 0 <= seed <= 2**64 - len(prompts):
        raise ValueError(f"seed must be in [0, 2**64) for every prompt, got {seed}")
    sampling.check()
    for prompt in prompts:  # including tokens before the window
        check_token_ids(torch.tensor(prompt), model.vocab_size)
    contexts = [ContextWindow(model.max_seq_len, prompt) for prompt in prompts]
    longest = max(map(len, prompts)) + max_new_tokens
    capacity = max(1, min(contexts[0].size, longest))
    decoding = start_decoding(model, len(prompts), use_cache, precision, capacity)
    seeds = [seed + b for b in range(len(prompts))]
    seen = None
    if sampling.repetition_penalty != 1:
        seen = torch.zeros(len(prompts), model.vocab_size, dtype=torch.bool)
        for row, prompt in zip(seen, prompts, strict=True):
            row[list(prompt)] = True
    for step in range(max_new_tokens):
        logits = decoding.extend([context.pending for context in contexts])
        if model.padding_idx is not None:
            logits[:, model.padding_idx] = -math.inf  # never a target, so its logit is meaningless
        tokens = sample(logits, sampling, seeds, step, seen).tolist()
        for b, token in enumerate(tokens):
            if seen is not None:
                seen[b, token] = True
            if contexts[b].append(token):
                decoding.clear(b)
        yield tokens


class ContextWindow:
    """The tokens of a text that a model sees.

    At most `max_seq_len - 1`, the longest context that it was trained to predict from. When they
    are used up, the older half is dropped: positions are absolute, so the cache would be useless in
    a window that moved with every token.

    Attributes:
        size: how many tokens fit.
        tokens: those in the window.
        pending: the last of `tokens`, which the decoding does not hold yet.
    """

    def __init__(self, max_seq_len: int, tokens: Sequence[int] = ()) -> None:
        self.size = max(1, max_seq_len - 1)
        self.tokens = list(tokens[-self.size :])
        self.pending = self.tokens[:]

    def append(self, token: int) -> bool:
        """Adds a token; returns whether the window has moved, so that the decoding must be cleared
        and all of `tokens` are pending."""
        moved = len(self.tokens) == self.size
        if moved:
            kept = max(1, self.size // 2) - 1
            self.tokens = self.tokens[self.size - kept :]
        self.tokens.append(token)
        self.pending = self.tokens[:] if moved else [token]
        return moved


class ModuleDecoding:
    """The interface of `decode.Decoding`, run by the modules with everything attached to them."""

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
        decode.check_sequences(tokens, len(self._tokens))
        rows = slice(None) if every else slice(-1, None)
        return torch.cat([self._forward(b, new)[rows] for b, new in sorted(tokens.items())])

    def _forward(self, b: int, new: Sequence[int]) -> Tensor:
        self._tokens[b] += new
        ids = torch.tensor([new if self._use_cache else self._tokens[b]], device=self._device)
        try:
            # Around the forward only: the caller's own code runs between two tokens.
            with torch.no_grad(), self._autocast():
                logits = self._model(ids, caches=self._caches[b] if self._use_cache else None)
        except BaseException:
            self.clear(b)  # only some of the layers may have cached the new tokens
            raise
        return logits[0, -len(new) :].float().cpu()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._precision == "fp32":  # the caller's autocast, if any
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
    """Decoding by the kernel if it can run the model, else by the modules.

    Args:
        capacity: positions per sequence that the kernel reserves memory for; by default the model's
            `max_seq_len`.

    Raises:
        ValueError: the precision is unknown, or one of integers for a model that only the
            modules can run.
    """
    if precision not in (*PRECISIONS, "fp16"):
        known = ", ".join(PRECISIONS)
        raise ValueError(f"unknown precision '{precision}'; choose from {known}, fp16")
    decoder = model.record(model.max_seq_len)
    if isinstance(decoder, str):
        reason: str | None = decoder
    elif precision == "fp16":
        reason = "the kernel does not support fp16"
    else:
        reason = decode.why_not(decoder)
    if use_cache and not isinstance(decoder, str) and reason is None:
        if precision == "fp32":  # autocast may ask for less
            precision = PRECISIONS[product_precision()]
        packed = decode.packed_once(model, decoder, precision)
        return decode.Decoding(packed, batch_size, capacity)
    if precision in ("int8", "int4"):
        off = "use_cache is off"
        raise ValueError(f"{precision} needs the kernel and its cache: {reason or off}")
    return ModuleDecoding(model, batch_size, use_cache, precision)


def prepare_for_decoding(
    model: DecoderModel, device: Device, precision: Precision, quantize: str | None
) -> str:
    """Puts a model into evaluation mode on a device.

    Args:
        device, precision, quantize: as the commands' flags of these names.

    Returns:
        The precision to decode in.
    """
    device = choose_device(device)
    model.eval().to(device)
    return quantize or choose_precision(precision, model.hidden_size, device)
