# make quickstart   text -> tokenizer -> pretraining at tp 2 -> continued at dp 2 -> samples
# make test         the test suite
VENV ?= .venv
PYTHON ?= python3
JOBS ?= 2
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install quickstart test test-transformers test-latest lint bench clean

help:  ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-18s %s\n", $$1, $$2 }' Makefile

$(INSTALLED): requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

install: $(INSTALLED)  ## Create .venv and install requirements.txt

quickstart: $(INSTALLED)  ## Train a small model on real text, continue it at another layout, sample
	@PATH="$(abspath $(BIN)):$$PATH" bash examples/quickstart/run.sh

test: $(INSTALLED)  ## Run the test suite, JOBS=2 files at a time
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

test-transformers: $(INSTALLED)  ## Test the exported model's code with other versions of transformers
	$(BIN)/python -m tests.hf.environments 4.53.3 4.57.6

test-latest: $(INSTALLED)  ## Run the test suite with the newest megatron-core (needs Python 3.12, several GB)
	$(BIN)/python -m tests.latest $(ARGS)

lint: $(INSTALLED)  ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(INSTALLED)  ## Run all benches; writes their tables into docs/performance.md
	$(BIN)/python -m megatron_ext.measure run

clean:  ## Remove the environment and everything the quickstart made
	rm -rf $(VENV) build/transformers-* build/latest-* data/quickstart runs/quickstart
