"""The next logits of sequences with a key-value cache, as one operation.

One kernel call takes one more token for each sequence, or a whole prompt, through all layers. If it
declines a model, the model's modules and their caches are used instead.
"""

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastllm.ops import dispatch, extension
from fastllm.ops.decoder import Decoder
from fastllm.ops.decoder_loss import why_not_decoder
from fastllm.ops.precision import PRECISIONS


def why_not_cpu(decoder: Decoder) -> str | None:
    if any(dropout.p for dropout in decoder.dropouts()):
        return "dropout is on; call model.eval() first"
    return why_not_decoder(decoder)


# Of elements that are rounded to integers together, along the inner dimension of a product.
GROUP_SIZE = 32
# A row whose elements are all smaller becomes 0: the inverse of its scale must be finite.
SMALLEST_ROW = 1e-30


def round_to_int8(weight: Tensor) -> Tensor:
    """The weight [outputs, inputs] as the kernel uses it under `int8`, in fp32.

    Every row is rounded to multiples of a 127th of its largest element; a row that is nearly 0
    becomes 0.
    """
    largest = weight.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest < SMALLEST_ROW, 0, torch.full_like(largest, 127) / largest)
    return (weight * inverse).round() * (largest / 127)


def round_to_int4(weight: Tensor) -> Tensor:
    """The weight [outputs, inputs] as the kernel uses it under `int4`, in fp32.

    In each row, every 32 elements become one of 16 multiples of a step from the smallest of them
    on. Step and smallest element are rounded to bf16.
    """
    groups = _groups(weight)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = ((high - low) / 15).bfloat16().to(weight.dtype)
    low = low.bfloat16().to(weight.dtype)
    inverse = torch.where(step < SMALLEST_ROW, 0, 1 / step)
    rounded = ((groups - low) * inverse).round().clamp(0, 15) * step + low
    return rounded.flatten(-2)[..., : weight.size(-1)]


def round_input(x: Tensor) -> Tensor:
    """The input [..., inputs] of a linear layer with integer weights as the kernel uses it.

    Every 32 elements are rounded to multiples of a 127th of their largest.
    """
    return round_to_int8(_groups(x)).flatten(-2)[..., : x.size(-1)]


def _groups(x: Tensor) -> Tensor:
    """[..., inputs] in groups; a last short one is filled with its last element."""
    size = x.size(-1)
    filled = torch.arange(size + -size % GROUP_SIZE, device=x.device).clamp(max=size - 1)
    return x[..., filled].unflatten(-1, (-1, GROUP_SIZE))


