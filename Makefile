# Each target first sets up what it needs; Python 3.10+ and a C++ compiler must be there.
# `make help` lists the targets.

PYTHON ?= python3
# Installed before the package, so that its wider requirement brings no other build. A CPU-only wheel
# of PyTorch, by name or by file, saves gigabytes of CUDA on a machine without a GPU:
# make TORCH=... demo
TORCH ?= torch==2.13.0
# Processes that share the tests. Each runs two threads, which wait asleep.
WORKERS ?= 2
# A file's tests stay in one process, which makes their fixtures once. Files start in the order of
# their names: the longest are not at the end.
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
HEAVY := subprocess or processes or kill or browser or compile or ray or deepspeed or slow
BIN := .venv/bin
# The package is built again when its metadata or a C++ source has changed; Python sources are used
# in place.
SOURCES := pyproject.toml setup.py $(wildcard csrc/*)

.PHONY: help install demo test test-all test-cuda sanitize bench lint docs clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' Makefile | expand -t 12

install: .venv/package  ## the package and what it needs to run, in .venv

.venv/torch: Makefile
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	touch $@

.venv/package: .venv/torch $(SOURCES)
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/development: .venv/torch $(SOURCES)
	$(BIN)/pip install --quiet --editable ".[test,lint,docs]"
	touch .venv/package $@

demo: install  ## train for about a minute on Python's documentation and print a sample
	$(BIN)/python -m fastllm.train --max_minutes 1 --epochs 20 \
		--max_seq_len 64 --batch_size 12 --hidden_size 128 --num_layers 4 --num_heads 4 --dropout 0 --lr 3e-3

test: .venv/development  ## the tests of every part, except those that start other programs: some minutes
	$(PYTEST) -m "not ($(HEAVY))"

test-all: .venv/development  ## all tests
	$(PYTEST)

test-cuda: .venv/development  ## the Triton kernels on this machine's GPU
	FASTLLM_TEST_TRITON=cuda $(BIN)/python -m pytest tests/triton

sanitize: .venv/development  ## the kernels under GCC's sanitizers: addresses, undefined, threads
	WORKERS=$(WORKERS) tests/sanitize/run

bench: .venv/development  ## time operations and whole training steps against PyTorch
	$(BIN)/python -m pytest benchmarks --benchmark-only
	$(BIN)/python -m fastllm.bench

lint: .venv/development  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/development  ## the documents as a site, in build/site; fails on a link that leads nowhere
	rm -rf build/pages && mkdir -p build/pages/benchmarks
	ln -s $(abspath $(wildcard *.md) docs) build/pages
	ln -s $(abspath benchmarks/RESULTS.md) build/pages/benchmarks
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:  ## remove what was built, .venv included
	rm -rf .venv build dist *.egg-info fastllm/*.so
