# make quickstart   text -> tokenizer -> pretraining at tp 2 -> continued at dp 2 -> samples
# make test         the test suite
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install quickstart test test-transformers lint bench clean

help:  ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-18s %s\n", $$1, $$2 }' Makefile

$(INSTALLED): requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

install: $(INSTALLED)  ## Create .venv and install requirements.txt

quickstart: $(INSTALLED)  ## Train a small model on real text, continue it at another layout, sample
	@PATH="$(abspath $(BIN)):$$PATH" bash examples/quickstart/run.sh

test: $(INSTALLED)  ## Run the test suite
	$(BIN)/python -m pytest

test-transformers:  ## Test the exported model's code with the oldest and other versions of transformers
	@set -e; for version in 4.53.3 4.57.6; do \
	  environment=build/transformers-$$version; \
	  test -x $$environment/bin/pytest || { $(PYTHON) -m venv $$environment; \
	    $$environment/bin/pip install -q torch==2.13.0 transformers==$$version \
	      numpy safetensors pytest scipy tqdm; }; \
	  HF_MODULES_CACHE=$$(mktemp -d) $$environment/bin/python -m pytest -p no:cacheprovider \
	    tests/hf/test_model.py tests/hf/test_generation.py; \
	done

lint: $(INSTALLED)  ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(INSTALLED)  ## Run all benches; writes their tables into docs/performance.md
	$(BIN)/python -m megatron_ext.kernels.gidd_loss.bench
	$(BIN)/python -m megatron_ext.measure run

clean:  ## Remove the environment and everything the quickstart made
	rm -rf $(VENV) data/quickstart runs/quickstart
