import torch

from fastllm.benchmarking.shapes import CONFIGS


def test_flops_by_hand() -> None:
    # A layer's products for one token: 12 matrices of 64 x 64, a multiplication and an addition
    # for each of their numbers. 512 tokens: 2 * 512 * 12 * 4096.
    linear = 50_331_648
    # 32 queries against 32 keys of 64 numbers, and the weights times the values, for 16 sequences:
    # 2 * 2 * 16 * 1024 * 64.
    attention = 4_194_304
    # 512 tokens times a matrix of 64 x 66: 2 * 512 * 4224.
    head = 4_325_376
    # Two layers; the backward counts as two forwards.
    assert CONFIGS["A"].flops == 3 * (2 * (linear + attention) + head) == 340_131_840


def test_random_ids_are_a_batch_of_the_vocabulary() -> None:
    ids = CONFIGS["A"].random_ids()
    assert ids.shape == (16, 32) and ids.dtype == torch.int64
    assert ids.min() >= 0 and ids.max() < 66
