# make quickstart   from raw text to a small trained Taipan that writes a sentence
# make test         the test suite            make test-all   the slow tests too
# make test-kernels the Triton kernels on a CPU, in Triton's interpreter
# make lint         style, format and types   make format     applies what ruff can fix
# make clean        removes what the others made
#
# The first of them that runs makes the environment: VENV (default .venv), from constraints.txt. It needs Python 3.10 or
# newer with the venv module: PYTHON=python3.12 chooses another interpreter.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One thread a process: the tests and the quickstart start several processes on few cores.
RUN := PATH="$(abspath $(BIN)):$$PATH" OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
CODE := megatron_taipan data_prep checkpoints launch benchmarks experiments examples tests setup.py

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test test-all test-kernels lint format clean

help:
	@sed -n '1,8s/^# //p' Makefile

venv: $(STAMP)

$(STAMP): constraints.txt setup.py megatron_taipan/__init__.py launch/install.sh
	launch/install.sh "$(PYTHON)" "$(VENV)"
	@touch "$@"

quickstart: $(STAMP)
	@$(RUN) launch/quickstart.sh

test: $(STAMP)
	$(RUN) python -m pytest -m "not slow and not manual" $(PYTEST_ARGS)

test-all: $(STAMP)
	$(RUN) python -m pytest -m "not manual" $(PYTEST_ARGS)

# Triton, and the newest numpy that its interpreter works with, beside the environment: no other test may find them.
INTERPRETER := $(abspath $(VENV))/interpreter
$(INTERPRETER)/.installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target "$(INTERPRETER)" \
	    $$(sed -n 's/^# interpreter: //p' constraints.txt)
	@touch "$@"

test-kernels: $(INTERPRETER)/.installed
	$(RUN) TRITON_INTERPRET=1 PYTHONPATH="$(INTERPRETER)" python -m pytest -m "not gpu and not manual" \
	    -W ignore::RuntimeWarning -W ignore::DeprecationWarning $(PYTEST_ARGS) \
	    $$(grep -lE 'DEVICES|interpreted_only' tests/ops/test_*.py)

lint: $(STAMP)
	$(RUN) ruff check $(CODE)
	$(RUN) ruff format --check $(CODE)
	$(RUN) mypy

format: $(STAMP)
	$(RUN) ruff check --fix $(CODE)
	$(RUN) ruff format $(CODE)

clean:
	rm -rf .venv build dist *.egg-info runs/quickstart .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
