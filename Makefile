# Everything happens in .venv, which `make setup` makes; the other targets call it by themselves. ON_GPU needs none.
PYTHON ?= python3
BIN := .venv/bin
ON_GPU = PYTHONPATH=. $(or $(wildcard $(BIN)/python),$(PYTHON))
.PHONY: setup demo kernels check-kernels test test-gpu lint fmt docs bench bench-gpu bench-convert clean

setup: .venv/installed  ## .venv with torch, quantool (editable) and the tools of a developer

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install torch==2.13.0
	$(BIN)/python -m pip install -e '.[dev]' && touch $@

demo: setup  ## quantize SmolLM2-135M with AWQ and RTN, load it back, measure what was lost
	$(BIN)/python benchmarks/demo.py

kernels: setup  ## compile the kernels ahead of time, CUDA's too: `pip wheel .` carries them
	$(BIN)/python -c 'from quantool.kernels import build; print(*build.ahead_of_time(), sep="\n")'

check-kernels: setup  ## registers and spills of the CUDA kernels, and their tests under AddressSanitizer and UBSan
	$(BIN)/python tests/kernels/nvcc.py
	$(BIN)/python tests/emulated.py tests/kernels

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

test-gpu:  ## the tests that need a GPU, on that of this machine; .venv or $(PYTHON), no network
	$(ON_GPU) -m pytest -q -m gpu tests/kernels/test_gpu_*.py tests/kernels/test_device.py

bench-gpu:  ## the CUDA kernels beside bf16 and others, on the GPU of this machine; .venv or $(PYTHON), no network
	$(ON_GPU) benchmarks/kernels.py

bench-convert:  ## encoders, GPTQ's loop, and an 8B checkpoint to W4 g128 and Q4_K_M (32 GB of disk in build/)
	$(ON_GPU) benchmarks/encode.py
	$(ON_GPU) benchmarks/gptq_loop.py
	$(ON_GPU) benchmarks/convert.py

clean:  ## back to a fresh clone
	rm -rf .venv build demo quantool/kernels/prebuilt *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
