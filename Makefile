# Everything a fresh machine needs: Python with venv, make and git. `make demo` and `make test` set themselves up.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
HOURS := faults fuzz load mutants nonsense

.PHONY: env demo test test-oldest check audit bench clean

env: .venv/ready

# torch first: its range finds a small CPU build where one is offered, an open range downloads gigabytes
.venv/ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "torch>=2.11,<2.14"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch .venv/ready

demo: env
	$(BIN)/python scripts/run.py stage=all train.folds=1

test: env
	$(BIN)/python -m pytest -n 2

# the kernels again, with the oldest torch and triton (and everything else) that pyproject.toml allows; takes 5.5 GB where
# that torch is only found with its CUDA libraries
test-oldest: .venv-oldest/ready
	.venv-oldest/bin/python -m pytest tests/prefetch/kernels

.venv-oldest/ready: pyproject.toml tests/oldest.txt
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip
	.venv-oldest/bin/python -m pip install --quiet --constraint tests/oldest.txt torch
	.venv-oldest/bin/python -m pip install --quiet --constraint tests/oldest.txt --editable . pytest hypothesis
	touch .venv-oldest/ready

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# known holes in what is installed; asks PyPI's own advisories, and fails for a package that they do not know
audit: env .venv-audit/ready
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > .venv-audit/installed.txt
	.venv-audit/bin/pip-audit --strict --no-deps --disable-pip --requirement .venv-audit/installed.txt

.venv-audit/ready:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet "pip-audit>=2.9"
	touch .venv-audit/ready

# the tables of docs/benchmarks.md; what takes hours (faults, fuzz, load, mutants, nonsense) is run by its own name
bench: env
	@for file in $(filter-out $(HOURS:%=scripts/bench/bench_%.py),$(wildcard scripts/bench/bench_*.py)); do echo "== $$file"; $(BIN)/python $$file || exit 1; done

clean:
	rm -rf .venv .venv-oldest .venv-audit artifacts outputs multirun .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
