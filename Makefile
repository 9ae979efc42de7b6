# Two commands set everything up on a fresh machine: `make demo` and `make test`.

PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
DEMO ?= runs/demo

.PHONY: help demo test soak lint format benchmarks clean

help:  ## Show this list.
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-12s %s\n", $$1, $$2}' Makefile

demo: .venv/installed  ## Compare three strategies over three seeds on real digits, with a report.
	@if [ -f $(DEMO)/comparison.toml ]; then \
		echo "$(DEMO) is there already: going on with it (delete it to start anew)."; \
		$(BIN)/fedgraft compare --resume $(DEMO); \
	else \
		$(BIN)/fedgraft compare examples/digits.toml --out $(DEMO); \
	fi

test: .venv/installed  ## Run all tests, slow ones included.
	$(BIN)/python -m pytest -n auto --dist worksteal

soak: .venv/installed  ## Run the long tests of real processes, in which faults are injected.
	$(BIN)/python -m pytest -m soak
	$(BIN)/python benchmarks/soak.py

lint: .venv/installed  ## Check style, types and the four floors.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/installed  ## Put the code in shape.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmarks: .venv/installed  ## Measure against the rivals (results belong in BENCHMARKS.md).
	$(BIN)/python benchmarks/aggregation.py
	$(BIN)/python benchmarks/simulation.py
	$(BIN)/python benchmarks/packing.py
	$(BIN)/python benchmarks/base_memory.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/private_training.py
	$(BIN)/python benchmarks/deployment.py

clean:  ## Remove what make created, runs excepted.
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info build dist

.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "FedGraft needs Python 3.11 or newer; set PYTHON=/path/to/it."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
