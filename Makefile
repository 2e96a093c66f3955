# make quickstart   text -> tokenizer -> pretraining at tp 2 -> continued at dp 2 -> samples
# make test         the test suite
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install quickstart test lint bench clean

help:  ## This list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

$(INSTALLED): requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

install: $(INSTALLED)  ## Create .venv and install requirements.txt

quickstart: $(INSTALLED)  ## Train a small model on real text, continue it at another layout, sample
	@PATH="$(abspath $(BIN)):$$PATH" bash examples/quickstart/run.sh

test: $(INSTALLED)  ## Run the test suite
	$(BIN)/python -m pytest

lint: $(INSTALLED)  ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(INSTALLED)  ## Measure the loss: time and peak memory by implementation
	$(BIN)/python -m megatron_ext.kernels.gidd_loss.bench

clean:  ## Remove the environment and everything the quickstart made
	rm -rf $(VENV) data/quickstart runs/quickstart
