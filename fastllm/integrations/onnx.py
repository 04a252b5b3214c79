"""Models as ONNX graphs, for onnxruntime and other programs."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from fastllm.models.decoder import DecoderModel
from fastllm.ops.decoder import Embedding
from fastllm.ops.dispatch import use
from fastllm.ops.embedding import embedding_ref

# protobuf's limit.
LARGEST_FILE = 2**31


def check_onnx(model: DecoderModel) -> None:
    """Raises a `ValueError` with the reason if the model does not fit into a file."""
    size = sum(parameter.nbytes for parameter in model.parameters())
    if size >= LARGEST_FILE:
        raise ValueError(
            f"an ONNX file holds less than 2 GiB, and the weights are {size / 2**30:.1f} GiB"
        )


def save_onnx(model: DecoderModel, path: str | os.PathLike[str]) -> None:
    """Writes the model as one ONNX file, without dropout.

    Its input is `input_ids` [B, S], int64, its output `logits` [B, S, V], float32, for any B and
    any S up to `max_seq_len`.

    Args:
        model: with float32 parameters on the CPU.

    Raises:
        ValueError: the weights are too large for the format.
        ImportError: onnx or onnxscript is not installed.
    """
    check_onnx(model)
    was_training = model.training
    # Two different sizes: the exporter may assume that sizes equal in the example always are.
    example = torch.zeros(3, 2, dtype=torch.int64)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=model.max_seq_len)}
    try:
        with use("ref"), torch.no_grad(), _silent_exporter():
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
    assert program is not None  # only the older exporter returns None
    program.save(path, external_data=False)


def onnx_logits(path: Path, input_ids: Tensor) -> Tensor:
    """The logits [B, S, V] for `input_ids` [B, S] by onnxruntime on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (result,) = session.run(["logits"], {"input_ids": input_ids.numpy()})
    return torch.from_numpy(result)


@contextmanager
def _silent_exporter() -> Iterator[None]:
    """Suppresses the PyTorch exporter's messages about packages and calls outside fastllm."""
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
    """The model without its check of the ids, because a graph cannot inspect their values."""

    def __init__(self, model: DecoderModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        model, table = self.model, self.model.embedding_layer
        positions = table.position_table()
        if positions is not None:
            positions = positions[: input_ids.size(1)]
        x = embedding_ref(
            input_ids, Embedding(table.token_embeddings.weight, positions, table.scale)
        )
        for block in model.transformer_blocks:
            x = block(x)
        x = x if model.final_norm is None else model.final_norm(x)
        return model.capped(model.lm_head(x))
