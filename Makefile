# `make demo` and `make test` do all the set-up they need. `make` alone prints the list of targets.
#
#   make test PYTHON=python3.12        choose the interpreter that the .venv is made from
#   make test VENV=../venv            put the environment elsewhere
#   make test PYTEST_ARGS="-k moe -x"  pass arguments to pytest
#   make test TEST_JOBS=0              run the tests one by one, as a debugger needs them
#   make bench BENCH_ARGS="--peers transformers,vllm"

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
TEST_JOBS ?= logical
BENCH_ARGS ?= --peers transformers,torch.compile,vllm,llama.cpp

BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n $(TEST_JOBS) --maxprocesses 8 --dist worksteal
PIP := $(BIN)/python -m pip --disable-pip-version-check
CSRC := $(shell find csrc -type f)
WHEEL := build/wheel
SANITIZE := build/sanitize
SANITIZE_TESTS := sanitize/loaded test_cpu test_quant test_graph test_ops test_cuda

# The tests that compare floats, and how `make test-cpus` makes PyTorch, oneDNN and MKL take this
# processor for a lesser one, on one and two threads. The last two use all that PyTorch finds.
FLOAT_TESTS := accelerate cpu generate graph interfaces model ops quant table verify weights
CPU_SETTINGS := \
	ATEN_CPU_CAPABILITY=default,ONEDNN_MAX_CPU_ISA=SSE41,MKL_CBWR=COMPATIBLE,OMP_NUM_THREADS=1 \
	ATEN_CPU_CAPABILITY=avx2,ONEDNN_MAX_CPU_ISA=AVX2,MKL_CBWR=AVX2,OMP_NUM_THREADS=2 \
	ONEDNN_MAX_CPU_ISA=AVX512_CORE,OMP_NUM_THREADS=1 \
	ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16,OMP_NUM_THREADS=2

# Empty files that say "this step is done". Make repeats a step when one of the files it depends on is newer.
VENV_DONE := $(VENV)/.venv-done
RUN_DONE := $(VENV)/.run-done
DEV_DONE := $(VENV)/.dev-done
TRITON_DONE := $(VENV)/.triton-done
PACKAGE_DONE := $(VENV)/.package-done
NATIVE_DONE := $(VENV)/.native-done
GPU_VENV := build/gpu-venv
GPU_DONE := $(GPU_VENV)/.gpu-done

# OpenMP's threads spin while they wait, which on a machine that is busy with other work makes small tensors 10x slower.
export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
.PHONY: help demo test test-full test-cpus gpu bench wheel sanitize lint format clean
.NOTPARALLEL: # two steps of the set-up must not run pip in one environment at the same time

help:
	@echo "make demo      generate text with the tiny model, timed and checked (sets up $(VENV) first)"
	@echo "make test      ruff, mypy and pytest (sets up $(VENV) first)"
	@echo "make test-full the same, and what takes long: the large cases in Triton's interpreter, every kernel compiled for every GPU"
	@echo "make test-cpus the tests that compare floats, with PyTorch's code for four kinds of processor"
	@echo "make gpu       all that needs a GPU, in ten minutes at most: tests, memory checker, benchmarks, into bench/results/"
	@echo "make bench     the standard benchmarks of this machine, in ten minutes at most, into bench/results/"
	@echo "make wheel     a wheel with the CPU kernels, which installs without a compiler, into dist/ (Linux)"
	@echo "make sanitize  the CPU kernels, and the emulated CUDA kernels, under GCC's sanitizers (Linux)"
	@echo "make lint      ruff and mypy only"
	@echo "make format    let ruff fix and format the code"
	@echo "make clean     remove what was built and cached; for a fresh start remove $(VENV) too"
	@echo
	@echo "PYTHON=... chooses the interpreter, VENV=... the environment, PYTEST_ARGS=... goes to pytest,"
	@echo "TEST_JOBS=... the number of test processes (0: the tests run one by one)"

demo: $(RUN_DONE) $(PACKAGE_DONE) $(NATIVE_DONE)
	$(BIN)/gemma4-fast demo

test: lint $(TRITON_DONE) $(PACKAGE_DONE) $(NATIVE_DONE)
	$(PYTEST) $(PYTEST_ARGS)

test-full: lint $(TRITON_DONE) $(PACKAGE_DONE) $(NATIVE_DONE)
	$(PYTEST) -m "full or not full" $(PYTEST_ARGS)

test-cpus: $(TRITON_DONE) $(PACKAGE_DONE) $(NATIVE_DONE)
	@set -e; for setting in $(CPU_SETTINGS); do \
		echo "== $$setting"; \
		env $$(echo $$setting | tr , ' ') \
			$(PYTEST) $(FLOAT_TESTS:%=tests/test_%.py) $(PYTEST_ARGS); \
	done

# With what the interpreter has: a GPU's PyTorch is large, and often there already. Nothing is downloaded.
gpu: $(GPU_DONE)
	$(GPU_VENV)/bin/python bench/gpu.py $(GPU_ARGS)

bench: $(DEV_DONE) $(PACKAGE_DONE) $(NATIVE_DONE)
	@# Without the setting above: a benchmark has the machine to itself, and others' threads are not to be slowed down by it.
	env -u OMP_WAIT_POLICY $(BIN)/gemma4-fast bench all $(BENCH_ARGS)

