# Everything a person types. CI types the same.

# Which Python makes the virtual environment; 3.11 or newer.
PYTHON ?= python3
# More options for `pip install torch`, e.g. --index-url of a mirror that has CPU builds, or CUDA ones.
TORCH_PIP_ARGS ?=
# More options for pytest, e.g. ARGS="-k upload -x".
ARGS ?=
# More options for `modelpress demo`, e.g. DEMO_ARGS="--dir /tmp/demo".
DEMO_ARGS ?=

# Threads that spin while they wait take the core that another process needs; tests and benchmarks run several processes.
export OMP_WAIT_POLICY ?= PASSIVE

# Processes that share the tests. Those that bound seconds run by themselves afterwards.
WORKERS ?= 2

BIN := .venv/bin
STAMP := .venv/.installed
TORCH := $(shell grep "^torch==" requirements.lock)

# $(call tests,MARKERS): those in parallel, then all others; where ARGS names files, those alone.
# That ARGS finds nothing in one of the two is no failure (pytest's status 5).
PYTEST := $(BIN)/pytest -q
define tests
	$(if $(findstring tests/,$(ARGS)),$(PYTEST) -m "$(1)" $(ARGS),\
	$(PYTEST) -m "not timed and $(1)" -n $(WORKERS) --dist loadgroup $(ARGS); first=$$?; \
	test $$first -eq 0 || test $$first -eq 5 || exit $$first; \
	$(PYTEST) -m "timed and $(1)" $(ARGS); second=$$?; \
	test $$first -eq 0 && test $$second -eq 5 || exit $$second)
endef

.DEFAULT_GOAL := help
.PHONY: help setup demo serve lint check format test chaos fuzz gpu bench clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create .venv and install everything, pinned; instant when it is done
	@echo "Installed in .venv, as pinned in requirements.lock."

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "$(PYTHON) is not Python 3.11 or newer. Name one: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv \
		|| { rm -rf .venv; echo "$(PYTHON) cannot make virtual environments (Debian: apt install python3-venv)."; exit 1; }
	$(BIN)/python -m pip install --quiet -c requirements.lock pip setuptools
	@# torch by itself and first: whatever comes later is held to it, and cannot bring another build.
	$(BIN)/python -m pip install --quiet -c requirements.lock $(TORCH_PIP_ARGS) $(TORCH)
	$(BIN)/python -m pip install -qq -c requirements.lock --no-build-isolation -e '.[embedded,s3,traces,worker,dev]'
	@touch $@

demo: $(STAMP) ## Compress real models over HTTP and print what was gained and lost
	$(BIN)/modelpress demo $(DEMO_ARGS)

serve: $(STAMP) ## Run the service on this machine until Ctrl-C
	$(BIN)/modelpress serve

lint: $(STAMP) ## Format, lint, types, layers, migrations
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT \
		&& export MODELPRESS_DATA_DIR="$$scratch" DATABASE_URL= \
		&& $(BIN)/alembic upgrade head && $(BIN)/alembic check

check: lint ## The fast gate: lint, and the fast tests
	$(call tests,not slow and not e2e and not chaos and not gpu)

format: $(STAMP) ## Format the code and fix what ruff can fix
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format --quiet .

test: lint ## All of check and every test, against real servers that they start themselves
	$(call tests,not chaos and not gpu)

chaos: $(STAMP) ## Dozens of real jobs while everything they need is killed; minutes, and some root rights for a full disk
	$(PYTEST) -s -m chaos --timeout=3600 $(ARGS) tests/chaos

# More of them: make fuzz EXAMPLES=100000
EXAMPLES ?= 5000
fuzz: $(STAMP) ## Feed new damaged files, calls and orders of events to what reads, answers and keeps them, for minutes
	MODELPRESS_FUZZ_EXAMPLES=$(EXAMPLES) $(PYTEST) --timeout 0 $(ARGS) \
		tests/app/intake/test_headers_fuzzed.py tests/app/api/test_contract.py tests/app/db/test_job_machine.py

gpu: $(STAMP) ## The tests that need an NVIDIA GPU
	$(PYTEST) -m gpu $(ARGS) tests

# Parts of benchmarks, and those that build or install gigabytes of peers and need a model by name: run them by hand.
NOT_RUN := $(addprefix benchmarks/,figures.py machine.py growth_plot.py prune_plot.py synthetic_llama.py llamacpp_toolchain.py \
	onnx_peers.py onnx_vs_peers.py gguf_vs_llamacpp.py nf4_vs_bitsandbytes.py quantize_vs_peers.py prune_vs_peers.py \
	prune_criteria.py prune_hidden.py quantize_gpu.py distill.py)

bench: $(STAMP) ## All benchmarks; fails when a floor is missed
	@failed=0; for file in $(filter-out $(NOT_RUN),$(wildcard benchmarks/*.py)); do $(BIN)/python $$file || failed=1; done; exit $$failed

clean: ## Remove the environment, the caches and the demo; modelpress-data, with your models, stays
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist *.egg-info modelpress-demo
	find app workers migrations tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
