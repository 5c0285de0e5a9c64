# Everything a developer runs, from a clean checkout:  make demo | test | docs | lint | typecheck | reliability | gpu | bench
#
# Each target makes the environment it needs (.venv) and installs into it only when pyproject.toml or
# constraints.txt have changed since.  Another interpreter to build .venv from:  make test PYTHON=python3.13
# An interpreter that already has everything, without a .venv:                   make gpu PY=python3

PYTHON ?= python3
VENV   := .venv

# Two workers with one thread each: torch's own threads would otherwise fight with the workers for the cores.
WORKERS     ?= 2
ONE_THREAD  := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
PYTEST_ARGS ?=

# `make gpu`: what the command line is asked to train
GPU_TESTS    := $(shell grep -l "mark.gpu" tests/test_*.py)
GPU_TRAINING ?= -m pyrodiff train digits --device cuda --training.precision bf16

FUZZ_SECONDS ?= 60

ifeq ($(origin PY),undefined)
PY        := $(VENV)/bin/python
PREPARED   = $(VENV)/.installed-test
else
PREPARED   =
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo docs docs-check test test-slow test-modes reliability mutants seeds fuzz lint format typecheck gpu bench clean

help:  ## print this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' \
	    | awk -F '\t' '{ printf "  make %-12s %s\n", $$1, $$2 }'

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"pyrodiff needs Python 3.11 or later, and $(PYTHON) is {v[0]}.{v[1]}: name another one with  make PYTHON=python3.11 ...")'
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# $(call install,EXTRA): the two files are the stamp's prerequisites, so that a changed dependency is installed
define install
	@echo "installing pyrodiff[$(1)] into $(VENV), about a minute the first time"
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$(1)]" -c constraints.txt
	@touch $@
endef

$(VENV)/.installed-demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(call install,demo)

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(call install,docs)

$(VENV)/.installed-fuzz: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(call install,fuzz)

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(call install,test)

demo: $(VENV)/.installed-demo  ## train on 8x8 digits, print bits per dimension, draw samples (minutes, on a CPU)
	$(VENV)/bin/pyrodiff train digits

docs: $(if $(PREPARED),$(VENV)/.installed-docs)  ## the documentation, every notebook executed; warnings are errors: docs/_build/html/index.html
	$(PY) -m sphinx -b html -W --keep-going -q docs docs/_build/html

docs-check: docs $(PREPARED)  ## the built pages: links, texts of pictures, every page in Chromium at two widths, where there is one; and what was installed for them
	DOCS_HTML=docs/_build/html $(PY) -m pytest tests/test_docs_browser.py tests/test_readme.py $(PYTEST_ARGS)

test: $(PREPARED)  ## the suite without the tests marked slow (those that need CUDA skip themselves where there is none)
	$(ONE_THREAD) $(PY) -m pytest -n $(WORKERS) -m "not slow" $(PYTEST_ARGS)

test-slow: $(PREPARED)  ## the rest of the suite
	$(ONE_THREAD) $(PY) -m pytest -n $(WORKERS) -m slow $(PYTEST_ARGS)

reliability: $(PREPARED)  ## both tiers, with coverage: measured against required, row by row of tests/reliability.py
	$(ONE_THREAD) $(PY) -m pytest -n $(WORKERS) --report=build/reliability.md --cov --cov-report= $(PYTEST_ARGS)

seeds: $(PREPARED)  ## the fast Monte Carlo tests 50 times with other seeds: half an hour
	$(ONE_THREAD) $(PY) -m pytest -n $(WORKERS) -m "monte_carlo and not slow" --seeds 50 $(PYTEST_ARGS)

fuzz: $(if $(PREPARED),$(VENV)/.installed-fuzz)  ## whatever reads files, by coverage-guided fuzzing: FUZZ_SECONDS for each of ten readers
	OMP_NUM_THREADS=1 $(PY) tests/fuzz.py $(FUZZ_SECONDS)

mutants: $(PREPARED)  ## random changes of the numeric modules, and whether their tests notice: build/mutants.csv
	$(ONE_THREAD) $(PY) tests/automatic_mutants.py --workers $(WORKERS)

test-modes: $(PREPARED)  ## the fast tests again with Pyro's validation off, and again under python -O
	$(ONE_THREAD) $(PY) -m pytest -n $(WORKERS) -m "not slow" --no-validation $(PYTEST_ARGS)
	$(ONE_THREAD) PYTHONOPTIMIZE=1 $(PY) -m pytest -n $(WORKERS) -m "not slow" $(PYTEST_ARGS)

lint: $(PREPARED)  ## ruff: rules and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(PREPARED)  ## let ruff repair what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

typecheck: $(PREPARED)  ## mypy over the library
	$(PY) -m mypy

# Exit code 3 stands for "no CUDA", so that a broken torch is still an error, and so is a driver too old for it (a warning of torch's).
# A GPU machine often has a bare pytest: options and settings of plugins are no error here.
gpu: $(PREPARED)  ## tests marked gpu and a training run on CUDA; says so and ends well where there is none
	@rc=0; $(PY) -c 'import sys, torch, warnings; warnings.simplefilter("error"); sys.exit(0 if torch.cuda.is_available() else 3)' || rc=$$?; \
	if [ $$rc -eq 3 ]; then echo "make gpu: SKIPPED, torch sees no CUDA device on this machine (simulated: make test-slow PYTEST_ARGS=tests/test_simulated_cuda.py)"; exit 0; fi; \
	if [ $$rc -ne 0 ]; then echo "make gpu: could not ask torch for a CUDA device" >&2; exit $$rc; fi; \
	set -ex; \
	$(PY) -m pytest -o addopts=--strict-markers -W ignore::pytest.PytestConfigWarning \
	    -m gpu $(GPU_TESTS) $(PYTEST_ARGS); \
	$(PY) $(GPU_TRAINING)

bench: $(PREPARED)  ## run every script in benchmarks/
	@set -e; for script in benchmarks/[!_]*.py; do \
	    [ -e "$$script" ] || { echo "no scripts in benchmarks/"; break; }; \
	    echo "== $$script"; $(PY) "$$script"; \
	done

clean:  ## remove .venv, caches and builds (runs/ stays)
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage* docs/_build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
