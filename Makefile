# make demo        train a tiny GLM-4.5V from real pictures to a Hugging Face folder (VARIANT=dense: GLM-4.1V)
# make test        the tests; test-fast: the inner loop (3 minutes); test-full: the slow ones too
# make check       format, lint, types; make format mends what can be mended
#
# Every target makes .venv with the versions of constraints.txt first, where they are missing.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
VARIANT ?= moe
PYTEST := $(BIN)/python -m pytest --forbid-skips

export OMP_NUM_THREADS ?= 1

.PHONY: demo demo-data test test-fast test-full check format clean

demo: $(VENV)/installed
	$(BIN)/python -m tools.demo --variant $(VARIANT)

demo-data: $(VENV)/installed
	$(BIN)/python -m tools.demo_data --out demo_out

test: $(VENV)/installed
	$(PYTEST) -m "not slow"

test-fast: $(VENV)/installed
	$(PYTEST) -m "fast and not slow"

test-full: $(VENV)/installed
	$(PYTEST)

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/installed: setup.py constraints.txt tools/venv.sh
	bash tools/venv.sh $(VENV)
	touch $@

clean:
	rm -rf $(VENV) demo_out build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
