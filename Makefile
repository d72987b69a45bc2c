# Every target does the set-up that it needs, once: `make run` on a fresh checkout is enough.
#
#   make run        the demonstration, no virtual machine needed
#   make test       unit tests, then guest tests on real kernels in QEMU
#   make check      ruff and mypy
#   make docs       the manual, into docs/_build/html
#   make help       everything else

PYTHON ?= python3
VENV ?= .venv
DOCS_VENV ?= .venv-docs
BIN := $(VENV)/bin

# A stamp says what was installed, for which interpreter and which pyproject.toml:
# when either changes the stamp's name changes, and the set-up runs again.
INTERPRETER := $(shell $(PYTHON) -c 'import sys; print(sys.version, sys.base_prefix)' 2>/dev/null | sha256sum | cut -c1-12)
PROJECT := $(shell sha256sum pyproject.toml | cut -c1-12)
CREATED := .created-$(INTERPRETER)
RUN_READY := $(VENV)/.ready-run-$(INTERPRETER)-$(PROJECT)
TEST_READY := $(VENV)/.ready-test-$(INTERPRETER)-$(PROJECT)
CHECK_READY := $(VENV)/.ready-check-$(INTERPRETER)-$(PROJECT)
DOCS_READY := $(DOCS_VENV)/.ready-docs-$(INTERPRETER)-$(PROJECT)

# Seconds after which a guest test shows where it is; booting a guest without KVM takes a while.
GUEST_TIMEOUT := 600

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help:
	@sed -n 's/^##  *//p' $(MAKEFILE_LIST)

## run                show what viommu does: the server, driven by a built-in guest driver
.PHONY: run
run: $(RUN_READY)
	$(BIN)/viommu demo

## test               test-unit, then test-guests
.PHONY: test
test: test-unit test-guests

## test-unit          everything that needs no virtual machine
.PHONY: test-unit
test-unit: $(TEST_READY)
	$(BIN)/python -m pytest tests

## test-guests        unmodified distribution kernels in QEMU, fetched the first time
.PHONY: test-guests
test-guests: $(TEST_READY)
	$(BIN)/python -m guest_tests.lab fetch
	$(BIN)/python -m pytest guest_tests -m "not slow" -o faulthandler_timeout=$(GUEST_TIMEOUT)

## test-guests-slow   the lane that builds kernels of its own
.PHONY: test-guests-slow
test-guests-slow: kernels
	$(BIN)/python -m pytest guest_tests -m slow -o faulthandler_timeout=$(GUEST_TIMEOUT)

## kernels            build what that lane boots; minutes the first time, then from the cache
.PHONY: kernels
kernels: $(TEST_READY)
	$(BIN)/python -m guest_tests.lab build-kernels

## test-all-pythons   test-unit, then the same on every other supported interpreter that is found
.PHONY: test-all-pythons
test-all-pythons: test-unit test-other-pythons

.PHONY: test-other-pythons
test-other-pythons:
	@this=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	for version in 3.11 3.12 3.13; do \
	    [ "$$version" != "$$this" ] || continue; \
	    python=$$(.ci/find-python $$version) || { echo "Python $$version: not found, left out"; continue; }; \
	    $(MAKE) --no-print-directory PYTHON="$$python" VENV=".venv-$$version" test-unit || exit 1; \
	done

## check              ruff (lint and format) and mypy, over source and tests
.PHONY: check
check: $(CHECK_READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

## format             let ruff rewrite what it can
.PHONY: format
format: $(CHECK_READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

## coverage           unit tests with branch coverage
.PHONY: coverage
coverage: $(CHECK_READY)
	$(BIN)/coverage run -m pytest tests
	$(BIN)/coverage report

## bench              the benchmarks, with numbers
.PHONY: bench
bench: $(TEST_READY)
	$(BIN)/python -m pytest tests/benchmarks --benchmark-enable

## docs               the manual, into docs/_build/html; a warning is an error
.PHONY: docs
docs: $(DOCS_READY)
	$(DOCS_VENV)/bin/sphinx-build -W --keep-going --fresh-env -b html docs docs/_build/html

## clean              remove everything that these targets made
.PHONY: clean
clean:
	rm -rf .venv .venv-* build dist docs/_build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage*

# --- set-up -------------------------------------------------------------------

# linuxfd has no binary wheels. Try what its build will do, before pip does and says it in a page.
.PHONY: preflight
preflight:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "error: '$(PYTHON)' is not Python 3.11 or newer: install one, or name one with 'make PYTHON=...'." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "error: '$(PYTHON)' has no venv module: install it (Debian: apt-get install python3-venv)." >&2; exit 1; }
	@compiler=$${CC:-$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_config_var("CC") or "cc")')}; \
	include=$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))'); \
	echo '#include <Python.h>' | $$compiler -I"$$include" -fsyntax-only -x c - >/dev/null 2>&1 || { \
	    echo "error: linuxfd is built from source, and '$$compiler' can't compile against Python.h:" \
	        "install a C compiler and Python's headers (Debian: apt-get install gcc python3-dev)." >&2; exit 1; }

# pip learnt --group (dependency groups) in 25.1; a new environment brings an older one.
$(VENV)/$(CREATED) $(DOCS_VENV)/$(CREATED): | preflight
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install -qq 'pip>=25.1'
	touch $@

$(RUN_READY): $(VENV)/$(CREATED)
	$(BIN)/python -m pip install -qq --editable .
	touch $@

$(TEST_READY): $(VENV)/$(CREATED)
	$(BIN)/python -m pip install -qq --editable . --group test
	touch $@ $(RUN_READY)

$(CHECK_READY): $(VENV)/$(CREATED)
	$(BIN)/python -m pip install -qq --editable . --group check
	touch $@ $(TEST_READY) $(RUN_READY)

$(DOCS_READY): $(DOCS_VENV)/$(CREATED)
	$(DOCS_VENV)/bin/python -m pip install -qq --editable '.[testing]' --group docs
	touch $@
