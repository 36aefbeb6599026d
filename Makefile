# `make report` and `make test` set up everything they need in .venv; a second run re-installs nothing.
# Works from any folder: make -C path/to/shortllama report, or make -f path/to/shortllama/Makefile report
SHELL := /bin/bash
PYTHON ?= python3
ROOT := $(patsubst %/,%,$(dir $(abspath $(lastword $(MAKEFILE_LIST)))))
VENV := $(ROOT)/.venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Zero-shot tasks run through a harness that brings many packages, quantised weights are torchao's: tests need both, a
# report does not.
HARNESS := $(VENV)/.installed-eval
# The oldest supported transformers cannot share an environment with the newest: they need different hub clients.
OLDEST := $(ROOT)/.venv-oldest
OLDEST_TESTS := test_shape test_configs test_surgery test_families test_checkpoint test_verification test_runtimes \
	test_runtime_families test_criteria test_perplexity test_quantisation
# Test files run side by side; each process has one compute thread.
WORKERS ?= 2
export OMP_WAIT_POLICY := passive

# Slices of a campaign on a GPU with whatever Python has torch and transformers there: nothing is installed or fetched.
# Wheels that it lacks (msgspec) may lie in wheels/, which git ignores; they are unpacked to a temporary folder.
CAMPAIGN ?= paper-7b
MINUTES ?= 9

.PHONY: gpu setup report test test-oldest lint bench gate-study clean

setup: $(STAMP)

$(STAMP): $(ROOT)/pyproject.toml $(ROOT)/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; set PYTHON=" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	cd $(ROOT) && $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

report: setup
	cd $(ROOT) && $(BIN)/python -m bench.quick

test: $(HARNESS)
	cd $(ROOT) && $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

$(HARNESS): $(STAMP)
	cd $(ROOT) && $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,eval,quant]'
	touch $@

test-oldest: $(OLDEST)/.installed
	cd $(ROOT) && $(OLDEST)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(OLDEST_TESTS:%=tests/%.py)

$(OLDEST)/.installed: $(ROOT)/pyproject.toml $(ROOT)/constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	cd $(ROOT) && $(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints-oldest.txt -e '.[quant]' pytest pytest-timeout pytest-xdist hypothesis gguf
	touch $@

lint: setup
	cd $(ROOT) && $(BIN)/ruff check .
	cd $(ROOT) && $(BIN)/ruff format --check .
	cd $(ROOT) && $(BIN)/pyright
	cd $(ROOT) && $(BIN)/lint-imports

bench: setup
	cd $(ROOT) && $(BIN)/python -m pytest --benchmark-only tests/perf

# The regression gate itself: simulated in minutes, then hours of real sessions, which want the machine for themselves.
# Goes on where it was stopped (make gate-study OPTIONS="--out reports/gate-study_...").
gate-study: setup
	cd $(ROOT) && $(BIN)/python -m bench.gate_study $(OPTIONS)

gpu:
	cd $(ROOT) && extra=$$(mktemp -d) && trap 'rm -rf "$$extra"' EXIT && \
	for wheel in wheels/*.whl; do [ -e "$$wheel" ] && $(PYTHON) -m zipfile -e "$$wheel" "$$extra"; done; \
	PYTHONPATH="$(ROOT):$$extra" $(PYTHON) -m bench.campaign $(CAMPAIGN) --minutes $(MINUTES) $(OPTIONS)

clean:
	rm -rf $(VENV) $(OLDEST) $(ROOT)/build $(ROOT)/dist $(ROOT)/*.egg-info
