# `make demo` and `make test` set up everything they need in .venv; both need only python3 and make.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Keras binds its backend at import, so its tests run once for each.
BACKENDS := torch tensorflow jax
# Two at a time: many tests wait for processes of their own.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo test test-pythons coverage bench lint types docs clean

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed $(VENV)/.chromium
	KERAS_BACKEND=torch $(PYTEST) $(COVERAGE)
	for backend in $(filter-out torch,$(BACKENDS)); do \
		KERAS_BACKEND=$$backend $(PYTEST) tests/keras_callback $(COVERAGE) || exit 1; \
	done

# With the other Pythons that are installed, those of pyenv included, in an environment for each.
test-pythons:
	$(PYTHON) tests/pythons.py

# Which lines the tests run, in all their processes: it takes a quarter longer than the tests alone.
coverage: $(VENV)/.installed
	$(BIN)/python -m coverage erase
	$(MAKE) test COVERAGE="--cov --cov-append --cov-report="
	$(BIN)/python -m coverage report

# With an environment of its own, for what it compares with.
bench: .venv-bench/.installed
	.venv-bench/bin/python benchmarks/speed.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.installed
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.installed
	$(BIN)/mkdocs build --strict

# Polyaxon's own client wants an older Jinja than MkDocs: beside the environment, for the one test that uses it.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	$(BIN)/npm install --silent --no-audit --no-fund --prefix $(VENV)/azurite azurite@3.37.0
	$(PYTHON) -m venv $(VENV)/traceml
	$(VENV)/traceml/bin/python -m pip install --quiet --disable-pip-version-check polyaxon traceml
	touch $@

.venv-bench/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[bench]"
	touch $@

# For the test that looks at TensorBoard.
$(VENV)/.chromium: | $(VENV)/.installed
	command -v chromium > /dev/null || bash tests/examples/unpack_chromium.sh $(VENV)/chromium
	touch $@

clean:
	rm -rf $(VENV) .venv-bench .venv-pythons build dist site demo-outputs outputs .coverage .mypy_cache .pytest_cache .ruff_cache
