"""A trained model behind HTTP: what `python -m fastllm.serve` consists of."""
