# make install     .venv with all that the other targets need; they call it when it is missing or outdated
# make demo        export penguin-nano for two engines, verify both, ask both about clips, draw the plan
# make nano        train penguin-nano from nothing and put it into the package; continues where it was stopped
# make test        the test suite without its slow tests; `make test PYTEST_ARGS=` runs them all
#                  TEST_WORKERS: how many processes share it; 0 runs it in one, as `--pdb` needs
# make peers       our bundles beside llama.cpp and onnxruntime-genai: makes models and packages once, then measures
# make native      build the compiled operators and install them into .venv; `make install` does it where there is a C++
#                  compiler
# make test-native the tests of the compiled operators, also under AddressSanitizer and UndefinedBehaviorSanitizer
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
TEST_WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PINS := .ci/constraints.txt
# Read from torch/version.py: it can be run before the packages that torch needs are there.
TORCH_BUILD = $(BIN)/python -c 'import importlib.util as u, runpy; v = runpy.run_path(u.find_spec("torch").submodule_search_locations[0] + "/version.py"); print(v["__version__"], "CUDA", v["cuda"])'

# The package works without them.
OPERATORS := $(if $(shell command -v $(CXX)),try-native,no-native)

.PHONY: help install native test-native demo demo-onnx demo-executorch nano peers test lint typecheck
help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

install: $(STAMP) $(OPERATORS)

