# Every target does the set-up it needs: .venv with Clew and its pinned dependencies. A second call does none.
.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.PHONY: help setup demo test lint unit chaos bench clean

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
export RAY_USAGE_STATS_ENABLED := 0

help: ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16

setup: $(READY) ## create .venv with everything in it

# uv where it is present, else venv and pip of the first Python from 3.11 to 3.13.
$(READY): pyproject.toml configs/constraints.txt
	@echo 'Installing Clew and its pinned dependencies into $(VENV): once, some minutes and about 6 GB.'
	@if command -v uv >/dev/null 2>&1; then \
	    [ -x $(BIN)/python ] || uv venv --quiet --python '>=3.11,<3.14' $(VENV); \
	    uv pip install --python $(BIN)/python -c configs/constraints.txt -e '.[test]'; \
	else \
	    if [ ! -x $(BIN)/python ]; then \
	        python=; \
	        for candidate in python3 python3.13 python3.12 python3.11 python; do \
	            if "$$candidate" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then \
	                python=$$candidate; break; \
	            fi; \
	        done; \
	        [ -n "$$python" ] || { echo 'Clew needs Python 3.11, 3.12 or 3.13 on PATH.' >&2; exit 1; }; \
	        "$$python" -m venv $(VENV); \
	    fi; \
	    quiet=; [ -t 1 ] || quiet=-qq; \
	    $(BIN)/python -m pip install --disable-pip-version-check $$quiet -c configs/constraints.txt -e '.[test]'; \
	fi
	@touch $@

demo: $(READY) ## the whole job on the shipped corpus, in minutes: curate, train, evaluate, sweep, report
	@$(BIN)/clew demo

test: lint ## lint, format, types, and all tests
	@$(BIN)/python -m pytest -n 2 --durations=15 --durations-min=10

lint: $(READY) ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

unit: $(READY) ## the fast tests alone
	@$(BIN)/python -m pytest -n 2 -m 'not slow and not chaos'

chaos: $(READY) ## tests that kill processes at random, a hundred times in a curation
	@CLEW_KILLS=100 $(BIN)/python -m pytest -m chaos

bench: $(READY) ## benchmarks against what a user would pick instead
	@for file in tests/benchmarks/bench_*.py; do PYTHONPATH=. $(BIN)/python "$$file"; done

clean: ## remove .venv, caches and build results (runs/ stays)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
