# make install     .venv with all that the other targets need; they call it when it is missing or outdated
# make demo        export a random model for two engines, verify both, ask both about a clip, draw the plan
# make test        the test suite without its slow tests; `make test PYTEST_ARGS=` runs them all
# make lint        ruff, rules and format
# make typecheck   mypy
#
# PYTHON       the interpreter that .venv is made from, 3.11 or newer
# TORCH_INDEX  where torch comes from; empty: the default registry. For another build of torch (CPU only, another
#              CUDA) set it to the index URL that pytorch.org names, before the first `make install`.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH_INDEX ?=
PYTEST_ARGS ?= -m "not slow"

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PINS := .ci/constraints.txt
# Read from torch/version.py: it can be run before the packages that torch needs are there.
TORCH_BUILD = $(BIN)/python -c 'import importlib.util as u, runpy; v = runpy.run_path(u.find_spec("torch").submodule_search_locations[0] + "/version.py"); print(v["__version__"], "CUDA", v["cuda"])'

.PHONY: help install demo demo-onnx demo-executorch test lint typecheck
help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

install: $(STAMP)

# torch goes in first and alone, so that no other package chooses its build; then nothing may have replaced it.
$(STAMP): pyproject.toml $(PINS)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("got Python %d.%d, wanted 3.11 or newer: make install PYTHON=python3.11" % sys.version_info[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "$(PYTHON) cannot make virtual environments: install its venv package (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps -c $(PINS) $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") torch
	@$(TORCH_BUILD) | tee $(VENV)/.torch
	$(BIN)/python -m pip install --quiet -c $(PINS) -e '.[export,dev]'
	@now="$$($(TORCH_BUILD))"; was="$$(cat $(VENV)/.torch)"; \
	    [ "$$was" = "$$now" ] || { echo "torch was '$$was' and became '$$now': a dependency replaced it; remove $(VENV) and check $(PINS)" >&2; exit 1; }
	$(BIN)/python -m pip check
	@touch $@

CLIP := tests/media/polar_bear.mp4
DEMO := build/demo

demo: demo-onnx demo-executorch
	$(BIN)/penguin-edge plan $(CLIP) --budget 1600 -o $(DEMO)/plan.png
	$(BIN)/python tests/demo_table.py $(DEMO)/tiny-onnx.json $(DEMO)/tiny-executorch.json

demo-onnx demo-executorch: demo-%: $(STAMP)
	@mkdir -p $(DEMO)
	$(BIN)/penguin-edge export --model tiny --random-weights --target $* --quant fp32 --overwrite -o $(DEMO)/tiny-$*
	$(BIN)/penguin-edge verify $(DEMO)/tiny-$*
	$(BIN)/penguin-edge run $(DEMO)/tiny-$* --video $(CLIP) --budget 1600 --prompt "What happens in this clip?" \
	    --max-new-tokens 32 --json > $(DEMO)/tiny-$*.json

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy cannot follow the mapping of export/, quantize/ and runtime/ into the package: it is given a tree of links.
typecheck: $(STAMP)
	@rm -rf build/typecheck && mkdir -p build/typecheck/penguin_edge
	@ln -s $(CURDIR)/penguin_edge/* $(CURDIR)/export $(CURDIR)/quantize $(CURDIR)/runtime build/typecheck/penguin_edge/
	cd build/typecheck && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p penguin_edge
