# `make demo` and `make test` set everything up by themselves; a second run reuses .venv.
# The first Python that is new enough.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --disable-pip-version-check -q -c constraints.txt

.PHONY: demo test check format docs clean

demo: $(VENV)/.ready
	$(BIN)/statekv demo

# A process for each core, up to four, for each holds torch and the demo model; so threads within one would only wait.
test: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

check: $(VENV)/.ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(VENV)/.ready-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Opens as site/index.html; mkdocs-material's advice to leave mkdocs 1 is not about a page of ours.
docs: $(VENV)/.ready-docs
	$(BIN)/typer statekv.cli utils docs --name statekv --output docs/cli.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) site statekv-demo .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

# torch comes first and alone: its exact version is what finds a CPU build on machines that offer one.
$(VENV)/.ready: pyproject.toml constraints.txt
	@test -x $(BIN)/python || test -n "$(PYTHON)" || { echo "statekv needs Python 3.11 or newer, and none is on the path"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e .
	touch $@

# The tests compare with processors that need torchvision. Beside a torch of another build it breaks every import of
# transformers, so it lies apart, where only the tests look. So does lmms-eval with what it needs.
$(VENV)/.ready-dev: $(VENV)/.ready tests/lmms-eval.txt
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps --upgrade --target $(VENV)/stock torchvision==0.28.0
	$(PIP) --no-deps --upgrade --target $(VENV)/lmms -r tests/lmms-eval.txt
	touch $@

$(VENV)/.ready-docs: $(VENV)/.ready-dev
	$(PIP) -e '.[docs]'
	touch $@
