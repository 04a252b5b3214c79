"""The next logits of sequences whose earlier keys and values are kept, as one operation.

A token more for each sequence, or a whole prompt, goes through all layers in one call of a kernel.
It stands for the modules with their caches, which `fastllm.generation` uses where it cannot serve.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastllm.ops import dispatch
from fastllm.ops.decoder_loss import Decoder, description, why_not_decoder
from fastllm.ops.parameters import Linear, Norm


def why_not(decoder: Decoder) -> str | None:
    """Why the kernel cannot continue sequences with this model; None if it can."""
    layers = decoder.layers
    if len({layer.num_heads for layer in layers}) > 1:  # one cache has room for all of them
        return "the layers differ in their number of heads"
    if len({layer.norm_first for layer in layers}) > 1:
        return "some layers are Pre-LN and some Post-LN"
    if layers and not layers[0].norm_first and decoder.norm is not None:
        return "a Post-LN model has a final norm"
    return why_not_decoder(decoder, decoder.positions.size(0))


def round_to_int8(weight: Tensor) -> Tensor:
    """What the kernel takes a weight [outputs, inputs] for under `int8`, in fp32.

    Every row is rounded to multiples of a 127th of its largest element; one that is nearly 0
    becomes 0.
    """
    largest = weight.abs().amax(1, keepdim=True)
    inverse = torch.where(largest < 1e-30, 0, torch.full_like(largest, 127) / largest)
    return (weight * inverse).round() * (largest / 127)


@torch.no_grad()
def round_weights_to_int8(model: nn.Module) -> None:
    """Gives the linear layers of a model the weights that `Decoding` computes with under `int8`."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            # A parameter of its own: embeddings that are tied to it stay as they are.
            module.weight = nn.Parameter(round_to_int8(module.weight))


def own(decoder: Decoder) -> Decoder:
    """The same model, whose memory stays what it is when the modules get new weights or types.

    The kernel packs the weights of linear layers and reads the rest at every step. Of that, the
    token embeddings may be as large as all the weights, and are held where they lie.
    """

    def linear(layer: Linear) -> Linear:
        bias = None if layer.bias is None else layer.bias.detach().clone()
        return Linear(layer.weight.detach(), bias)

    def norm(layer: Norm) -> Norm:
        return Norm(layer.weight.detach().clone(), layer.bias.detach().clone(), layer.eps)

    return decoder._replace(
        tokens=decoder.tokens.detach(),
        positions=decoder.positions.detach().clone(),
        layers=[
            layer._replace(
                norm1=norm(layer.norm1),
                qkv=linear(layer.qkv),
                out=linear(layer.out),
                norm2=norm(layer.norm2),
                fc1=linear(layer.fc1),
                fc2=linear(layer.fc2),
            )
            for layer in decoder.layers
        ],
        norm=None if decoder.norm is None else norm(decoder.norm),
        head=linear(decoder.head),
    )


class Decoding:
    """Sequences that a decoder model continues, without dropout.

    The logits of a sequence are the same bits whoever is beside it, and for any number of threads.
    A sequence's keys and values have memory from its first token on.

    Args:
        decoder: the model as it is now; of later changes, only those of the token embeddings in
            place are seen. Its `positions` say how long a sequence can be. See `why_not` for what
            it must be like.
        batch_size: sequences, B.
        precision: `fp32`; `bf16`, products of numbers so rounded, on any CPU; or `int8`, weights
            rounded to 8-bit integers with a scale for each output.
    """

    def __init__(self, decoder: Decoder, batch_size: int, precision: str = "fp32") -> None:
        V = decoder.head.weight.size(0)
        self._decoder = decoder = own(decoder)  # the kernel reads some of it where it lies
        self._logits = torch.empty(batch_size, V, dtype=torch.float32, device="cpu")
        self._rows = self._logits[:0]
        nothing = torch.empty(1, 1, dtype=torch.long, device="cpu")
        arguments = description(decoder, nothing, nothing, 0, [0] * len(decoder.dropout_ps()))
        self._kernel = dispatch.kernels.Decoding(
            *arguments[:4],
            dispatch.PRECISIONS.index(precision),
            batch_size,
            decoder.positions.size(0),
            torch.get_num_threads(),
        )

    def extend(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Appends any number of tokens to each of the B sequences.

        Returns:
            Logits [B, V] for the token after each, until the next call; rows of sequences that
            none were appended to are those of their last time.

        Raises:
            IndexError: a token is outside the vocabulary; nothing was appended.
            ValueError: a sequence would become longer than there are positions, or there are not B.
        """
        self._kernel.extend(tokens, self._logits.data_ptr(), True, False, torch.get_num_threads())
        return self._logits

    def append(self, tokens: Mapping[int, Sequence[int]], every: bool = False) -> Tensor:
        """Appends tokens, one at least, to some of the sequences, which are numbered from 0.

        Returns:
            Logits [len(tokens), V] for the token after each of these sequences, in the order of
            their numbers, until the next call. With `every`, a row for each token that was
            appended, sequence by sequence.

        Raises:
            IndexError: a token is outside the vocabulary, or there is no such sequence; nothing was
                appended.
            ValueError: a sequence would become longer than there are positions, or gets no token.
        """
        B, V = self._logits.shape
        if not all(0 <= b < B for b in tokens):
            raise IndexError(f"there are sequences 0 to {B - 1}, not {max(tokens)}")
        if not all(map(len, tokens.values())):
            raise ValueError("each sequence that is named needs a token at least")
        count = sum(map(len, tokens.values())) if every else len(tokens)
        if len(self._rows) < count:
            self._rows = torch.empty(count, V, dtype=torch.float32, device="cpu")
        each = [tokens.get(b, ()) for b in range(B)]
        self._kernel.extend(each, self._rows.data_ptr(), False, every, torch.get_num_threads())
        return self._rows[:count]

    def clear(self, sequence: int) -> None:
        """Forgets the tokens of a sequence.

        Raises:
            IndexError: there is no such sequence.
        """
        self._kernel.clear(sequence)

    @property
    def lengths(self) -> list[int]:
        """How many tokens each sequence has."""
        return self._kernel.lengths