@torch.no_grad()
def round_linear_layers(model: nn.Module, precision: str) -> None:
    """Makes a model's linear layers compute as `Decoding` does under `int8` or `int4`.

    The head, which is named lm_head, keeps 8 bits under `int4`.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            as_int4 = precision == "int4" and name != "lm_head"
            weight = round_to_int4(module.weight) if as_int4 else round_to_int8(module.weight)
            module.weight = nn.Parameter(weight)  # tied embeddings keep the old one
            module.register_forward_pre_hook(lambda _, inputs: (round_input(inputs[0]),))


class PackedDecoder:
    """A snapshot of a decoder model for the kernel, with the linear layers' weights packed.

    Only the token embeddings, which may be as large as all other weights, are read from the model's
    own memory.

    Args:
        decoder: a model for which `why_not` returns None. The number of its positions limits the
            length of a sequence.
        precision: `fp32`; `bf16`, with operands rounded to bf16, on any CPU; or `int8` or `int4`,
            integer weights as in `round_linear_layers`.
    """

    def __init__(self, decoder: Decoder, precision: str = "fp32") -> None:
        self.vocab_size = decoder.head.weight.size(0)
        self.max_seq_len = decoder.length
        self._token_embeddings = decoder.embedding.weight.detach()
        self.kernel = extension.kernels.PackedDecoder(
            decoder=decoder.to_kernel(),
            precision=PRECISIONS.index(precision),
            threads=torch.get_num_threads(),
        )


_packed: WeakKeyDictionary[nn.Module, tuple[Any, PackedDecoder]] = WeakKeyDictionary()


def packed_once(model: nn.Module, decoder: Decoder, precision: str) -> PackedDecoder:
    """The packed decoder of a model, packed again only if a parameter or setting has changed.

    It is kept for the model's lifetime, or until `forget_packed`.
    """
    key = (precision, extension.kernels.isa(), _state(decoder))
    known = _packed.get(model)
    if known is None or known[0] != key:
        known = _packed[model] = (key, PackedDecoder(decoder, precision))
    return known[1]


def forget_packed(model: nn.Module) -> None:
    """Frees the packed decoder that `packed_once` keeps for a model."""
    _packed.pop(model, None)


def _state(decoder: Decoder) -> Any:
    """A value that differs once a parameter or a setting has changed.

    PyTorch does not count changes through `.data`, as when an average of weights is copied in, so
    all packed parameters are read: a fraction of the time that packing them takes. The token
    embeddings are not packed but read where they are.
    """
    _, *packed = decoder.parameters()  # the embeddings come first; a tied head is packed
    threads = torch.get_num_threads()
    checksums = [
        (p.shape, extension.kernels.checksum(p.data_ptr(), p.numel(), threads))
        for p in packed
        if p is not None
    ]
    return decoder.embedding.weight.data_ptr(), checksums, decoder.settings()


def check_sequences(tokens: Mapping[int, Sequence[int]], B: int) -> None:
    """Raises what `Decoding.append` does if it cannot append these tokens to B sequences."""
    for b, new in tokens.items():
        if not 0 <= b < B:
            raise IndexError(f"there are sequences 0 to {B - 1}, not {b}")
        if not len(new):
            raise ValueError(f"sequence {b} needs at least one token")


class Decoding:
    """Sequences that a decoder model continues, without dropout.

    A sequence's logits are bit-identical for any number of threads and whatever else is in the
    batch. Memory for a sequence's keys and values is allocated at its first token; a layer with a
    window keeps little more than the window.

    Args:
        packed: the model.
        batch_size: sequences, B.
        capacity: the maximum number of tokens per sequence; the model's positions by default.
    """

    def __init__(self, packed: PackedDecoder, batch_size: int, capacity: int | None = None) -> None:
        V = packed.vocab_size
        self._packed = packed
        self._logits = torch.empty(batch_size, V, dtype=torch.float32, device="cpu")
        self._rows = self._logits[:0]
        self._kernel = extension.kernels.Decoding(
            packed=packed.kernel, B=batch_size, capacity=capacity or packed.max_seq_len
        )

    def extend(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Appends any number of tokens to each of the B sequences.

        Returns:
            Logits [B, V] for the token after each, valid until the next call. A sequence that got
            no tokens keeps its previous row.

        Raises:
            IndexError: a token is outside the vocabulary; nothing was appended.
            ValueError: a sequence would exceed the capacity, or there are not B lists of tokens.
        """
        # Keywords would cost a third of a microsecond, and a token may take only six.
        self._kernel.extend(tokens, self._logits.data_ptr(), True, False, torch.get_num_threads())
        return self._logits

    def append(self, tokens: Mapping[int, Sequence[int]], every: bool = False) -> Tensor:
        """Appends at least one token to each of the given sequences, which are numbered from 0.

        Returns:
            Logits [len(tokens), V] for the token after each of these sequences, in the order of
            their numbers, valid until the next call. With `every`, a row for each appended token,
            sequence by sequence.

        Raises:
            IndexError: a token is outside the vocabulary, or there is no such sequence; nothing was
                appended.
            ValueError: a sequence would exceed the capacity, or gets no token.
        """
        B, V = self._logits.shape
        check_sequences(tokens, B)
        count = sum(map(len, tokens.values())) if every else len(tokens)
        if len(self._rows) < count:
            self._rows = torch.empty(count, V, dtype=torch.float32, device="cpu")
        self._kernel.extend(
            tokens=[tokens.get(b, ()) for b in range(B)],
            logits=self._rows.data_ptr(),
            in_place=False,
            every=every,
            threads=torch.get_num_threads(),
        )
        return self._rows[:count]

    def clear(self, sequence: int) -> None:
        """Forgets the tokens of a sequence.

        Raises:
            IndexError: there is no such sequence.
        """
        self._kernel.clear(sequence)

    @property
    def cache_bytes(self) -> int:
        """Memory for the keys and values of one sequence."""
        return self._kernel.cache_bytes

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each sequence."""
        return self._kernel.lengths


# Declined models run through their modules.
IMPLEMENTATIONS = [dispatch.cpu(Decoding, why_not_cpu)]


def why_not(decoder: Decoder) -> str | None:
    """Why the kernel cannot continue sequences with this model, or None."""
    (implementation,) = IMPLEMENTATIONS
    return implementation.reason(decoder)
