# `make lab` to learn, `make test` to check, `make help` for the rest.
# Everything happens in .venv, from requirements.lock; nothing outside this folder is changed.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help lab test long conformance mutants guest bench lint format lock clean

VENV := .venv
PY := $(VENV)/bin/python
UV ?= uv
FIRST_LAB := $(firstword $(wildcard labs/00_*.ipynb) labs)
# A file stays with one worker, which makes its fixtures once.  In the order of the files: those with few tests may be the longest.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

# Many tests and every lab start processes: without bytecode each of them would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

# A Python that was asked for by name gets a stamp of its own, so that asking for another one makes .venv again.
ifeq ($(origin PYTHON),undefined)
PYTHON := python3
WITH_LOCK := $(VENV)/.with-lock
else
WITH_LOCK := $(VENV)/.with-lock-$(subst /,_,$(PYTHON))
endif
WITH_PACKAGE := $(VENV)/.with-package

help:  ## this list
	@awk -F ':.*  ## ' '/^[a-z]+:.*  ## / { printf "  make %-12s%s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@printf '\n  PYTHON=python3.12 chooses the Python, LAB_ARGS goes to JupyterLab, TEST_ARGS to pytest.\n'

lab: $(WITH_PACKAGE)  ## open JupyterLab on the first lab
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) -m jupyterlab $(if $(filter 0,$(shell id -u)),--allow-root) $(LAB_ARGS) $(FIRST_LAB)

test: $(WITH_PACKAGE)  ## the whole suite with lint and types, under 15 minutes
	$(PY) -m pytest $(PYTEST_ARGS) $(TEST_ARGS)

long: $(WITH_PACKAGE)  ## the suite, the soak and every combination; writes docs/long-report.md
	-$(PY) -m vblklab.peer.setup --all
	$(PY) -m pytest --long --long-report=docs/long-report.md $(PYTEST_ARGS) $(TEST_ARGS)

conformance: $(WITH_PACKAGE)  ## write docs/conformance.md from the clause markers of the tests
	$(PY) -m tests.conformance.report

mutants: $(WITH_PACKAGE)  ## run every seeded mutant against the tests of its clauses, then write docs/conformance.md (MUTANTS=new: those not run yet)
	$(PY) -m tests.conformance.mutants $(MUTANTS)
	$(PY) -m tests.conformance.report

guest: $(WITH_PACKAGE)  ## fetch the kernel that the real guests boot (Debian packages into a cache; no root)
	$(PY) -m vblklab.peer.setup $(GUEST_ARGS)

bench: $(WITH_PACKAGE)  ## every benchmark in bench/, one after the other
	@set -e; for script in bench/bench_*.py; do [ -e "$$script" ] || continue; echo "== $$script"; $(PY) "$$script"; done

lint: $(WITH_PACKAGE)  ## ruff and mypy alone
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(WITH_PACKAGE)  ## sort the imports and lay out the code
	$(PY) -m ruff check --select I --fix .
	$(PY) -m ruff format .

lock:  ## write requirements.lock again from pyproject.toml (needs uv; LOCK_ARGS=--upgrade takes newer releases)
	@command -v $(UV) >/dev/null || { echo "make lock needs uv on the PATH, or UV=/path/to/uv" >&2; exit 1; }
	$(UV) pip compile pyproject.toml --group dev --group browser --universal --python-version 3.11 --fork-strategy fewest \
	    --generate-hashes --no-header --quiet $(LOCK_ARGS) --output-file requirements.lock

clean:  ## remove what make made (.venv, caches, build output); figures of the labs stay
	rm -rf $(VENV) .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(WITH_LOCK): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "vblklab needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing). Name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "$(PYTHON) has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Setting up $(VENV) with $$($(PYTHON) --version), once; about a minute."
	@$(PYTHON) -m venv --clear $(VENV)
	@if command -v $(UV) >/dev/null; then \
	    $(UV) pip install --quiet --python $(PY) --require-hashes -r requirements.lock; \
	else \
	    $(PY) -m pip --disable-pip-version-check install --quiet --require-hashes -r requirements.lock; \
	fi
	@touch $(VENV)/.with-lock $@

$(WITH_PACKAGE): $(WITH_LOCK) pyproject.toml $(wildcard etc/jupyter/*.json etc/jupyter/*/*.json)
	@$(PY) -m pip --disable-pip-version-check install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
