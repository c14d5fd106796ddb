# The two commands of the README are `make demo` and `make test`. Each makes .venv when it is missing.
PYTHON ?= $(firstword $(foreach v,3.11 3.12 3.13,$(shell python$(v) -c "print('python$(v)')" 2>/dev/null)) python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/* csrc/include/msdda/*)
OUT ?= out/demo

.PHONY: demo test test-all test-oldest test-slow test-triton lint docs wheel bench gpu sanitize sanitize-gpu clean

demo: $(STAMP)
	$(BIN)/msdda-fast sweep --seeds 1,2 --out $(OUT)
	$(BIN)/msdda-fast sweep --model msdda-fast/emoji-flow --seeds 2 --weights 0,0.5,1 --out $(OUT)/flow \
		-p "A pink colored banana." -p "A purple hat and a black clock." -p "A black chair and a red table."

# `test` leaves out what is marked `full`: rows of sweeps that no pair of values needs, and expensive
# second looks. tests/faults/ shows that it notices what `test-all` notices.
PARALLEL := -n logical --maxprocesses 8 --dist worksteal -p no:benchmark
ALL := -m "not slow and not gpu"
test: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL)

test-all: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL) $(ALL)

# Minutes each, and load: one after another. .github/workflows/nightly.yml runs them.
test-slow: $(STAMP)
	$(BIN)/python -m pytest -p no:benchmark -m "slow and not gpu"

# The oldest versions that pyproject.toml accepts, in an environment of their own. They warn of what
# newer ones changed, so warnings are no errors here.
OLDEST := build/oldest
test-oldest:
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt setuptools pybind11 ninja torch
	MSDDA_BUILD_CUDA=0 $(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt --no-build-isolation \
		-e ".[triton,train,eval,serve]" pytest filelock hypothesis httpx2
	$(OLDEST)/bin/python -m pytest -p no:cacheprovider -o filterwarnings=default \
		tests/adapters tests/lora tests/steps/test_table.py tests/engine/test_loop.py tests/test_drop_in.py \
		tests/pipelines/test_loading.py tests/pipelines/test_unchanged.py tests/cli/test_values.py \
		tests/kernels/test_triton_cases.py tests/kernels/test_specialised.py tests/evaluation/test_report.py tests/serve/test_fields.py

# The kernels with the Triton of torch 2.11, which the machines with a GPU have; constraints.txt has a newer one.
test-triton: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/triton triton==3.6.0
	PYTHONPATH=build/triton $(BIN)/python -m pytest -p no:benchmark -m "" -k "integer or spills or architectures" \
		tests/kernels/test_specialised.py tests/kernels/test_triton_code.py \
		tests/kernels/test_grouped_lora_triton.py tests/kernels/test_norms_and_rows.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages of docs/ with the API reference, into build/docs, without a network; warnings are errors.
docs: $(STAMP)
	$(BIN)/python -m sphinx -W --keep-going -q -E -d build/doctrees -b html docs build/docs

# A wheel, used where it will be: in an environment of its own, away from the checkout.
wheel: $(STAMP)
	.ci/wheel $(BIN)/python

bench: $(STAMP)
	$(BIN)/python -m pytest benchmarks/bench_fused_step.py benchmarks/bench_grouped_lora.py --benchmark-only
	$(BIN)/python benchmarks/report.py

# On a machine with a GPU, without a network: with what is installed there; it names what is missing.
gpu: OUT := out/gpu
gpu: STAGES := *
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu_runbook.py --out $(OUT) --stages "$(STAGES)"

# The CPU kernels, and the threads of the CUDA kernels on the host, under AddressSanitizer and UBSan.
SANITIZED := build/sanitize
SANITIZED_CXX := c++ -fsanitize=address,undefined -fno-sanitize-recover=undefined -g1
SANITIZED_PYTHON = LD_PRELOAD=$$(c++ -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 \
	CXX="$(SANITIZED_CXX)" PYTHONPATH=$(SANITIZED)/lib $(BIN)/python -P
sanitize: $(STAMP)
	mkdir -p $(SANITIZED) && rm -rf $(SANITIZED)/lib
	CXX="$(SANITIZED_CXX)" MSDDA_BUILD_CUDA=0 $(BIN)/python setup.py --quiet build \
		--build-base $(SANITIZED) --build-lib $(SANITIZED)/lib >$(SANITIZED).log 2>&1 \
		|| { cat $(SANITIZED).log; exit 1; }
	$(SANITIZED_PYTHON) -c "from msdda_fast import _C; assert '/$(SANITIZED)/' in _C.__file__, _C"
	$(SANITIZED_PYTHON) -m pytest $(ALL) --capture=no --import-mode=append -p no:cacheprovider \
		-k "(native or threads) and not moments_and_tails and not uncorrelated" \
		tests/kernels/test_cuda_threads.py tests/kernels/test_dtypes_and_layouts.py \
		tests/kernels/test_masks_and_limits.py tests/kernels/test_counter_noise.py

# On a machine with a GPU and the CUDA toolkit.
sanitize-gpu: $(STAMP)
	for tool in memcheck racecheck; do PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer \
		--tool $$tool --report-api-errors no --error-exitcode 1 $(BIN)/python -m pytest -m gpu \
		-k "not huge and not names_the_cuda_error" \
		tests/kernels/test_on_gpu.py || exit 1; done

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks *.egg-info msdda_fast/_C*.so

# A half-made environment has no stamp, so an interrupted install is done again.
$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools pybind11 ninja torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@