# torch goes in first and alone, so that no other package chooses its build; then nothing may have replaced it.
$(STAMP): pyproject.toml $(PINS)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("got Python %d.%d, wanted 3.11 or newer: make install PYTHON=python3.11" % sys.version_info[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "$(PYTHON) cannot make virtual environments: install its venv package (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps -c $(PINS) $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") torch
	@$(TORCH_BUILD) | tee $(VENV)/.torch
	$(BIN)/python -m pip install --quiet -c $(PINS) -e '.[export,train,dev]'
	@now="$$($(TORCH_BUILD))"; was="$$(cat $(VENV)/.torch)"; \
	    [ "$$was" = "$$now" ] || { echo "torch was '$$was' and became '$$now': a dependency replaced it; remove $(VENV) and check $(PINS)" >&2; exit 1; }
	$(BIN)/python -m pip check
	@for room in export quantize runtime; do ln -sfn ../$$room penguin_edge/$$room; done
	@touch $@

# The compiled operators: a second distribution, which the first one works without. pip builds it in an environment of
# its own, where cmake and ninja come from the package registry if the system has none; both variables pin them there,
# one for each age of pip.
NATIVE := runtime/cpp
NATIVE_STAMP := $(VENV)/.native
NATIVE_FILES := $(shell find $(NATIVE) -type f -not -path '*/__pycache__/*')
SITE = $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')

.PHONY: no-native try-native
try-native: $(STAMP)
	@$(MAKE) --no-print-directory native || echo "the compiled operators could not be built (see above) and are left out" >&2

no-native:
	@echo "no C++ compiler '$(CXX)': the compiled operators are left out, and decoders use those of their engine" >&2

native: $(NATIVE_STAMP)
$(NATIVE_STAMP): $(STAMP) $(NATIVE_FILES)
	@command -v $(CXX) >/dev/null || { echo "got no C++ compiler '$(CXX)', wanted GCC 12 or Clang 16 or newer: apt install g++, or make native CXX=..." >&2; exit 1; }
	PIP_CONSTRAINT=$(abspath $(PINS)) PIP_BUILD_CONSTRAINT=$(abspath $(PINS)) $(BIN)/python -m pip install --quiet \
	    --no-deps --force-reinstall --config-settings=cmake.define.PENGUIN_EXECUTORCH=$(SITE)/executorch ./$(NATIVE)
	@touch $@

# cmake and ninja as the tests need them: the system's, or else those of .venv.
test-native: $(STAMP)
	@command -v cmake >/dev/null && command -v ninja >/dev/null || $(BIN)/python -m pip install --quiet -c $(PINS) cmake ninja
	@export PATH="$$PATH:$(abspath $(BIN))"; site="$(SITE)"; cd $(NATIVE); \
	for preset in release asan-ubsan; do \
	    cmake --preset $$preset -DPENGUIN_EXECUTORCH="$$site/executorch" \
	        -DPENGUIN_ONNXRUNTIME="$$(echo $$site/onnxruntime/capi/libonnxruntime.so.*)" >/dev/null; \
	    cmake --build --preset $$preset; \
	    ctest --preset $$preset; \
	done

CLIP := tests/media/polar_bear.mp4
DEMO := build/demo

demo: demo-onnx demo-executorch $(DEMO)/questions
	$(BIN)/penguin-edge plan $(CLIP) --budget 1600 -o $(DEMO)/plan.png
	$(BIN)/python tools/demo_table.py $(DEMO)/nano-onnx.json $(DEMO)/nano-executorch.json
	$(BIN)/python tools/demo_questions.py $(DEMO)/questions $(DEMO)/nano-onnx $(DEMO)/nano-executorch

demo-onnx demo-executorch: demo-%: $(STAMP) $(OPERATORS)
	@mkdir -p $(DEMO)
	$(BIN)/penguin-edge export --model nano --target $* --quant fp32 --overwrite -o $(DEMO)/nano-$*
	$(BIN)/penguin-edge verify $(DEMO)/nano-$*
	$(BIN)/penguin-edge run $(DEMO)/nano-$* --video $(CLIP) --budget 1600 --prompt "What is there after the scene changed?" \
	    --max-new-tokens 32 --json > $(DEMO)/nano-$*.json

$(DEMO)/questions: $(STAMP)
	@rm -rf $@
	$(BIN)/penguin-edge data nano --split heldout --tasks naming,position,counting,reading,motion,scene_change,before_cut,order --seed 3 --count 16 -o $@

# Ten runs, from few tasks to all: names and places of single objects; several objects and clips; counting and reading;
# pictures alone, which are cheap; all of it, with large clips; cuts; large clips again; counting, thrice. Seeds are fixed and
# --resume continues a run that was stopped; on another machine sums come in another order, so the weights differ. Each
# step takes 32 samples, shared by NANO_PROCESSES.
NANO := build/nano
NANO_PROCESSES ?= 2
NANO_TRAIN = OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node $(NANO_PROCESSES) -m penguin_edge train \
    --batch-size $$((32 / $(NANO_PROCESSES))) --threads 1 --workers 1 --resume --seed 0 --weight-decay 0.01 \
    --scope sequence --precision fp32 --no-gradient-checkpointing --no-length-group --save-every 500
NANO_SETS := $(addprefix $(NANO)/,single several reading clips more-several more-reading still-more-reading large-clips \
    tallies cuts census counts more-counts sums)
NANO_CLIPS := motion,scene_change,before_cut,order

$(NANO)/single: NANO_SET := --seed 0 --count 12000 --tasks closeup,naming,place
$(NANO)/several: NANO_SET := --seed 0 --count 18000 --tasks position,lookup,describe
$(NANO)/reading: NANO_SET := --seed 0 --count 20000 --tasks relation,counting,reading,transcribe
$(NANO)/clips: NANO_SET := --seed 0 --count 30000 --tasks $(NANO_CLIPS)
$(NANO)/more-several: NANO_SET := --seed 1 --count 60000 --tasks position,lookup,describe
$(NANO)/more-reading: NANO_SET := --seed 1 --count 60000 --tasks relation,counting,reading,transcribe
$(NANO)/large-clips: NANO_SET := --seed 2 --count 12000 --side 168 --tasks $(NANO_CLIPS)
$(NANO)/tallies: NANO_SET := --seed 3 --count 40000 --tasks tally,tally,tally,relation
$(NANO)/cuts: NANO_SET := --seed 3 --count 24000 --tasks scene_change
$(NANO)/census: NANO_SET := --seed 4 --count 60000 --tasks census
$(NANO)/still-more-reading: NANO_SET := --seed 4 --count 30000 --tasks reading,transcribe,relation
$(NANO)/counts: NANO_SET := --seed 5 --count 60000 --tasks count_any
$(NANO)/more-counts: NANO_SET := --seed 6 --count 60000 --tasks counting
$(NANO)/sums: NANO_SET := --seed 8 --count 66000 --tasks counting,count_both,counting
$(NANO_SETS): | $(STAMP)
	$(BIN)/penguin-edge data nano --split train $(NANO_SET) -o $@

nano: $(NANO_SETS)
	$(NANO_TRAIN) --out $(NANO)/1 --stage 3 --model nano --random-weights --data $(NANO)/single \
	    --learning-rate 1e-3 --min-lr-ratio 0.5 --max-steps 3000
	$(NANO_TRAIN) --out $(NANO)/2 --stage 3 --model $(NANO)/1/model \
	    --data $(NANO)/single=0.3 $(NANO)/several $(NANO)/clips=0.4 --tight-share 0.3 \
	    --learning-rate 1.5e-3 --min-lr-ratio 0.5 --max-steps 3000
	$(NANO_TRAIN) --out $(NANO)/3 --stage 4 --model $(NANO)/2/model \
	    --data $(NANO)/single=0.2 $(NANO)/several $(NANO)/reading=0.5 $(NANO)/clips --tight-share 0.3 \
	    --learning-rate 1.5e-3 --min-lr-ratio 0.02 --max-steps 3600
	$(NANO_TRAIN) --out $(NANO)/4 --stage 4 --model $(NANO)/3/model \
	    --data $(NANO)/single=0.2 $(NANO)/several $(NANO)/reading \
	    --learning-rate 1.5e-3 --min-lr-ratio 0.5 --max-steps 6000
	$(NANO_TRAIN) --out $(NANO)/5 --stage 4 --model $(NANO)/4/model \
	    --data $(NANO)/single=0.3 $(NANO)/more-several $(NANO)/more-reading $(NANO)/clips=0.7 $(NANO)/large-clips=0.5 \
	    --tight-share 0.4 --learning-rate 1.5e-3 --min-lr-ratio 0.02 --max-steps 9000
	$(NANO_TRAIN) --out $(NANO)/6 --stage 4 --model $(NANO)/5/model \
	    --data $(NANO)/single=0.2 $(NANO)/more-several=0.1 $(NANO)/more-reading=0.15 $(NANO)/tallies=0.8 \
	        $(NANO)/clips=0.4 $(NANO)/large-clips=0.1 $(NANO)/cuts \
	    --tight-share 0.15 --learning-rate 1.5e-3 --min-lr-ratio 0.02 --max-steps 3000
	$(NANO_TRAIN) --out $(NANO)/7 --stage 4 --model $(NANO)/6/model \
	    --data $(NANO)/single=0.1 $(NANO)/more-several=0.15 $(NANO)/still-more-reading=0.4 $(NANO)/census=0.8 \
	        $(NANO)/clips=0.4 $(NANO)/large-clips $(NANO)/cuts=0.25 \
	    --tight-share 0.15 --learning-rate 1.5e-3 --min-lr-ratio 0.02 --max-steps 3500
	$(NANO_TRAIN) --out $(NANO)/8 --stage 4 --model $(NANO)/7/model \
	    --data $(NANO)/single=0.1 $(NANO)/more-several=0.15 $(NANO)/still-more-reading=0.4 $(NANO)/counts \
	        $(NANO)/clips=0.5 $(NANO)/large-clips=0.8 $(NANO)/cuts=0.2 \
	    --tight-share 0.15 --learning-rate 1.5e-3 --min-lr-ratio 0.02 --max-steps 3500
	$(NANO_TRAIN) --out $(NANO)/9 --stage 4 --model $(NANO)/8/model \
	    --data $(NANO)/single=0.1 $(NANO)/more-several=0.1 $(NANO)/still-more-reading=0.25 $(NANO)/more-counts \
	        $(NANO)/clips=0.35 $(NANO)/large-clips=0.4 $(NANO)/cuts=0.1 \
	    --tight-share 0.15 --learning-rate 1.5e-3 --min-lr-ratio 0.02 --max-steps 3000
	$(NANO_TRAIN) --out $(NANO)/10 --stage 4 --model $(NANO)/9/model \
	    --data $(NANO)/single=0.1 $(NANO)/more-several=0.1 $(NANO)/still-more-reading=0.25 $(NANO)/sums \
	        $(NANO)/clips=0.35 $(NANO)/large-clips=0.4 $(NANO)/cuts=0.1 \
	    --tight-share 0.15 --learning-rate 1.5e-3 --min-lr-ratio 0.02 --max-steps 3500
	cp $(NANO)/10/model/* penguin_edge/assets/nano/

# PEERS_ARGS: what bench/peers/decoder_peers.py takes, such as `--shape 0.6b --threads 2 --repeat 3`.
PEERS := build/peers
PEERS_ARGS ?=

peers: $(STAMP)
	@$(BIN)/python bench/peers/decoder_peers.py --work $(PEERS) --torch-index "$(TORCH_INDEX)" $(PEERS_ARGS)

test: $(STAMP) $(OPERATORS)
	$(BIN)/python -m pytest -n $(TEST_WORKERS) $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(STAMP)
	$(BIN)/mypy -p penguin_edge
