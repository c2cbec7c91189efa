# Every target makes .venv first when it is missing or out of date; nothing but Python, make and gcc is assumed.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
PY := $(VENV)/bin/python
# Written last, so a venv without it is half-made. Holds the checkout's path: a venv does not survive being moved.
STAMP := $(VENV)/.installed
SOAK_SEEDS ?= 0:100000
SOAK_TESTS ?=
# `make compat COMPAT_PYTHONS=3.13 COMPAT_TORCH=2.6.0` runs one corner; without COMPAT_TORCH constraints.txt says which.
COMPAT_PYTHONS ?= 3.10 3.11 3.12 3.13
COMPAT_TORCH ?=
COMPAT_TESTS ?=

.PHONY: help venv demo test lint soak bench bench-venv bench-rival docs compat clean distclean FORCE

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP) ## create or refresh .venv with Everstep and its development tools

# The stamp counts only while the interpreter runs and the checkout is where it was.
ifneq ($(wildcard $(STAMP)),)
ifneq ($(shell $(PY) -c pass 2>/dev/null && grep -qxF '$(CURDIR)' $(STAMP) && echo usable),usable)
$(STAMP): FORCE
endif
endif

$(STAMP): pyproject.toml constraints.txt
	@if ! { $(PY) -c pass && grep -qxF '$(CURDIR)' $(STAMP); } >/dev/null 2>&1; then \
	  python=; \
	  for candidate in python3.11 python3; do \
	    if $$candidate -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then \
	      python=$$candidate; break; \
	    fi; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "error: Everstep needs Python 3.10 or newer with venv and pip (python3.11 is what it is tested with)." >&2; \
	    echo "       Install it, e.g. 'apt install python3.11 python3.11-venv', and run make again." >&2; \
	    exit 1; \
	  fi; \
	  echo "Making $(VENV) with $$($$python --version); torch is large, this can take a few minutes the first time."; \
	  rm -rf $(VENV); \
	  $$python -m venv $(VENV); \
	fi; \
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'; \
	printf '%s\n' '$(CURDIR)' >$(STAMP)

demo: $(STAMP) ## train three replica groups through the kill of one, and say what it cost
	@$(VENV)/bin/everstep demo

test: lint ## lint, then every test but the soak
	$(PY) -m pytest

lint: $(STAMP) ## ruff (rules and format) and mypy in strict mode
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

soak: $(STAMP) ## the soak tests, and beside them the simulator over SOAK_SEEDS (default 0:100000); 90 minutes on 2 cores
	$(PY) -m tests.soak --seeds $(SOAK_SEEDS) $(SOAK_TESTS)

# Each gets a venv in .compat. Where torch has no CPU build for one, that is several GB of CUDA wheels.
compat: ## the tests on each of COMPAT_PYTHONS that is installed (pythonX.Y, or under pyenv)
	@ran=; failed=; \
	for version in $(COMPAT_PYTHONS); do \
	  python=; \
	  for candidate in python$$version "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$$version.*/bin/python; do \
	    if "$$candidate" -c 'import venv, ensurepip' >/dev/null 2>&1; then python=$$candidate; break; fi; \
	  done; \
	  if [ -z "$$python" ]; then echo "== Python $$version is not installed: skipped"; continue; fi; \
	  venv=.compat/$$version$(addprefix -torch,$(COMPAT_TORCH)); \
	  mkdir -p .compat; \
	  sed '$(addprefix s/^torch==.*/torch==,$(addsuffix /,$(COMPAT_TORCH)))' constraints.txt >$$venv.constraints; \
	  [ -x $$venv/bin/python ] || "$$python" -m venv $$venv; \
	  $$venv/bin/python -m pip install --quiet --disable-pip-version-check -c $$venv.constraints -e '.[dev]'; \
	  echo "== $$($$venv/bin/python --version), torch $$($$venv/bin/python -c 'import torch; print(torch.__version__)')"; \
	  ran="$$ran $$version"; \
	  $$venv/bin/python -m pytest $(COMPAT_TESTS) || failed="$$failed $$version"; \
	done; \
	if [ -z "$$ran" ]; then echo "error: none of Python $(COMPAT_PYTHONS) is installed" >&2; exit 1; fi; \
	if [ -n "$$failed" ]; then echo "error: the tests failed on Python$$failed" >&2; exit 1; fi; \
	echo "== the tests pass on Python$$ran"

BENCHES := steady_state recovery live_recovery failures lighthouse rendezvous restart monitor
bench: $(STAMP) ## print the README's tables again; `make bench-rival` beside torchft
	@for bench in $(BENCHES); do echo "== bench/$$bench.py"; $(PY) bench/$$bench.py; done
	@echo "== python -m everstep.sim --groups 100000"; $(PY) -m everstep.sim --groups 100000

# An environment of its own for the rival: it must never become a dependency.
bench-venv: .venv-bench/.installed ## create .venv-bench, with torchft beside Everstep
.venv-bench/.installed: constraints.txt bench/constraints.txt
	python3.11 -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -c bench/constraints.txt \
	  torchft numpy -e .
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -c bench/constraints.txt \
	  nvidia-resiliency-ext psutil nvidia-ml-py defusedxml packaging
	touch $@

bench-rival: bench-venv ## the benchmarks that have a rival, beside it in the same run
	@for bench in steady_state recovery live_recovery; do echo "== bench/$$bench.py"; .venv-bench/bin/python bench/$$bench.py --with torchft; done

docs: $(STAMP) ## regenerate the tables of docs/ from the code
	$(PY) docs/generate.py

clean: ## remove caches and build output, keep .venv
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests examples bench docs -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv and .compat
	rm -rf $(VENV) .compat
