# Both commands make their own virtual environment in .venv and install this project.
PYTHON ?= python3
BIN := .venv/bin
CORES ?= 2
export PYTHONUNBUFFERED = 1

.PHONY: demo test check

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e '.[ci]'
	touch $@

# QUICK=1: fewer strategies and steps, to see that everything works.
demo: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 snakemake --cores $(CORES) demo \
	  --config quick=$(if $(QUICK),true,false) --quiet rules

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

check: .venv/installed
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy && $(BIN)/lint-imports
