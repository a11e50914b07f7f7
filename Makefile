# Two commands: `make train` and `make test`. Both make .venv first, once.

PYTHON ?= python3
BIN := .venv/bin

# Pyright follows no package path made at run time: links show it the rooms under their name.
ROOMS = mkdir -p .venv/rooms/tritium && cd .venv/rooms/tritium && \
	ln -sfn ../../../tritium/__init__.py . && for room in kernels model data training bench; do ln -sfn ../../../$$room .; done

.PHONY: train test lint static clean

train: .venv/installed
	$(BIN)/python train.py $(ARGS)

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

.venv/installed: pyproject.toml
	@echo "Installing Tritium and what it needs into .venv: once, about 2 GB, some minutes."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -e '.[dev]'
	$(ROOMS)
	touch $@

static: .venv/installed
	$(BIN)/python -m tritium.bench static

clean:
	rm -rf .venv runs
