# Every target works on a fresh clone: `setup` makes the virtual environment that the others use.
VENV := .venv
PYTHON := $(VENV)/bin/python
DONE := $(VENV)/.installed
DEVICE ?= cpu
# Makes .venv: 3.11 or newer.
BASE_PYTHON ?= python3
# Versions that are known to work; CONSTRAINTS=/dev/null takes the newest, into a new .venv (make clean).
CONSTRAINTS ?= .ci/constraints.txt
# The folder with real data and weights that some tests use; they are skipped without it.
export CIFAR_TL_SHARED ?= $(if $(wildcard ../shared/data),$(abspath ../shared))

.PHONY: help setup demo train reproduce test test-fast check chaos bench tensorboard clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(DONE): pyproject.toml .ci/constraints.txt
	@$(BASE_PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else f"Python 3.11 or newer is needed, and this is {sys.version.split()[0]}: make setup BASE_PYTHON=python3.12, for one")'
	@! test -x $(PYTHON) || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || rm -rf $(VENV)
	$(BASE_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint $(CONSTRAINTS)
	touch $(DONE)

setup: $(DONE)  ## make .venv and install everything into it (7 GB, some minutes); BASE_PYTHON=python3.12 chooses the Python of a new one

demo: $(DONE)  ## both phases on generated images, offline, about a minute
	$(PYTHON) -m cifar_tl.train experiment=demo

train: $(DONE)  ## the default run on CIFAR-10; ARGS="key=value ..." overrides
	$(PYTHON) -m cifar_tl.train $(ARGS)

reproduce: $(DONE)  ## the published tables from data and weights; ARGS="data.root=..."
	$(PYTHON) -m cifar_tl.reproduce $(ARGS)

test: $(DONE)  ## all tests, as CI runs them
	$(PYTHON) -m pytest -n auto $(ARGS)

test-fast: $(DONE)  ## the tests that take seconds, while you work
	$(PYTHON) -m pytest -n auto -m "not slow" $(ARGS)

check: $(DONE)  ## lint, format, types, and imports that go downward only
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

chaos: $(DONE)  ## kill a run 50 times at random moments and go on with it, some minutes; ARGS="--kills 5"
	$(PYTHON) tests/chaos.py $(ARGS)

bench: $(DONE)  ## measure side by side; DEVICE=cuda, ARGS="--data-root FOLDER --weights FILE --only step"
	$(PYTHON) -m cifar_tl.benchmarks --device $(DEVICE) $(ARGS)

tensorboard: $(DONE)  ## open TensorBoard on all runs
	$(VENV)/bin/tensorboard --logdir outputs

clean:  ## remove .venv and caches, never outputs
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache build dist
