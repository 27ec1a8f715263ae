# Two commands do everything on a fresh machine with Python 3.11+ and make:  make demo   make test
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
PIP     = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
N      ?= 2

.PHONY: demo test test-all lint docs clean

$(VENV)/.train: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "lorakit needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12 demo")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[train]'
	@touch $@

$(VENV)/.test: $(VENV)/.train
	$(PIP) -e '.[test]'
	@touch $@

demo: $(VENV)/.train
	rm -rf build/demo
	$(BIN)/python examples/python_reference.py build/demo
	$(BIN)/lorakit train examples/demo.yaml
	$(BIN)/lorakit verify build/demo/run/adapter
	$(BIN)/lorakit generate "The for statement" --adapter build/demo/run/adapter --compare --max-new-tokens 60 --temperature 0.7

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(N) -m "not slow"

test-all: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(N)

lint: $(VENV)/.test
	$(BIN)/ruff check .

docs: $(VENV)/.train
	$(BIN)/python docs/make.py

clean:
	rm -rf build .venv .pytest_cache .ruff_cache
