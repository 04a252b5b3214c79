"""A trained model behind HTTP: the library of `python -m fastllm.serve`."""
