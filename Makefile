# Two commands: `make serve` runs Halftone, `make test` checks and tests it. Both set up everything they need.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install --constraint constraints.txt
EXTRAS ?=
PEERS ?= .peers
CONFIG ?=
ARGS ?=

.PHONY: help install install-dev kernels peers serve check format test test-fast clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# torch comes first and by its exact version, or another package's range would fetch a CUDA build.
$(VENV)/.serve: pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (once; a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@$(PIP) --editable '.$(EXTRAS)'
	@$(BIN)/python -m serve.kernels
	@touch $@

$(VENV)/.dev: $(VENV)/.serve
	@echo "Adding what the checks and tests need"
	@$(PIP) --editable '.[dev]'
	@touch $@

install: $(VENV)/.serve  ## Install what serving needs

install-dev: $(VENV)/.dev  ## Install what developing needs

kernels: install  ## Compile the kernels of every CPU that they know, as an image needs them
	@$(BIN)/python -m serve.kernels --every-cpu

serve: install  ## Serve the embedded model on 127.0.0.1:8000 (CONFIG=FILE, ARGS="--port 9000")
	@exec $(BIN)/halftone serve $(CONFIG) $(ARGS)

# Each peer has an environment of its own, outside our lock. llama.cpp is compiled for this processor (10 minutes), by clang
# where there is one: what GCC 12 makes of its AMX path dies at the first product.
CLANG := $(if $(shell command -v clang++),-DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++)
$(PEERS)/%/.installed: loadtest/engine/peers/requirements/%.txt
	@echo "Setting up $(@D)"
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@CMAKE_ARGS="-DGGML_NATIVE=ON $(CLANG)" $(@D)/bin/python -m pip --disable-pip-version-check --quiet install $(if $(filter vllm,$*),--no-deps) --requirement $<
	@touch $@

peers: $(foreach peer,llama.cpp vllm guidellm,$(PEERS)/$(peer)/.installed)  ## Install what `loadtest engine --peers` compares with

check: install-dev  ## Format, lint, types and import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install-dev  ## Put the code into its format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Two workers, a whole file each: the tests that wait and those that compute share two cores well.
test: check  ## Check, then run every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --durations 12 $(ARGS)

test-fast: install-dev  ## Only the fast tests
	$(BIN)/python -m pytest -m "not slow and not cluster and not browser" $(ARGS)

clean:  ## Remove the environment and every cache
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
