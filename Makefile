# `make demo` and `make test` do all set-up themselves: a virtual environment in .venv with the releases of constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
INTEROP := .venv-interop
DEMO_OUTPUT ?= demo-output
BENCH_OUTPUT ?= bench-output
BENCH_FLAGS ?=
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-interop check bench bench-full docs clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY) ## port, export and run a real model; writes demo-output
	$(BIN)/edgeport demo -o $(DEMO_OUTPUT) --overwrite

test: $(READY) ## run the tests, but for the slow ones
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(READY) ## run all tests
	$(BIN)/python -m pytest

test-interop: $(READY) $(INTEROP)/.ready ## read ONNX outputs with optimum, in an environment of its own
	$(BIN)/python -m bench.interop $(INTEROP)/bin/python

check: $(READY) ## lint, check types, and check that the generated documentation is up to date
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check

bench: $(READY) ## measure accuracy against memory, and memory against the plan, in minutes; writes bench-output
	$(BIN)/edgeport bench --limit 200 -o $(BENCH_OUTPUT)/triage --overwrite
	$(BIN)/python -m bench.memory --depth-only -o $(BENCH_OUTPUT)/memory.json

# minutes on an H100 with 16 cores; on two cores, days: BENCH_FLAGS="--stages full --tasks triage --no-refits" and the like
bench-full: $(READY) $(BENCH_OUTPUT)/books ## the whole suite: evolved bases, patches, refits, all models
	$(BIN)/python -m bench.full -o $(BENCH_OUTPUT) --books $(BENCH_OUTPUT)/books $(BENCH_FLAGS)
	$(BIN)/python -m bench.memory
	$(BIN)/python -m bench.scale --measure Mistral-7B -o bench/results/scale.json

# the pages of three books, from Debian packages, which any Debian or Ubuntu can fetch; one book has all its pages again as one
$(BENCH_OUTPUT)/books:
	rm -rf $@.partial && mkdir -p $@.partial/handbook $@.partial/reference $@.partial/developers
	cd $@.partial && apt-get download debian-handbook debian-reference-en developers-reference && for package in *.deb; do dpkg -x $$package .; done
	cd $@.partial && cp usr/share/doc/debian-handbook/html/en-US/*.html handbook
	cd $@.partial && cp usr/share/debian-reference/*.html reference
	cd $@.partial && cp usr/share/developers-reference/*.html developers && rm developers/developers-reference.html developers/search.html
	rm -rf $@.partial/usr $@.partial/*.deb && mv $@.partial $@

docs: $(READY) ## write docs/cli.md and README's outputs anew from the program itself
	$(BIN)/python docs/generate.py

clean: ## remove outputs and caches; .venv stays
	rm -rf $(DEMO_OUTPUT) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +

$(INTEROP)/.ready: bench/interop-requirements.txt
	test -x $(INTEROP)/bin/python || $(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/python -m pip install --disable-pip-version-check -r bench/interop-requirements.txt
	@touch $@

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "edgeport needs Python 3.11 or newer; give one with make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV). Where pip has no wheel of llama-cpp-python it compiles one: about 6 minutes on 2 cores, silently, once."
	CMAKE_BUILD_PARALLEL_LEVEL=$(CORES) $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
