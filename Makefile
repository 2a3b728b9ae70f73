# Everything a fresh machine needs: Python with venv, make and git. `make demo` and `make test` set themselves up.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: env demo test check bench clean

env: .venv/ready

# torch first: its range finds a small CPU build where one is offered, an open range downloads gigabytes
.venv/ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "torch>=2.11,<2.14"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch .venv/ready

demo: env
	$(BIN)/python scripts/run.py stage=all

test: env
	$(BIN)/python -m pytest -n 2

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: env
	@for file in scripts/bench/bench_*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

clean:
	rm -rf .venv artifacts outputs multirun .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
