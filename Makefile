# make train : environment, data, one default run on the CPU, and a sample of what it learned
# make test  : environment and the tests, on all processors
# make lint  : environment and what reads the code without running it
# All may be repeated; what is already there is not done again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
READY := $(VENV)/.ready

.PHONY: train test setup lint clean

train: setup
	@$(BIN)/recurgolf
	@$(BIN)/recurgolf sample "$$(ls -td outputs/demo/*/ | head -n 1)" 'The history of' --label

test: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

setup: $(READY)

$(READY): pyproject.toml constraints.txt Makefile
	@PYTHON='$(PYTHON)' VENV='$(VENV)' TORCH='$(TORCH)' sh scripts/setup.sh
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo --no-cache

clean:
	rm -rf $(VENV)