# ThreadSanitizer gets a program of its own: it needs every library to be built for it, PyTorch too.
sanitize: $(SANITIZE)/threads-plain $(SANITIZE)/threads-native $(SANITIZE)/pool $(SANITIZE)/.lib-done $(TRITON_DONE)
	TSAN_OPTIONS=halt_on_error=1 $(SANITIZE)/pool
	TSAN_OPTIONS=halt_on_error=1 $(SANITIZE)/threads-plain
	TSAN_OPTIONS=halt_on_error=1 $(SANITIZE)/threads-native
	@# libstdc++ beside libasan: else the exceptions that torch throws are unknown to it. A finding ends the process, and with
	@# it the report, if pytest holds back what is written to the file descriptor. `pytest` alone, since `python -m` would put
	@# this folder's package before the one that was built.
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(SANITIZE)/lib GEMMA4_FAST_SANITIZE=1 \
		$(BIN)/pytest --capture=sys -p no:cacheprovider $(SANITIZE_TESTS:%=tests/%.py) $(PYTEST_ARGS)

# The wheel is built in a clean folder, so that nothing of an earlier build gets into it, and by the
# hook that pip calls, since setuptools deprecates running setup.py for this. auditwheel
# names the oldest Linux that the libraries run on, and leaves PyTorch's own libraries outside. It looks
# for patchelf in PATH.
wheel: $(DEV_DONE)
	rm -rf $(WHEEL)
	$(BIN)/python -c 'from setuptools import build_meta; build_meta.build_wheel( \
		"$(WHEEL)", {"--global-option": "--quiet build --build-base $(WHEEL)/build"})'
	@ls $(WHEEL)/build/lib*/gemma4_fast/_cpu*.so >/dev/null
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' \
		--wheel-dir dist $(WHEEL)/*.whl

lint: $(DEV_DONE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV_DONE)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .benchmarks
	rm -f gemma4_fast/_native*.so gemma4_fast/_cpu*.so gemma4_fast/_cuda*.so $(NATIVE_DONE)
	find . -path './$(VENV)' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- set-up ----------------------------------------------------------------------------------------------------------

$(VENV_DONE):
	@command -v $(PYTHON) >/dev/null || \
		{ echo "error: '$(PYTHON)' not found. Install Python 3.10 or newer, or name one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1); Python 3.10 or newer is needed." \
		       "Name one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: $(PYTHON) lacks the modules venv and ensurepip." \
		       "On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(RUN_DONE): tests/requirements/run.txt | $(VENV_DONE)
	@echo "Installing run-time dependencies into $(VENV); PyTorch is large, so this can take minutes."
	$(PIP) install -r tests/requirements/run.txt
	@touch $@

$(DEV_DONE): tests/requirements/dev.txt $(RUN_DONE)
	$(PIP) install -r tests/requirements/dev.txt
	@touch $@

# Only the tests run Triton's interpreter. Its package is large (188 MB), so `make lint` does without.
$(TRITON_DONE): tests/requirements/triton.txt $(DEV_DONE)
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) install -r tests/requirements/triton.txt
	@touch $@

# Dependencies are there already, pinned: --no-deps keeps pip from touching them, --no-build-isolation from fetching build
# tools a second time. The native extension is left to the next step. (gemma4_fast/__init__.py holds the version.)
$(PACKAGE_DONE): pyproject.toml setup.py gemma4_fast/__init__.py $(RUN_DONE)
	GEMMA4_FAST_NATIVE=0 $(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

# Only the extension, when its sources change. It is optional, so a failed build is no error; but then the step is not
# marked as done, so that it is tried again once there is a compiler.
$(NATIVE_DONE): $(CSRC) $(PACKAGE_DONE)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@if ls gemma4_fast/_native*.so gemma4_fast/_cpu*.so >/dev/null 2>&1; then touch $@; fi

$(GPU_DONE): pyproject.toml setup.py gemma4_fast/__init__.py
	@$(PYTHON) -c 'import torch, triton, pytest, setuptools, pybind11, ninja, rich, jinja2, safetensors, tokenizers' || \
		{ echo "error: $(PYTHON) lacks a package (above) that the GPU's tests need; they use what it has, and download nothing."; exit 1; }
	$(PYTHON) -m venv --without-pip --system-site-packages $(GPU_VENV)
	@# An interpreter that is in a virtual environment itself: its packages too.
	$(PYTHON) -c 'import site; print(*site.getsitepackages(), sep="\n")' > \
		$$($(GPU_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth
	GEMMA4_FAST_NATIVE=0 $(GPU_VENV)/bin/python -m pip install --no-deps --no-build-isolation --no-index --editable .
	@touch $@

# ---- sanitizers ------------------------------------------------------------------------------------------------------

ASAN := -fsanitize=address,undefined
$(SANITIZE)/.lib-done: $(CSRC) setup.py $(shell find gemma4_fast kernels -name '*.py') $(RUN_DONE)
	CXX=$(CXX) CXXFLAGS="$(ASAN) -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1" LDFLAGS="$(ASAN)" \
		$(BIN)/python setup.py --quiet build --build-base $(SANITIZE)/tmp --build-lib $(SANITIZE)/lib
	@ls $(SANITIZE)/lib/gemma4_fast/_cpu*.so >/dev/null
	@touch $@

$(SANITIZE)/pool: tests/sanitize/pool.cpp csrc/cpu/pool.cpp csrc/cpu/pool.h csrc/cpu/parallel.h
	@mkdir -p $(@D)
	$(CXX) -std=c++17 -fsanitize=thread -O1 -g -pthread -Icsrc -DGEMMA4_ISA=plain $(filter %.cpp,$^) -o $@

$(SANITIZE)/threads-native: TSAN := -march=native
$(SANITIZE)/threads-%: tests/sanitize/threads.cpp $(CSRC)
	@mkdir -p $(@D)
	$(CXX) -std=c++17 -fsanitize=thread $(TSAN) -O1 -g -w -ffp-contract=off -pthread -Icsrc -DGEMMA4_ISA=$* \
		$(filter-out csrc/cpu/torch_ops.cpp,$(wildcard csrc/cpu/*.cpp)) $< -o $@
