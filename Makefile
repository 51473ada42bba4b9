# `make demo` and `make test` set up what they need, then run. PYTHON chooses the interpreter (3.11 or later).
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint docs pictures clean

demo: $(VENV)/.runs
	@$(BIN)/python examples/demo.py

test: $(VENV)/.develops
	@sh tests/system-packages.sh
	$(BIN)/python -m pytest $(TESTS)

lint: $(VENV)/.develops
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.develops
	$(BIN)/python docs/generate.py

pictures: $(VENV)/.develops
	$(BIN)/python docs/pictures.py

clean:
	rm -rf $(VENV) .demo .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "ltpctl needs Python 3.11 or later; say: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@# What is left of one that failed (Debian keeps venv in a package of its own) would pass for whole next time.
	$(PYTHON) -m venv $(VENV) || { rm -f $(BIN)/python; echo "on Debian: apt install python3-venv" >&2; exit 2; }
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'

$(VENV)/.runs: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --editable . --constraint constraints.txt
	@touch $@

$(VENV)/.develops: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --editable '.[train,postgres,fast]' --group dev --constraint constraints.txt
	@touch $@ $(VENV)/.runs
