# What each job needs it sets up first: a machine with Python 3.10+ and a C++ compiler is enough.

PYTHON ?= python3
# Installed before the package, whose wider requirement then brings no other build. A CPU-only wheel
# of it, by name or by file, saves gigabytes of CUDA on a machine without a GPU: make TORCH=... demo
TORCH ?= torch==2.13.0
BIN := .venv/bin
# Built again when the metadata or a C++ source has changed; Python sources are used in place.
SOURCES := pyproject.toml setup.py $(wildcard csrc/*)

.PHONY: install demo test test-cuda sanitize bench lint clean

install: .venv/package  ## the package and what it needs to run

.venv/package: $(SOURCES)
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/development: .venv/package
	$(BIN)/pip install --quiet --editable ".[test,lint]"
	touch $@

demo: install  ## train for about a minute on Python's documentation and print a sample
	$(BIN)/python -m fastllm.train --max_minutes 1 --epochs 20 \
		--max_seq_len 64 --batch_size 12 --hidden_size 128 --num_layers 4 --num_heads 4 --dropout 0 --lr 3e-3

test: .venv/development  ## the tests
	$(BIN)/python -m pytest

test-cuda: .venv/development  ## the Triton kernels on this machine's GPU
	FASTLLM_TEST_TRITON=cuda $(BIN)/python -m pytest tests/triton

sanitize: .venv/development  ## the kernels under GCC's sanitizers: addresses, undefined, threads
	tests/sanitize/run

bench: .venv/development  ## time operations and whole training steps against PyTorch
	$(BIN)/python -m pytest benchmarks --benchmark-only
	$(BIN)/python -m fastllm.bench

lint: .venv/development  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info fastllm/*.so
