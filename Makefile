# `make help` lists the targets. PYTHON=python3.12 chooses the interpreter of .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
INSTALLED := $(VENV)/installed
NATIVE := $(wildcard csrc/*.* csrc/*/*) $(wildcard tests/emulation/*.h tests/emulation/*.cpp tests/emulation/*.cu tests/fuzz/*.cpp)

export OMP_WAIT_POLICY := PASSIVE
# For what is installed and, under the second name from pip 25.3 on, for the environment it is built in.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# CUDA kernels for every GPU generation take minutes to compile: by default only where there is a GPU.
export PYDEQSOLVE_CUDA ?= $(if $(shell nvidia-smi -L 2>/dev/null),AUTO,OFF)

.PHONY: help install demo docs notebooks report test check lint format types cuda-check arm-check emulate fuzz defects wheel release clean
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' $(MAKEFILE_LIST) | awk -F': ' '{ printf "make %-11s %s\n", $$1, $$2 }'

# Says what is missing by name, instead of failing in the middle of the build.
define needed
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
	  || { echo "$(PYTHON) is missing or older than 3.10: sudo apt-get install -y python3 python3-venv python3-dev, or make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip, os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null \
	  && command -v $${CXX:-c++} >/dev/null \
	  || { echo "missing: sudo apt-get install -y python3-venv python3-dev g++"; exit 1; }
endef

install: $(INSTALLED)  ## .venv with all that developers need, the native module built
demo: $(READY)  ## noise becomes emoji, images are sampled and inverted; pictures in demo-output/
	@echo "demo: about three minutes; pictures go to demo-output/"
	@$(BIN)/deq-ddim demo --overwrite --output demo-output
	@$(BIN)/python docs/examples/colour_picture.py --steps 100 --columns 8 --seed 0 --rounds 1 2 4 8 \
	  --output demo-output/emoji.png

report: $(READY)  ## the paper's figures and tables measured anew; report-output/report.html
	@echo "report: goes to report-output/, and goes on from there when interrupted"
	@$(BIN)/deq-ddim report --output report-output $(ARGS)

docs: $(INSTALLED)  ## the documentation, warnings as errors, notebooks run; docs/_build/html/index.html
	@$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs: open docs/_build/html/index.html"

notebooks: $(INSTALLED)  ## docs/gallery/*.ipynb, run, from the scripts of docs/examples
	@$(BIN)/python docs/notebooks.py $(ARGS)

# A test runs on one thread, so two at a time; tests of a file stay together for what they share. ARGS="-n 0" for a debugger.
test: $(INSTALLED)  ## all tests but the heavy ones; ARGS="-k anderson" chooses
	@echo "test: about five minutes on two cores; a dot is a test that passed"
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not check" $(ARGS)

check: $(INSTALLED)  ## heavy tests (sanitizers, emulation, archives), and random cases in full number
	@RANDOM_CASES=all $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "check or hypothesis" $(ARGS)

lint: $(INSTALLED)  ## style of Python and C++
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/clang-format --dry-run -Werror $(filter %.h %.cpp %.cu %.cuh,$(NATIVE))

format: $(INSTALLED)  ## writes what lint asks for
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .
	@$(BIN)/clang-format -i $(filter %.h %.cpp %.cu %.cuh,$(NATIVE))

types: $(INSTALLED)  ## mypy
	@$(BIN)/mypy

cuda-check: $(INSTALLED)  ## spills, loads, registers and occupancy of the compiled CUDA kernels
	@$(BIN)/python benchmarks/cuda_static.py --check

# What Debian's g++-aarch64-linux-gnu and qemu-user hold.
arm-check: $(INSTALLED)  ## the CPU kernels on emulated processors, Arm and x86-64 without AVX2
	@for program in aarch64-linux-gnu-g++ qemu-aarch64 qemu-x86_64; do command -v $$program >/dev/null \
	  || { echo "$$program is missing: sudo apt-get install -y g++-aarch64-linux-gnu qemu-user"; exit 1; }; done
	@$(BIN)/python -m pytest -q tests/test_portable.py

emulate: $(INSTALLED)  ## the CUDA kernels run on the CPU
	@$(BIN)/python -m pytest -q tests/test_cuda_emulation.py

defects: $(INSTALLED)  ## plants defects one by one, each must fail its test (two minutes); ARGS=ridge chooses
	@$(BIN)/python tests/planted_defects.py $(ARGS)

fuzz: $(INSTALLED)  ## 100,000 random steps of the CPU kernels under sanitizers
	@FUZZ_CASES=100000 $(BIN)/python -m pytest -q tests/test_fuzz.py

# Apart from .venv: of this tree, of no environment. What was compiled for .venv with the same flags is not compiled again.
wheel:  ## wheels in dist/, each installed and used; ARGS="--all" for every Python here, PYDEQSOLVE_CUDA=ON for GPUs
	$(call needed)
	@$(PYTHON) release/wheels.py $(ARGS)

release:  ## dist/ with wheels for every Python here, source archive, notes and check sums; ARGS="--tag v0.1.0"
	$(call needed)
	@rm -rf dist
	@$(PYTHON) release/wheels.py --all --source
	@$(PYTHON) release/check.py $(ARGS)

clean:  ## removes .venv and everything built
	rm -rf $(VENV) build dist demo-output report-output docs/_build docs/gallery *.egg-info pydeqsolve/_native*.so
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis

# Two stages: what using it needs, then what developing it needs on top. Each says what it does, and is done once.
$(READY): constraints.txt pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*) | $(BIN)/python
	@echo "install: torch and a few more packages into $(VENV), then the native module is compiled, CUDA kernels $(PYDEQSOLVE_CUDA);"
	@echo "install: 1.2 GB on disk, two to five minutes the first time. What pip does:"
	@$(BIN)/python -m pip install -e ".[viz]"
	@$(BIN)/python -c "import pydeqsolve; print('install:', pydeqsolve.build_info())"
	@touch $@

# The package is there, so pip fetches the extras alone and compiles nothing again.
$(INSTALLED): $(READY)
	@echo "install: tools for tests, style, types and documentation into $(VENV), .6 GB. What pip does:"
	@$(BIN)/python -m pip install "pydeqsolve[dev,docs,viz,data,diffusers]"
	@touch $@

$(BIN)/python:
	$(call needed)
	@echo "install: virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)
