# Everything happens in .venv, which `make setup` makes; the other targets call it by themselves.
PYTHON ?= python3
BIN := .venv/bin
.PHONY: setup demo test lint fmt docs bench clean

setup: .venv/installed  ## .venv with torch, quantool (editable) and the tools of a developer

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install torch==2.13.0
	$(BIN)/python -m pip install -e '.[dev]' && touch $@

demo: setup  ## quantize SmolLM2-135M with AWQ and RTN, load it back, measure what was lost
	$(BIN)/python benchmarks/demo.py

test: setup  ## every test
	$(BIN)/python -m pytest -q

lint: setup  ## ruff, mypy --strict, the README's help blocks
	$(BIN)/ruff check && $(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python benchmarks/help_blocks.py --check

fmt: setup  ## format, and fix what can be fixed
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs: setup  ## the README's help blocks, from --help
	$(BIN)/python benchmarks/help_blocks.py

bench: setup  ## quantool beside its peers and llama.cpp, and the memory of a 4 GB checkpoint
	$(BIN)/python benchmarks/methods_vs_peers.py
	$(BIN)/python benchmarks/gguf_vs_llamacpp.py --json
	$(BIN)/python benchmarks/memory.py

clean:  ## back to a fresh clone
	rm -rf .venv build demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
