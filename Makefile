# The two commands of the README are `make demo` and `make test`. Each makes .venv when it is missing.
PYTHON ?= $(firstword $(foreach v,3.11 3.12 3.13,$(shell python$(v) -c "print('python$(v)')" 2>/dev/null)) python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*.cpp csrc/*.h csrc/include/msdda/*.h)
OUT ?= out/demo

.PHONY: demo test lint bench clean

demo: $(STAMP)
	$(BIN)/msdda-fast sweep --seeds 1,2 --out $(OUT)

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m pytest benchmarks/bench_fused_step.py --benchmark-only

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks *.egg-info msdda_fast/_C*.so

# A half-made environment has no stamp, so an interrupted install is done again.
$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools pybind11 ninja torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@
