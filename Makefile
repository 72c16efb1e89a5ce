# make demo, make test, make check: each sets up what it needs; a second call is quick.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MARK := not slow
READY := $(VENV)/.ready
# Tests that start Ray, one after another. All others, in a process for each core, at a low priority beside them: Ray's
# tests wait for processes to start and to die in half of their time.
SERIAL := $(addprefix tests/,cluster tune k8s/test_policies.py docs/test_prometheus.py sampling/offline/test_job.py \
  sampling/service/test_ray.py sampling/test_gpu.py trainer/test_gpu.py trainer/test_quarantined.py \
  trainer/test_tracking.py \
  $(addprefix trainer/on_ray/test_,deaths.py failures.py monitor.py run.py two_nodes.py unpacked.py workers.py))
COMPUTING_LOG := $(VENV)/computing-tests.log
# uv compiles no module when it installs. Without compiled files each of the hundreds of processes that tests start
# compiles torch, Ray and DeepSpeed again: 15 s of CPU time instead of 5.
unexport PYTHONDONTWRITEBYTECODE

# uv installs in a quarter of pip's time. It reads none of pip's settings, so where pip is set to take packages from, uv
# is given; where it can't be had, or fails, pip does all.
PIP = $(BIN)/python -m pip --quiet --disable-pip-version-check
pip_setting = $$($(BIN)/python -m pip config get global.$(1) 2>/dev/null)
uv = UV_SYSTEM_CERTS=1 UV_FIND_LINKS="$(call pip_setting,find-links)" UV_DEFAULT_INDEX="$(call pip_setting,index-url)" \
  $(BIN)/uv pip install --quiet --python $(BIN)/python
install = { $(PIP) install uv && $(uv) -c constraints.txt $(1); } 2>/dev/null || $(PIP) install -c constraints.txt $(1)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all check benchmarks site clean

help:
	@echo "make demo        train on this machine and look at what comes out: 4 minutes of training (DEMO=--quick: a half)"
	@echo "make test        the test suite, without the tests that take minutes each"
	@echo "make test-all    all of it: ten kills in a row, two nodes, whole studies, overload"
	@echo "make check       ruff, mypy and the test suite"
	@echo "make benchmarks  speed, as ratios measured in one run"
	@echo "make site        the documentation as a site, in site/: open site/index.html"
	@echo "make clean       remove the virtual environment and caches"
	@echo "PYTHON=python3.12 chooses the interpreter, VENV=folder the environment's place"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1); try make PYTHON=python3.12"; exit 2; }
	@echo "Installing into $(VENV): about a minute"
	$(PYTHON) -m venv $(VENV)
	@$(call install,torch)
	@$(call install,-e '.[dev]')
	@touch $@

demo: $(READY)
	$(BIN)/scoreray demo $(DEMO)

test: $(READY)
ifdef TESTS
	$(BIN)/python -m pytest -m "$(MARK)" $(TESTS)
else
	status=0; \
	  nice -n 10 $(BIN)/python -m pytest -m "$(MARK)" -n auto --maxprocesses 8 --dist loadfile \
	    --no-loadscope-reorder $(addprefix --ignore=,$(SERIAL)) >$(COMPUTING_LOG) 2>&1 & computing=$$!; \
	  trap 'kill $$computing 2>/dev/null' EXIT INT TERM; \
	  $(BIN)/python -m pytest -m "$(MARK)" $(SERIAL) || status=$$?; \
	  wait $$computing || status=$$?; \
	  cat $(COMPUTING_LOG); \
	  exit $$status
endif

test-all: MARK :=
test-all: test

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@$(MAKE) --no-print-directory test

benchmarks: $(READY)
	$(BIN)/python benchmarks/step.py

# The theme's authors announce its successor at each start.
site: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
