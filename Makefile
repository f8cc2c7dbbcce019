# One word per task. `make` alone lists them.

PYTHON  ?= python3
VENV    ?= .venv
CLIENTS ?= .venv-clients
MINUTES ?= 10
# Another index for torch alone, when the environment is created, for example
#   make run TORCH_INDEX=https://download.pytorch.org/whl/cu126
TORCH_INDEX ?=
# More arguments for `make test`, `make test-clients`, `make bench`, `make bench-gpu` and `make soak`
ARGS ?=

BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv run test test-slow fuzz test-clients check format lint-docker audit bench bench-gpu soak clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(VENV)/.runtime  ## create .venv with what the service needs

# float32, so that the numbers printed in the README come out to the last digit or two on any machine.
run: $(VENV)/.runtime  ## install and start the service, on the embedded model unless MODEL_BERTSCORE says otherwise
	MODEL_BERTSCORE="$${MODEL_BERTSCORE:-all-MiniLM-L6-v2}" GPU_DTYPE="$${GPU_DTYPE:-float32}" exec $(BIN)/python gpu_service.py

test: $(VENV)/.dev  ## install and run the tests
	$(BIN)/python -m pytest -q -m 'not slow' $(ARGS)

test-slow: $(VENV)/.dev  ## the tests that wait for timeouts and for processes to end
	$(BIN)/python -m pytest -q -m slow $(ARGS)

fuzz: $(VENV)/.dev  ## over 2,000 generated requests from the OpenAPI description
	FUZZ_EXAMPLES=300 $(BIN)/python -m pytest -q -s tests/test_fuzz.py $(ARGS)

test-clients: $(VENV)/.runtime $(CLIENTS)/.clients  ## real clients against the real service, in an environment of their own
	SERVICE_PYTHON="$(BIN)/python" $(CLIENTS)/bin/python -m pytest -q tests/clients $(ARGS)

check: $(VENV)/.dev  ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## format the code, and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint-docker: $(VENV)/.dev  ## lint both Dockerfiles
	$(BIN)/hadolint Dockerfile Dockerfile.rocm

audit: $(VENV)/.dev  ## known vulnerabilities of what is installed (asks an advisory service)
	$(BIN)/python -m pip install --quiet 'pip-audit>=2.9,<3'
	$(BIN)/pip-audit --path $$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')

bench: $(VENV)/.dev  ## measure against the alternatives on the CPU
	$(BIN)/python benchmarks/bench.py $(ARGS)

bench-gpu: $(VENV)/.dev  ## the same on a CUDA machine
	$(BIN)/python benchmarks/bench.py --gpu $(ARGS)

soak: $(VENV)/.dev  ## overload for MINUTES=10 and check every answer
	$(BIN)/python benchmarks/soak.py --minutes $(MINUTES) $(ARGS)

clean:  ## remove the environment and the caches
	rm -rf $(VENV) $(CLIENTS) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are written last, so an installation that broke off is done again, and one that is
# older than its requirements too.
$(VENV)/.runtime: requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and "Python 3.10 or newer is needed, $(PYTHON) is %d.%d: use make PYTHON=python3.12 ..." % v[:2])'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
ifneq ($(TORCH_INDEX),)
	grep '^torch[<>=]' requirements.txt > $(VENV)/torch.txt
	$(BIN)/python -m pip install --index-url $(TORCH_INDEX) -r $(VENV)/torch.txt
endif
	$(BIN)/python -m pip install -r requirements.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.runtime
	$(BIN)/python -m pip install -r requirements-dev.txt
	@touch $@

$(CLIENTS)/.clients: requirements-clients.txt
	$(CLIENTS)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install -r requirements-clients.txt
	@touch $@
