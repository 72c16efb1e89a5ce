# make demo, make test, make check: each sets up what it needs; a second call is quick.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all check benchmarks clean

help:
	@echo "make demo        train on this machine and look at the samples (a few minutes on 2 cores)"
	@echo "make test        the test suite, without the tests that take minutes each"
	@echo "make test-all    all of it: ten kills in a row, two nodes, whole studies, overload"
	@echo "make check       ruff, mypy and the test suite"
	@echo "make benchmarks  speed, as ratios measured in one run"
	@echo "make clean       remove the virtual environment and caches"
	@echo "PYTHON=python3.12 chooses the interpreter, VENV=folder the environment's place"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1); try make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/scoreray demo $(DEMO)

test: $(READY)
	$(BIN)/python -m pytest -m "not slow" $(TESTS)

test-all: $(READY)
	$(BIN)/python -m pytest $(TESTS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow" $(TESTS)

benchmarks: $(READY)
	$(BIN)/python benchmarks/step.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
