# make demo: environment, install, Japanese text through generate().  make test: the whole suite.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN = $(VENV)/bin

.PHONY: demo test lint docs audit pythons gpu-test oldest clean

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py

test: $(VENV)/installed
	$(BIN)/python -m pytest -q -n auto --dist loadgroup $(PYTEST_ARGUMENTS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

# warnings are errors
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

# licences and known vulnerabilities of what the library depends on
audit: $(VENV)/installed
	$(BIN)/python -m audit.licences
	$(BIN)/python -m audit.advisories

# what needs no torch, on every other supported Python that is here
pythons: $(VENV)/installed
	$(BIN)/python -m audit.pythons

# on a machine with TensorRT and an NVIDIA GPU
gpu-test: $(VENV)/installed
	$(BIN)/python -m pytest -q -m gpu tests/gpu

# the suite on the oldest supported versions, in an environment of its own; what Ray does does not depend on them
oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt PYTEST_ARGUMENTS="--ignore tests/test_ray.py"

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[dev,rtx]"
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-python3.* dist
