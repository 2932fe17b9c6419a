# Everything a newcomer needs: `make demo` and `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The GPU lock differs by faiss-gpu and its CUDA libraries alone; both hold every version with hashes and no addresses.
LOCK := $(shell if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then echo requirements-gpu.lock; else echo requirements.lock; fi)
STAMP := $(VENV)/.installed-$(LOCK)

export NO_ALBUMENTATIONS_UPDATE := 1
export RAY_USAGE_STATS_ENABLED := 0
export WANDB_MODE := disabled

.DEFAULT_GOAL := help
.PHONY: help demo test check bench docs lock cover clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP) ## the whole pipeline on a small drawn world: from URLs to a page of generated pictures
	$(BIN)/clipmill demo

test: $(STAMP) ## every test
	$(BIN)/python -m pytest -q

check: $(STAMP) ## ruff, mypy strict, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP) ## benchmarks against named rivals and limits
	$(BIN)/python -m benchmarks

docs: $(STAMP) ## write docs/commands.md anew from the configs
	$(BIN)/python docs/generate_commands.py

cover: $(STAMP) ## the tests with coverage figures
	$(BIN)/coverage run -m pytest -q
	$(BIN)/coverage combine -q
	$(BIN)/coverage report --skip-covered

lock: ## resolve pyproject.toml anew into both lock files
	uv pip compile -q --upgrade --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
		--extra cpu --extra dev --extra tensorboard pyproject.toml -o requirements.lock
	uv pip compile -q --upgrade --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
		--extra gpu --extra dev --extra tensorboard pyproject.toml -o requirements-gpu.lock

clean: ## remove the venv and the demo's output
	rm -rf $(VENV) demo

$(STAMP): requirements.lock requirements-gpu.lock pyproject.toml
	@command -v uv >/dev/null 2>&1 || [ -x $(BIN)/uv ] || { $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install -q uv; }
	@UV=$$(command -v uv || echo $(BIN)/uv); \
	[ -x $(BIN)/python ] || $$UV venv -q --python $(PYTHON) $(VENV); \
	$$UV pip install -q --python $(BIN)/python --require-hashes -r $(LOCK) && \
	$$UV pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $(STAMP)
