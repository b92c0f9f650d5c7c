# `make demo` and `make test` set up what they need, each in its own environment; both need only python3 and make.

VENV ?= .venv
DEMO_VENV ?= .venv-demo
PYTHON ?= python3
BIN := $(VENV)/bin
# They say what is set up and how far it is; where something is missing, one line says what.
SET_UP := bash tools/set_up.sh $(PYTHON)
STEP := bash tools/step.sh
# Keras binds its backend at import. With the others than torch run the tests of what depends on it: how the model's
# variables are read, copied and restored, and that a training which was killed or failed resumes.
OTHER_BACKENDS := tensorflow jax
BACKEND_TESTS := $(addprefix tests/polyaxon_keras/,test_background.py test_callback.py test_late.py test_processes.py) \
	tests/polyaxon_keras/test_stores.py::test_a_killed_training_resumes_without_tensorflow
# Three at a time on two cores: many tests wait for their own processes, for servers or for disks.
PYTEST := $(BIN)/python -m pytest -n 3 --dist worksteal

.PHONY: demo test test-pythons set-up-pythons coverage bench lint types docs clean

# With its own environment, a quarter of that of the tests.
demo: $(DEMO_VENV)/.installed
	@$(DEMO_VENV)/bin/python examples/demo.py

test: $(VENV)/.installed $(VENV)/.chromium $(VENV)/.bindfs
	KERAS_BACKEND=torch $(PYTEST) $(COVERAGE)
	for backend in $(OTHER_BACKENDS); do \
		KERAS_BACKEND=$$backend $(PYTEST) $(BACKEND_TESTS) $(COVERAGE) || exit 1; \
	done

# With the other Pythons that are installed, those of pyenv included, in an environment for each.
test-pythons:
	$(PYTHON) tests/pythons.py

set-up-pythons:
	$(PYTHON) tests/pythons.py --set-up

# Which lines the tests run, in all their processes: it takes a quarter longer than only the tests.
coverage: $(VENV)/.installed
	$(BIN)/python -m coverage erase
	$(MAKE) test COVERAGE="--cov --cov-append --cov-report="
	$(BIN)/python -m coverage report

# With its own environment, for what it compares with.
bench: .venv-bench/.installed
	.venv-bench/bin/python benchmarks/speed.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.installed
	$(BIN)/mypy
	$(BIN)/mypy --platform darwin
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.installed
	$(BIN)/mkdocs build --strict

$(DEMO_VENV)/.installed: pyproject.toml
	@$(SET_UP) $(DEMO_VENV) 1400 "1 to 2" "the demo, with PyTorch Lightning and Keras" --editable ".[demo]"
	@mv $(DEMO_VENV)/.incomplete $@

$(VENV)/.installed: $(VENV)/.packages $(VENV)/.azurite $(VENV)/.traceml
	@touch $@

$(VENV)/.packages: pyproject.toml
	@$(SET_UP) $(VENV) 4800 "about 4" "all tests, with every framework" --editable ".[dev]"
	@mv $(VENV)/.incomplete $@

$(VENV)/.azurite: | $(VENV)/.packages
	@echo "Setting up Azurite in $(VENV), for the tests with Azure: about 250 MB."
	@rm -rf $(VENV)/azurite
	@$(STEP) $(VENV) $(BIN)/npm install --loglevel=error --no-audit --no-fund --fetch-retry-maxtimeout=10000 \
		--prefix $(VENV)/azurite azurite@3.37.0
	@touch $@

# Polyaxon's own client wants an older Jinja than MkDocs: next to the environment, for the one test that uses it.
$(VENV)/.traceml: | $(VENV)/.packages
	@echo "Setting up Polyaxon's own client in $(VENV), for the test that compares with it: about 200 MB."
	@$(STEP) $(VENV) $(PYTHON) -m venv --clear $(VENV)/traceml
	@$(STEP) $(VENV) $(VENV)/traceml/bin/python -m pip install --disable-pip-version-check --no-compile polyaxon traceml
	@touch $@

.venv-bench/.installed: pyproject.toml
	@$(SET_UP) .venv-bench 3200 "about 3" "the benchmarks, with what they compare with" --editable ".[bench]"
	@mv .venv-bench/.incomplete $@

# For the test that looks at TensorBoard.
$(VENV)/.chromium: | $(VENV)/.installed
	@command -v chromium > /dev/null || { \
		echo "Setting up Chromium in $(VENV), for the test that looks at TensorBoard: about 400 MB."; \
		$(STEP) $(VENV) bash tools/unpack_debian.sh $(VENV)/chromium chromium; }
	@touch $@

# For the tests with two mounts of one directory, whose locks are unknown to each other.
$(VENV)/.bindfs: | $(VENV)/.installed
	@command -v bindfs > /dev/null || { \
		echo "Setting up bindfs in $(VENV), for the tests with two mounts of one directory: about 1 MB."; \
		$(STEP) $(VENV) bash tools/unpack_debian.sh $(VENV)/bindfs bindfs; }
	@touch $@

clean:
	rm -rf $(VENV) $(DEMO_VENV) .venv-bench .venv-pythons build dist site demo-outputs outputs .coverage .mypy_cache .pytest_cache .ruff_cache
