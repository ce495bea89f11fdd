# Two commands do all the set-up on a bare clone: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
OUT ?= demo_output
BENCH_OUT ?= bench_output

ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-slow lint check bench gpu plant docs clean

demo: $(VENV)/.demo
	$(BIN)/anima-fast demo --out $(OUT)

test: $(VENV)/.test lint
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m "slow and not gpu"

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Errors, losses, launches, memory, registers and imports against the stored ones, and some planted
# errors that this must see.
check: $(VENV)/.test
	$(BIN)/anima-fast bench run --quick --against benchmarks/baselines --out $(BENCH_OUT)/check.jsonl
	$(BIN)/python -m benchmarks.plant --quick

# What this machine can measure of the kernels, into one run file.
bench: $(VENV)/.test
	$(BIN)/anima-fast bench run --out $(BENCH_OUT)/run.jsonl

# Errors of one line, each of which a check must see: half an hour.
plant: $(VENV)/.test
	$(BIN)/python -m benchmarks.plant

docs: $(VENV)/.test
	$(BIN)/python -m mkdocs build --strict --site-dir site

# The same on a card, after the tests that need one: straight from a checkout, in the environment
# whose PyTorch sees the card.
gpu:
	$(PYTHON) -m pytest -q -m gpu tests
	$(PYTHON) -m anima_fast bench run --out $(BENCH_OUT)/run.jsonl

clean:
	rm -rf $(VENV) $(OUT) $(BENCH_OUT) site *.egg-info build

$(VENV)/.python:
	$(PYTHON) -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13) and 'Python 3.10 to 3.13 is needed, this is ' + sys.version.split()[0] + ': run make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.demo: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP_INSTALL) -e ".[demo]"
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP_INSTALL) -e ".[demo,test]"
	touch $@
