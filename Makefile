# `make demo` and `make test` work on a fresh machine that has Python 3.10-3.13 and nothing else.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

VENV   ?= .venv
PROMPT ?= def read(self
PYTEST_ARGS ?= --numprocesses auto
BENCH_ARGS  ?=

# The first interpreter that runs, is new enough and can make a virtual environment (Debian splits ensurepip off).
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null && { echo $$p; break; }; done)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq --constraint constraints.txt

export HF_HUB_OFFLINE := 1

.PHONY: help demo test lint bench report clean
help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

# One stamp: when it is newer than what it was made from, nothing is installed.
# torch first, alone and exact: any looser request, ours or a dependency's, may fetch a build with gigabytes of CUDA libraries.
STAMP := $(VENV)/.installed
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10-3.13 with venv found (on Debian: apt install python3-venv); or name one: make PYTHON=/path/to/python3"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing PyTorch into $(VENV)"
	@$(PIP) torch==2.13.0
	@echo "installing SpecRT and its other dependencies"
	@$(PIP) --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## compile the demo model for the CPU and generate text
	$(BIN)/compile demo/tiny-llama --out build/demo
	$(BIN)/specrt run build/demo --prompt "$(PROMPT)" --max-new-tokens 64

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## lint, then the tests
	$(BIN)/pytest $(PYTEST_ARGS)

bench: $(STAMP)  ## speed beside transformers and llama.cpp (builds llama.cpp: minutes, and needs a C++ compiler)
	@$(PIP) --editable '.[bench]'
	$(BIN)/python bench/cpu.py $(BENCH_ARGS)

report: $(STAMP)  ## the project's own precision report, into docs/evidence (minutes)
	$(BIN)/python tools/own_report.py

clean:  ## remove what make made
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
