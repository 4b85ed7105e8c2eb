# make run [PROMPT="..."]   set up, start the daemon if none answers, chat with the embedded model
# make test | test-slow | test-sanitize | test-kernels | lint | bench | bench-cpu | bench-serve | bench-profile | soak [MINUTES=20] | clean
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
TORCH  := 2.13.0
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q
SOURCES := pyproject.toml setup.py constraints.txt $(shell find csrc -type f 2>/dev/null)

.PHONY: run test test-slow test-sanitize test-kernels lint bench bench-cpu bench-serve bench-profile soak clean

run: $(VENV)/.installed
	@$(BIN)/ollamapy quickstart $(if $(PROMPT),-- "$$PROMPT")

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

# The kernels' tests on a library with the address and undefined behaviour sanitizers: 5 minutes
test-sanitize: $(VENV)/.installed-dev
	$(BIN)/python -m tests.csrc.sanitize

# The GPU kernels' proofs that need no GPU, whole: Triton's and nvcc's compilers for every architecture too. 5 minutes on 2 cores
test-kernels: $(VENV)/.installed-dev
	$(BIN)/python -m tests.kernel_proofs

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# LLAMA_CPP_BIN=folder of llama-bench puts llama.cpp's figures beside ours; bench/notes/cpu.md says how they were got.
bench: $(VENV)/.installed-dev
	$(BIN)/python -m bench.cpu --short

bench-cpu: $(VENV)/.installed-dev
	@$(PIP) install -c constraints.txt -e ".[bench]" || echo "matplotlib cannot be installed: no picture"
	$(BIN)/python -m bench.cpu

bench-serve: $(VENV)/.installed-dev
	@$(PIP) install -c constraints.txt -e ".[bench]" || echo "matplotlib cannot be installed: no picture"
	$(BIN)/python -m bench.serve

# A daemon under mixed load; fails when memory, files or threads grow or anything is still held at the end
soak: $(VENV)/.installed-dev
	$(BIN)/python -m bench.soak --minutes $(or $(MINUTES),20)

bench-profile: $(VENV)/.installed-dev
	$(BIN)/python -m bench.profile_cpu

clean:
	rm -rf $(VENV) build *.egg-info ollamapy/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis

# An environment that already has a torch new enough is used as it is (a GPU machine's own build, for example).
$(VENV)/bin/python:
	@echo "making $(VENV)"
	@if $(PYTHON) -c 'import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)' 2>/dev/null; \
	  then $(PYTHON) -m venv --system-site-packages $(VENV); else $(PYTHON) -m venv $(VENV); fi

# Without an NVIDIA driver the CPU build is taken, from the configured index if it has one, else from PyTorch's own;
# only a platform for which neither has a CPU build (macOS: its one build) falls through to the plain package.
$(VENV)/.torch: $(VENV)/bin/python
	@$(BIN)/python -c 'import torch' 2>/dev/null || { echo "installing torch $(TORCH)"; \
	  if [ -e /proc/driver/nvidia/version ]; then $(PIP) install torch==$(TORCH); else \
	    $(PIP) install torch==$(TORCH)+cpu 2>/dev/null \
	    || $(PIP) install torch==$(TORCH)+cpu --index-url https://download.pytorch.org/whl/cpu 2>/dev/null \
	    || $(PIP) install torch==$(TORCH); fi; }
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	@echo "installing ollamapy and building its kernels"
	@$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing what the tests need"
	@$(PIP) install -c constraints.txt -e ".[dev]"
	@touch $@
