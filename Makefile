# All commands make their own virtual environment in .venv and install this project.
PYTHON ?= python3
BIN := .venv/bin
CORES ?= 2
export PYTHONUNBUFFERED = 1

.PHONY: demo test test-all check

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e '.[ci]'
	touch $@

# QUICK=1: fewer strategies and steps, to see that everything works.
demo: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 snakemake --cores $(CORES) demo \
	  --config quick=$(if $(QUICK),true,false) --quiet rules

# Whole files go to a process, which builds what their tests share once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(CORES) --dist loadfile

# All that guards data and numbers; see README for how long each takes.
test: .venv/installed
	$(PYTEST)

# The rest too: workflows, and what takes long.
test-all: .venv/installed
	$(PYTEST) -m ""

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
