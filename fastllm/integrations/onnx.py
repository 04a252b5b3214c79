"""Models as ONNX graphs, for onnxruntime and whatever else reads them."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from fastllm.models.decoder import DecoderModel
from fastllm.ops.dispatch import use
from fastllm.ops.embedding import Settings, embedding_ref

# What protobuf allows a file.
LARGEST_FILE = 2**31


def check(model: DecoderModel) -> None:
    """Raises a `ValueError` with the reason where the model does not fit into a file."""
    size = sum(tensor.nbytes for tensor in {id(t): t for t in model.parameters()}.values())
    if size >= LARGEST_FILE:
        raise ValueError(
            f"an ONNX file holds less than 2 GiB, and the weights are {size / 2**30:.1f} GiB"
        )


def save(model: DecoderModel, path: str | os.PathLike[str]) -> None:
    """Writes the model as one ONNX file.

    Its input is `input_ids` [B, S], int64, its output `logits` [B, S, V], float32, for any B and
    any S up to `max_seq_len`. There is no dropout in it.

    Args:
        model: with float32 parameters on the CPU.

    Raises:
        ValueError: the weights are too large for the format.
        ImportError: onnx or onnxscript is not installed.
    """
    check(model)
    was_training = model.training
    # No two sizes alike: what is equal in an example may be taken for equal always.
    example = torch.zeros(3, 2, dtype=torch.int64)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=model.max_seq_len)}
    try:
        with use("ref"), torch.no_grad(), _quietly():
            program = torch.onnx.export(
                _Logits(model).eval(),
                (example,),
                input_names=["input_ids"],
                output_names=["logits"],
                dynamic_shapes=(sizes,),
                verbose=False,
            )
    finally:
        model.train(was_training)
    assert program is not None  # it is None for the older exporter alone
    program.save(path, external_data=False)


def logits(path: Path, input_ids: Tensor) -> Tensor:
    """What onnxruntime computes on one thread: [B, S, V] for `input_ids` [B, S]."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (result,) = session.run(["logits"], {"input_ids": input_ids.numpy()})
    return torch.from_numpy(result)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what PyTorch's exporter has to say of packages and calls that are none of ours."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)


class _Logits(nn.Module):
    """The model without its check of the ids, whose values a graph cannot look at."""

    def __init__(self, model: DecoderModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        model, table = self.model, self.model.embedding_layer
        positions = table.position_table()[: input_ids.size(1)]
        settings = Settings(table.scale)
        x = embedding_ref(input_ids, table.token_embeddings.weight, positions, settings)
        for block in model.transformer_blocks:
            x = block(x)
        return model.lm_head(x if model.final_norm is None else model.final_norm(x))
