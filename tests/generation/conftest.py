import pytest
import torch

from fastllm import DecoderModel


@pytest.fixture(scope="module")
def model() -> DecoderModel:
    torch.manual_seed(0)
    model = DecoderModel(11, 16, 2, 2, max_seq_len=12).eval()
    for p in model.parameters():  # the logits of an untrained model are nearly uniform
        p.data *= 3
    return model
