# Needs git, make and Python >= 3.10; everything else is installed into $(VENV).
#
#   make test                      with the newest Python found, in .venv
#   make test PYTHON=python3.12    with another one, in .venvs/3.12
#   make test-debian SUITE=forky SUITE_PYTHON=python3.15              with the Python of another Debian release
#   make test-debian SUITE=forky SUITE_PYTHON=python3.14 GOAL=test-slurm   and on that release's Slurm

.PHONY: help demo test quick nightly coverage stress check lint docs bench bench-slurm bench-flux release-check test-slurm test-gridengine test-flux test-debian clean
.DEFAULT_GOAL := help

# Finding a program is not enough: it may be a shim without its Python, or a Python without venv.
USABLE := -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))'

ifdef PYTHON
VENV ?= .venvs/$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
else
VENV ?= .venv
PYTHON = $(shell for python in python3.15 python3.14 python3.13 python3.12 python3.11 python3.10 python3; do \
	$$python $(USABLE) 2>/dev/null && { echo $$python; break; }; done)
endif

BIN := $(VENV)/bin

help:
	@echo "make demo             run examples/equation_of_state.py, about a minute"
	@echo "make quick            run the unit tests, and the essential tests of two ways to run calls: a minute"
	@echo "make test             run the tests"
	@echo "make nightly          run each test for every way to run calls, and the slow ones"
	@echo "make coverage         run the tests, and print the lines of src that none of them runs"
	@echo "make check            run ruff, mypy and import-linter, build the documentation and run the tests"
	@echo "make bench            compare with other executors, and write the results into docs/performance.md"
	@echo "make docs             build the documentation into site/"
	@echo "make test-slurm       run the tests that need Slurm, on a throw-away cluster (Debian or Ubuntu, as root)"
	@echo "make test-gridengine  run the tests that need Grid Engine, on a throw-away cluster (Debian or Ubuntu, as root)"
	@echo "make stress           send Ctrl-C and SIGKILL at random moments, for half an hour (STRESS='--seed 2 --rounds 50', CHAOS='--seconds 60')"
	@echo "make bench-slurm      measure jobs on such a cluster, and write the results into docs/performance.md"
	@echo "make bench-flux       measure calls as Flux jobs, and write the results into docs/performance.md (flux must be on the PATH)"
	@echo "make test-flux        run the tests that need Flux, in an instance of simulated nodes (flux must be on the PATH)"
	@echo "make test-debian      run the tests on another Debian release, unpacked into a folder (as root): SUITE=forky"
	@echo "make release-check    build the package, and run the README's program where only that is installed"
	@echo "make clean            remove what the other targets made"

demo: $(VENV)/installed-demo
	@$(BIN)/python examples/equation_of_state.py

# One process more than there are cores, because tests often wait. For a debugger, ARGS=-n0 runs all tests in one process.
TEST_PROCESSES ?= $(shell $(PYTHON) -c 'import os; print(min(len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else 4, 8))')
test: $(VENV)/installed-dev
	@$(BIN)/python -m pytest -n $(TEST_PROCESSES) $(ARGS)

quick: $(VENV)/installed-dev
	@$(BIN)/python -m pytest -n $(TEST_PROCESSES) --hypothesis-profile=quick --rows=fork,block-fork -m "not long" \
		tests/compat tests/unit tests/contract $(ARGS)

nightly: $(VENV)/installed-dev
	@$(BIN)/python -m pytest -n $(TEST_PROCESSES) --rows=all --slow $(ARGS)

# Some tests look at what an interpreter loads, or send os._exit, and fail here; that does no harm to the figures.
coverage: $(VENV)/installed-dev
	@$(BIN)/python -m coverage erase
	-@$(BIN)/python -m coverage run -m pytest -n $(TEST_PROCESSES) $(ARGS)
	@$(BIN)/python -m coverage combine --quiet
	@$(BIN)/python -m coverage report

# Not part of the tests: it takes long, and its findings depend on chance. Each program prints its seed.
stress: $(VENV)/installed-dev
	@$(BIN)/python tests/stress/interrupts.py $(STRESS)
	@$(BIN)/python tests/stress/chaos.py $(CHAOS)

lint: $(VENV)/installed-dev
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { \
		echo "Not formatted as ruff does: run $(BIN)/ruff format ."; exit 1; }
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

docs: $(VENV)/installed-dev
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "Documentation built: site/index.html"

check: lint docs test

# Each measured system, including this package, gets an environment of its own in .venvs/.
bench: $(BIN)/python
	@$(BIN)/python benchmarks/run.py $(ARGS)

# ARGS, such as --rounds 1, go to both programs. For some of the figures, run one of them by itself.
bench-slurm: $(BIN)/python
	@tests/slurm/cluster run $(BIN)/python benchmarks/cluster.py $(ARGS)
	@tests/slurm/cluster run $(BIN)/python benchmarks/allocation.py $(ARGS)

# The instance has this machine's cores, unlike that of the tests. The program finds Flux's bindings through PYTHONPATH.
bench-flux: $(BIN)/python
	@PYTHONPATH=$$(flux python --get-path) flux start $(abspath $(BIN)/python) benchmarks/in_flux.py $(ARGS)

# The cluster is shut down even after a failure or Ctrl-C. `tests/slurm/cluster help` lists its settings.
test-slurm: $(VENV)/installed-dev
	@tests/slurm/cluster run $(BIN)/python -m pytest -m slurm $(ARGS)

test-gridengine: $(VENV)/installed-dev
	@tests/gridengine/cluster run $(BIN)/python -m pytest -m gridengine $(ARGS)

test-flux: $(VENV)/installed-dev
	@tests/on_flux/instance $(BIN)/python -m pytest -m flux $(ARGS)

# GOAL is the target to make in the folder. The environment works only there, because its Python is there.
GOAL ?= test
SUITE_PYTHON ?= python3
test-debian:
	@[ -n "$(SUITE)" ] || { echo "Name a release of Debian: make test-debian SUITE=forky"; exit 1; }
	@DEBIAN_PACKAGES=$(SUITE_PYTHON)-venv tests/debian/run $(SUITE) \
		make $(GOAL) PYTHON=$(SUITE_PYTHON) VENV=.venvs/$(SUITE)-$(SUITE_PYTHON) 'ARGS=$(ARGS)'

release-check:
	@PYTHON=$(PYTHON) .ci/release-check

clean:
	rm -rf .venv .venvs site dist build .coverage .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

$(VENV)/installed-%: pyproject.toml | $(BIN)/python
	@echo "Installing executorlib[$*] into $(VENV), about a minute"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e ".[$*]"
	@touch $@ $(if $(filter dev,$*),$(VENV)/installed-demo)

$(BIN)/python:
	@$(PYTHON) $(USABLE) || { \
		echo "No usable Python >= 3.10 found (on Debian and Ubuntu: apt install python3-venv)."; \
		echo "Name one with: make PYTHON=/path/to/python"; exit 1; }
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
