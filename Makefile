# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` set everything up themselves: a virtual environment with the built wheel of this project.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

SOURCES := pyproject.toml README.md LICENSE $(shell find anomalib_uniass autoload -type f ! -name '*.pyc')
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint docs dist venv clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## Train, test and export UniAS on images that packages ship, through the stock anomalib command
	@$(BIN)/python benchmarks/demo.py

# Two processes of one thread each take about half as long as one process of two threads. Distributed runs come alone:
# on a busy machine anomalib's processes may trip over each other where they make the folder of a run.
test: lint docs dist ## Lint, type check, build documentation and wheel, run the fast tests against it (what CI runs)
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m "not slow and not gpu" --ignore tests/test_distributed.py
	@$(BIN)/pytest -m "not slow and not gpu" tests/test_distributed.py

test-slow: $(INSTALLED) ## Run the slow tests and those that need a GPU
	@$(BIN)/pytest -m "slow or gpu"

lint: $(INSTALLED) ## Run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy anomalib_uniass autoload/_anomalib_uniass_autoload.py

docs: $(INSTALLED) ## Build the documentation, with warnings as errors
	@$(BIN)/sphinx-build -q -W --keep-going -c docs . $(VENV)/docs

dist: $(INSTALLED) ## Build what would be uploaded, and check it
	@rm -rf $(VENV)/dist
	@$(BIN)/python -m build --no-isolation --outdir $(VENV)/dist . > $(VENV)/dist.log || { cat $(VENV)/dist.log; exit 1; }
	@$(BIN)/twine check --strict $(VENV)/dist/*

venv: $(INSTALLED) ## Create or refresh the virtual environment

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache

# --force-reinstall: pip keeps an installed wheel of the same version otherwise. The second call adds what is missing.
$(INSTALLED): $(SOURCES) | $(BIN)/python
	rm -rf $(VENV)/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir $(VENV)/wheel .
	$(BIN)/python -m pip install --quiet --no-deps --force-reinstall $(VENV)/wheel/*.whl
	$(BIN)/python -m pip install --quiet "$$(echo $(VENV)/wheel/*.whl)[demo,test]"
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
