# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DATA   ?=
STAMP  := $(VENV)/.installed
# Waiting threads spin for a moment and then sleep, see hspsam_monai/cli/__init__.py.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 1000

.PHONY: help setup demo test test-all lint bench constraints clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)  ## make .venv and install the project with pinned versions

$(BIN)/uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

$(STAMP): pyproject.toml constraints.txt | $(BIN)/uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP)  ## the main job on embedded data, or on your images and masks: make demo DATA=folder
	$(BIN)/hspsam demo $(if $(DATA),--data "$(DATA)")

test: $(STAMP)  ## lint and the quick tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -m "not slow and not gpu" -q

test-all: $(STAMP)  ## every test
	$(BIN)/python -m pytest -q

lint: $(STAMP)  ## lint and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(STAMP)  ## benchmarks; results into benchmarks/RESULTS.md
	$(BIN)/python benchmarks/run.py

constraints: | $(BIN)/uv  ## pin what the project resolves to; keeps the pins that stand (delete a line to renew it)
	$(BIN)/uv pip compile pyproject.toml --extra dev --extra dicom --extra export --universal \
		--python-version 3.11 --no-emit-index-url --no-emit-find-links --no-annotate \
		--custom-compile-command "make constraints" --output-file constraints.txt

clean:  ## remove what demo and tests leave
	rm -rf demo .pytest_cache .ruff_cache
