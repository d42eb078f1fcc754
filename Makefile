PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types check bench clean

help: ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

setup: $(STAMP) ## create .venv and install polar_ray with its pinned dependencies

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "polar_ray needs Python 3.11 or newer; name one with: make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $(STAMP)

demo: setup ## score the demo's triples with the embedded checkpoint and rank them
	$(BIN)/polar-ray score jobs/demo/triples.parquet --output build/demo --fresh
	$(BIN)/polar-ray rank build/demo
	@echo "rewards: build/demo    report: build/demo/_polar_ray/report.html"

test: setup ## run every test
	$(BIN)/python -m pytest

lint: setup ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## check types
	$(BIN)/mypy

check: lint types test ## all three

bench: setup ## compare the torch engine with padded batches, in bf16 and fp32
	$(BIN)/polar-ray bench engine --shape small

clean: ## remove what make made
	rm -rf $(VENV) build dist *.egg-info
