"""Timing fastllm against stock PyTorch and the machine's limits."""
