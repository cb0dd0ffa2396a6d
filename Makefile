# Each target works on a fresh machine that has python3 and make. What it installs goes into .venv, once: a stamp file
# there is older than any input only when something that decides the installation has changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Python sources are not among them: the installation is editable. The compiled library is.
INSTALL_INPUTS := pyproject.toml constraints.txt runtime/CMakeLists.txt $(wildcard runtime/native/*)

.PHONY: demo test lint layout clean

# make demo [DATA=path]: compress the real encoder, measure it, on DATA or on the sample that comes with the package
demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py $(if $(DATA),--data "$(DATA)")

# make test [ARGS="-m 'not slow'"]: every test. Those of a file run in one process, as they share the models they trace.
test: $(VENV)/.test
	$(BIN)/python -m pytest --numprocesses=logical --maxprocesses=4 --dist=loadfile $(ARGS)

# make lint: style, formatting, types
lint: $(VENV)/.test layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy build/layout/prequant tests examples .ci

# The folders as the one package that they are once installed, for tools that read files instead of importing them.
layout:
	rm -rf build/layout
	mkdir -p build/layout/prequant
	ln -s $(addprefix ../../../,$(wildcard prequant/*) passes runtime) build/layout/prequant/

clean:
	rm -rf build $(VENV)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(INSTALL_INPUTS) | $(BIN)/python
	$(PIP) install -c constraints.txt -e ".[demo]"
	touch $@

# The extra `test` holds all that the extra `demo` does.
$(VENV)/.test: $(INSTALL_INPUTS) | $(BIN)/python
	$(PIP) install -c constraints.txt -e ".[test,dev]"
	touch $(VENV)/.demo $@
