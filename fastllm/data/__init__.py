"""Text files to batches of tokens: reading, cleaning, token arrays, datasets."""

from fastllm.data.loader import TextDataset, create_dataloader
from fastllm.data.text import clean_lines, read_text

__all__ = ["TextDataset", "clean_lines", "create_dataloader", "read_text"]
