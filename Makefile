# One command each. `make demo` and `make test` work in a fresh clone with Python, gcc and a package index.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
SOURCES := $(shell find csrc build_support -type f -not -name '*.pyc' 2>/dev/null)

.PHONY: help setup demo test cuda sanitize check lint format typecheck bench bench-full gpu clean
help:            ## list the commands
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

setup: $(STAMP)  ## virtual environment with the package (editable) and its tools
$(STAMP): setup.py pyproject.toml constraints.txt constraints-oldest.txt constraints-cutlass.txt \
		constraints-musicnn.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# the pinned torch first: left to the resolver, another package may pull a different one
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch numpy setuptools pybind11 ninja
	$(BIN)/pip install -q --disable-pip-version-check --no-build-isolation -c constraints.txt -e ".[dev]"
	@# the oldest supported triton beside the pinned one: its own folder, for the tests only
	$(BIN)/pip install -q --disable-pip-version-check --upgrade --no-deps --target $(VENV)/oldest \
		-r constraints-oldest.txt
	@# CUTLASS's headers, as text, for a test
	$(BIN)/pip install -q --disable-pip-version-check --upgrade --no-deps --target $(VENV)/cutlass \
		-r constraints-cutlass.txt
	@# musicnn's weights, as files, for tests: what the wheel depends on is of 2019, and not needed
	$(BIN)/pip install -q --disable-pip-version-check --upgrade --no-deps --target $(VENV)/musicnn \
		-r constraints-musicnn.txt
	touch $@

demo: $(STAMP)   ## the same prompts and seeds in float and W4A8, with what it costs: build/demo/
	$(BIN)/python examples/demo.py

# two at a time: a test has one thread. Tests of a file share what they build, so they stay together
TEST_WORKERS ?= 2
test: $(STAMP)   ## all tests that need no GPU
	$(BIN)/pytest -n $(TEST_WORKERS) --dist loadfile

cuda: $(STAMP)   ## compile the CUDA kernels (nvcc, no GPU): registers and shared memory; a spill fails
	$(BIN)/python -m build_support.cuda_resources

# the kernels and their callers under AddressSanitizer and UndefinedBehaviorSanitizer; torch leaks
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer \
	-DPTQ4ADM_EMULATE_VNNI
sanitize: $(STAMP)  ## kernel tests under AddressSanitizer and UBSan
	CFLAGS="$(SANITIZE)" CXXFLAGS="$(SANITIZE)" LDFLAGS="-fsanitize=address,undefined" \
		PTQ4ADM_BUILD=cpu $(BIN)/python setup.py -q build \
		--build-base=build/sanitize --build-lib=build/sanitize/lib
	@# libstdc++ too: the sanitizer looks for its exceptions before anything has loaded it
	cd build/sanitize && PYTHONPATH=lib ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$($(CXX) \
		-print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
		"$(CURDIR)/$(BIN)/pytest" -q --capture=sys "$(CURDIR)/tests/ops" \
		--ignore "$(CURDIR)/tests/ops/test_emulated.py"

check: lint typecheck  ## lint, types, layering
	$(BIN)/pytest -q tests/test_layering.py

CLANG_FILES = $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu)
lint: $(STAMP)   ## ruff and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CLANG_FILES)

format: $(STAMP) ## ruff and clang-format, changing files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CLANG_FILES)

# mypy does not follow the mapping of kernels/ to ptq4adm.kernels, so it checks a tree of links
typecheck: $(STAMP)  ## mypy, strict
	rm -rf build/typecheck && mkdir -p build/typecheck/ptq4adm
	for entry in ptq4adm/*; do ln -s "$(CURDIR)/$$entry" build/typecheck/ptq4adm/; done
	ln -s "$(CURDIR)/kernels" build/typecheck/ptq4adm/kernels
	cd build/typecheck && "$(CURDIR)/$(BIN)/mypy" --config-file "$(CURDIR)/pyproject.toml" -p ptq4adm

BENCH_STAMP := $(VENV)/.bench-installed
$(BENCH_STAMP): $(STAMP)
	$(BIN)/pip install -q --disable-pip-version-check --no-build-isolation -c constraints.txt -e ".[bench]"
	touch $@

bench: $(BENCH_STAMP) ## the kernels beside other libraries', a short look
	$(BIN)/ptq4adm bench --device cpu --quick

# about half an hour on an idle machine, and 16 GB of memory for TANGO
bench-full: $(BENCH_STAMP) ## every shape and whole steps, into benchmarks/results and the tables
	$(BIN)/python benchmarks/bench_cpu.py
	$(BIN)/python benchmarks/bench_unet_cpu.py
	$(BIN)/python benchmarks/roofline.py
	$(BIN)/python benchmarks/tables.py

# for a machine with a GPU and its own PyTorch: no virtual environment unless one is needed. Both
# backends for GPUs; the CUDA module is built for that GPU beside the first stages
OUTPUT ?= build/gpu
STAGES ?= tests,sanitize
WHEELS ?=
gpu:             ## what needs a GPU, in three calls: STAGES=tests,sanitize bench,unet tune,bench,compiled
	$(PYTHON) benchmarks/run_gpu.py --output "$(OUTPUT)" --stages $(STAGES) \
		$(if $(WHEELS),--wheels "$(WHEELS)")

clean:           ## what builds and runs left behind, not the environment
	rm -rf build dist *.egg-info ptq4adm/*.so
