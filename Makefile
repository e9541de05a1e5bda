# make quickstart   set up, then fine-tune a tiny model to a new language and show the result
# make test         set up, then the tests            make test-all   also the slow ones
# make check        lint, format and types            make bench      speed beside PEFT (minutes)

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: quickstart test test-all check bench clean

quickstart: .venv/.installed
	$(BIN)/python -m jaxtune.demo

test: .venv/.installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-all: .venv/.installed-test
	$(BIN)/python -m pytest

check: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: .venv/.installed
	$(BIN)/python tests/benchmarks/run.py

clean:
	rm -rf .venv .bench

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "jaxtune needs Python 3.11 or newer; try: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/python pyproject.toml constraints.txt
	@echo "installing jaxtune into .venv (about a minute)" >&2
	$(INSTALL) --editable .
	@touch $@

.venv/.installed-test: .venv/.installed
	@echo "installing what the tests need into .venv" >&2
	$(INSTALL) --editable '.[test]'
	@touch $@
