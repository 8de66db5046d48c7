# Every target does its own set-up: a virtual environment in .venv, made once from $(PYTHON) and made up to date again
# when pyproject.toml or constraints.txt change. Python, make and pip are all that the machine needs.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help train test test-slow test-gpu test-oldest lint check-wheel docs clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "make %-12s %s\n", $$1, $$2 }'

train: $(READY) ## Train RevNet-38 and ResNet-32 on real digits and compare them
	$(BIN)/python experiments/quickstart.py

test: lint check-wheel ## Lint, types, the wheel check, then every test that is neither slow nor for a GPU
	$(BIN)/python -m pytest -m "not slow and not gpu" --promises --numprocesses 2 --dist loadfile

test-slow: $(READY) ## The tests that take long
	$(BIN)/python -m pytest -m "slow and not gpu" --numprocesses 2

test-gpu: $(READY) ## The tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

test-oldest: ## The tests on the oldest supported torch, in an environment of their own
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install 'torch==2.11.*' 'torchvision==0.26.*' 'pytorch-lightning==2.6.0' \
		--editable '.[dev]'
	.venv-oldest/bin/python -m pytest -m "not slow and not gpu" --numprocesses 2 --dist loadfile

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

check-wheel: $(READY) ## Build the wheel and use it away from the checkout
	.ci/check_wheel $(BIN)/python

docs: $(READY) ## API documentation, as pages in build/api
	$(BIN)/python -m pdoc -d google -o build/api revnet revnet.reversible revnet.models revnet.flows \
		revnet.profiling revnet.data revnet.training revnet.report revnet.cli revnet.train revnet.evaluate \
		revnet.predict revnet.sample revnet.profile revnet.shards revnet.timm revnet.torchvision

clean: ## Remove the environment and everything that tools have written
	rm -rf .venv .venv-oldest build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A Python without ensurepip cannot put pip into the environment; its own pip then does.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv || { $(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip install --target \
		"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" pip; }
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	touch $@
