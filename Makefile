# One word per habit. `make demo` and `make test` set up all they need in $(VENV).
PYTHON ?= python3
VENV ?= .venv
# auto, cpu, cuda or none: see README, "Building"
export MOSAIC_BUILD ?= auto

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(MOSAIC_BUILD)
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
DEMO ?= out/demo

# of benchmarks/gpu.sh: build test models kernels sanitize bench; all of them by default
PARTS ?=

.PHONY: build demo check test test-models test-kernels test-browser sanitize gpu bench clean

build: $(STAMP)

$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	rm -f $(VENV)/.installed-* mosaic_kernels/_C*.so
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Prune the embedded model by 30%, print dense beside pruned, draw both, write the page.
demo: build
	$(BIN)/mosaicdiff prune digits --sparsity 0.3 --output $(DEMO)/digits-30 --overwrite
	$(BIN)/mosaicdiff evaluate $(DEMO)/digits-30 --num-images 300 --grid $(DEMO)/grid.png
	$(BIN)/mosaicdiff report $(DEMO)/digits-30 --num-images 100 --steps 25 --guidance-scale 1,2 --output $(DEMO)/report.html

check: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check mosaicdiff benchmarks tests mosaic_kernels setup.py
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

test: build
	$(BIN)/python -m pytest

# Every family end to end: whole tiny pipelines, files in and out, compiled stages.
test-models: build
	$(BIN)/python -m pytest -m models

# The second tier: every kernel in every configuration, and the sanitizers.
test-kernels: build
	$(BIN)/python -m pytest -m kernels

# The report in headless Chromium (Debian: apt-get install chromium), at the width of a desk and of
# a phone; none, or one that does not start, is a failure.
test-browser: build
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,browser]'
	MOSAIC_REQUIRE_BROWSER=1 $(BIN)/python -m pytest -m browser

# Every program of csrc/host under the address, undefined and thread sanitizers; one that does
# not work here is a failure.
sanitize: build
	MOSAIC_REQUIRE_SANITIZERS=1 $(BIN)/python -m pytest -m kernels -k sanitizers

# On a machine with a CUDA device: build, test with the real kernels, measure. It uses $(PYTHON)
# as it is, with its torch, and needs no network.
gpu:
	PYTHON=$(PYTHON) benchmarks/gpu.sh $(PARTS)

# The slow measurements; each writes rows to benchmarks/results.
bench: build
	$(BIN)/python -m benchmarks.bench_quality cap
	$(BIN)/python -m benchmarks.bench_quality table
	$(BIN)/python -m benchmarks.bench_quality headline
	$(BIN)/python -m benchmarks.bench_guidance
	$(BIN)/python -m benchmarks.bench_allocation table
	$(BIN)/python -m benchmarks.bench_allocation stages
	$(BIN)/python -m benchmarks.bench_allocation sweep
	$(BIN)/python -m benchmarks.bench_obsdiff table
	$(BIN)/python -m benchmarks.bench_obsdiff inputs
	$(BIN)/python -m benchmarks.bench_obsdiff packages
	$(BIN)/python -m benchmarks.bench_obsdiff memory
	$(BIN)/python -m benchmarks.bench_obsdiff student
	$(BIN)/python -m benchmarks.bench_families
	$(BIN)/python -m benchmarks.bench_flow curves
	$(BIN)/python -m benchmarks.bench_flow rules
	$(BIN)/python -m benchmarks.bench_flow quality
	$(BIN)/python -m benchmarks.bench_speed
	$(BIN)/python -m benchmarks.bench_fused
	$(BIN)/python -m benchmarks.bench_bank
	$(BIN)/python -m benchmarks.bench_units
	$(BIN)/python -m benchmarks.bench_composition
	$(BIN)/python -m benchmarks.bench_hessian
	$(BIN)/python -m benchmarks.bench_cholesky
	$(BIN)/python -m benchmarks.bench_prune
	$(BIN)/python -m benchmarks.bench_joint
	$(BIN)/python -m benchmarks.bench_sweep
	$(BIN)/python -m benchmarks.bench_errors
	$(BIN)/python -m benchmarks.render

clean:
	rm -rf build out *.egg-info mosaic_kernels/_C*.so $(VENV)/.installed-*
