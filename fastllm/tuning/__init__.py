"""Hyperparameter search: what `python -m fastllm.tune` consists of."""
