# make train : environment, data, and one default run on the CPU
# make test  : environment and the tests
# Both may be repeated; what is already there is not done again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
READY := $(VENV)/.ready

.PHONY: train test setup lint clean

train: setup
	@$(BIN)/recurgolf

test: setup
	@$(BIN)/python -m pytest

setup: $(READY)

$(READY): pyproject.toml constraints.txt Makefile
	@PYTHON='$(PYTHON)' VENV='$(VENV)' TORCH='$(TORCH)' sh scripts/setup.sh
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV)
