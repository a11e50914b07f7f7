# Two commands: `make train` and `make test`. Both make .venv first, once.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test lint static clean

train: .venv/installed
	$(BIN)/python train.py $(ARGS)

test: .venv/installed
	$(BIN)/python -m pytest -q $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

static: .venv/installed
	$(BIN)/python -m tritium.bench static

clean:
	rm -rf .venv runs
