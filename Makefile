# The commands of attnprof, the same here and in CI. `make` alone lists them.
#
# Everything is installed into .venv, once; later calls see that nothing changed. An interpreter
# named with PY is used as it is, for all but the demo, and nothing is installed:
#     make gpu PY=python3

VENV := .venv
PY ?= $(VENV)/bin/python

# The first of these that is new enough makes .venv.
PYTHONS := python3 python3.13 python3.12 python3.11

DEV := $(VENV)/.installed-dev
DEMO := $(VENV)/.installed-demo
ifneq ($(PY),$(VENV)/bin/python)
DEV :=
endif

PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
GPU_RESULTS := benchmarks/results/gpu-latest.json

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo install test browser check gpu bench clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(DEMO) ## profile a small model: the first thing to try
	$(VENV)/bin/attnprof demo

install: $(DEV) ## make .venv, with attnprof and its tools in it

# Tests build their models from configurations; one that reaches for the network is a mistake.
test check gpu bench: export HF_HUB_OFFLINE := 1
# The models are small: two threads each, in two processes, would wait for each other.
test: export OMP_NUM_THREADS := 1

test: check browser ## run the checks, then the tests
	$(PY) -m pytest -n 2

browser: ## install Debian's Chromium, which the dashboard's tests drive, if that is possible
	@command -v chromium >/dev/null || \
	    { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -q && \
	      apt-get install -qy --no-install-recommends chromium; } || \
	    echo "There is no chromium, and it cannot be installed: tests in a browser are skipped"

check: $(DEV) ## format, lint, types and import directions, changing nothing
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -c 'from importlinter.cli import lint_imports_command as lint; lint()' --no-logo

gpu: export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
gpu: $(DEV) ## run what needs CUDA: the tests marked gpu, then the benchmark
	@$(PY) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else \
	    "make gpu: torch %s in %s sees no CUDA device; run it on a machine that has one" \
	    % (torch.__version__, sys.executable))'
	$(PY) -m pytest -m gpu
	@mkdir -p $(dir $(GPU_RESULTS))
	$(PY) benchmarks/gpu.py --json $(GPU_RESULTS)

bench: $(DEV) ## run the benchmarks that need no GPU
	$(PY) benchmarks/overhead.py
	$(PY) benchmarks/attribution.py
	$(PY) benchmarks/growth.py
	$(PY) benchmarks/what_if.py
	$(PY) benchmarks/escape_routes.py
	$(PY) benchmarks/kv_cache.py
	$(PY) benchmarks/paged_waste.py
	$(PY) benchmarks/predict.py
	$(PY) benchmarks/pytest_plugin.py
	$(PY) benchmarks/import_snapshot.py
	$(PY) benchmarks/dashboard.py

clean: ## remove .venv and all that tools have left here
	rm -rf $(VENV) .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name .git -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.made:
	@for python in $(PYTHONS); do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo "Making $(VENV) with $$($$python --version) ($$python)"; \
	        $$python -m venv $(VENV) && touch $@; exit; \
	    fi; \
	done; \
	echo "attnprof needs Python 3.11 or newer, and none of these is: $(PYTHONS)" >&2; exit 1

$(VENV)/.installed-dev: $(VENV)/.made pyproject.toml constraints.txt
	@echo "Installing attnprof and its tools into $(VENV); torch makes the first time a long one"
	@$(PIP) install --quiet --constraint constraints.txt --editable '.[test,dev]'
	@touch $@

$(VENV)/.installed-demo: $(VENV)/.made pyproject.toml constraints.txt
	@echo "Installing attnprof into $(VENV); torch makes the first time a long one"
	@$(PIP) install --quiet --constraint constraints.txt --editable '.[demo,dashboard]'
	@touch $@
