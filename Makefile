# Every target makes what it needs: a virtual environment, the packages of one dependency group, the extension.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
PIP := $(BIN)/python $(INSTALL)
FRAMEWORKS_PIP := $(VENV)/frameworks/bin/python $(INSTALL)

help:  ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1: /p' $(MAKEFILE_LIST)

demo: $(VENV)/demo.done build  ## train a real network with seven optimizers; table and plot (under three minutes)
	$(BIN)/python examples/digits.py

train: $(VENV)/demo.done build  ## train a small GPT sharded over two processes by FSDP2, resumable (about a minute)
	$(BIN)/torchrun --nproc-per-node 2 examples/train_fsdp2.py

paper: $(VENV)/demo.done build  ## run docs/paper.md and docs/large-models.md again, resumable, into out/ (under an hour on two cores; QUICK=1: two minutes)
	$(BIN)/python examples/paper/run.py $(if $(QUICK),--quick)
	$(BIN)/python examples/paper/large_models.py $(if $(QUICK),--quick)

test: $(VENV)/test.done build lint types  ## lint, types and the usual tests (thirteen minutes on two cores)
	FUSED_ADAMP_REQUIRE_EXTENSION=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-exhaustive: $(VENV)/test.done build test-ptx  ## every test there is: full products in place of covering arrays (hours)
	FUSED_ADAMP_REQUIRE_EXTENSION=1 nice $(BIN)/python -m pytest -m "" --numprocesses 2 --dist loadfile --no-loadscope-reorder --ignore tests/ptx

test-ptx: $(VENV)/test.done build  ## all tests of compiled kernels in the emulator, both backends and plans (an hour on two cores)
	$(MAKE) --jobs 2 --output-sync=line emulated-cuda-one_pass emulated-cuda-split emulated-triton-one_pass emulated-triton-split
	nice $(BIN)/python -m pytest -m "" tests/ptx/test_instructions.py tests/ptx/test_machine.py tests/ptx/test_protocol.py tests/ptx/test_triton.py tests/ptx/test_cuda.py
	nice $(BIN)/python -m pytest -m "" tests/ptx/test_triton_compile.py tests/ptx/test_cuda_compile.py

emulated-%: $(VENV)/test.done build
	FUSED_ADAMP_EMULATED=$(word 1,$(subst -, ,$*)) FUSED_ADAMP_PLAN=$(word 2,$(subst -, ,$*)) nice $(BIN)/python -m pytest -m "" tests/ptx/emulated_*.py

mutants: $(VENV)/test.done build  ## plant small faults, one at a time: which tests find them (two hours on two cores)
	nice $(BIN)/python tests/support/mutation.py tests/support/host_mutants.py tests/ptx/kernel_mutants.py tests/ptx/cuda_mutants.py

test-triton39: $(VENV)/test.done build  ## compile a few kernels with Triton 3.9 too (about a minute)
	test -d $(VENV)/triton39 || $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps \
		--target $(VENV)/triton39 'triton==3.9.*'
	FUSED_ADAMP_VARIANTS=few PYTHONPATH=$(VENV)/triton39 $(BIN)/python -m pytest tests/ptx/test_triton_compile.py

test-frameworks: $(VENV)/frameworks.done build  ## examples/frameworks in Hugging Face, Lightning, timm, ... (a minute, once they are installed)
	PYTHONPATH=. $(VENV)/frameworks/bin/python -m pytest -c tests/frameworks/pytest.ini tests/frameworks

lint: $(VENV)/test.done
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/test.done
	$(BIN)/mypy
	MYPYPATH=tests/support:tests/sharding:tests/numerics $(BIN)/mypy --follow-imports silent --allow-untyped-calls --ignore-missing-imports tests/gpu bench/gpu.py

bench: $(VENV)/bench.done build  ## the full benchmark against torch, clovaai and pytorch_optimizer
	mkdir -p out
	$(BIN)/python -m pytest -c bench/pytest.ini bench --benchmark-json=out/bench.json
	$(BIN)/python -m bench.report out/bench.json --out bench/results

bench-sharded: $(VENV)/bench.done build  ## sharded parameters on two ranks, against torch and the formula on DTensors
	$(BIN)/python -m bench.sharded --out bench/results

bench-smoke: $(VENV)/bench.done build  ## both benchmarks' machinery on tiny shapes
	mkdir -p out
	$(BIN)/python -m pytest -c bench/pytest.ini bench --smoke --benchmark-json=out/bench-smoke.json
	$(BIN)/python -m bench.report out/bench-smoke.json
	$(BIN)/python -m bench.sharded --smoke

gpu:  ## on a CUDA machine: build, GPU tests, benchmark and profile in nine minutes, with the python at hand [OUT=folder QUICK=1]
	$(PYTHON) -m bench.gpu $(if $(OUT),--out "$(OUT)") $(if $(QUICK),--quick)

gpu-dry-run: $(VENV)/test.done build  ## the same command's machinery on the CPU, in Triton's interpreter
	$(BIN)/python -m bench.gpu --dry-run

# With --quiet, mkdocs would not see the warnings that --strict turns into errors.
docs: $(VENV)/docs.done  ## build the site into out/site; a broken link is an error (seconds)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

build: $(VENV)/build.done  ## install the package in place, with its extension where there is a compiler

clean:  ## remove everything that was made
	rm -rf $(VENV) build out *.egg-info fused_adamp/*.so

$(VENV)/build.done: $(VENV)/torch.done setup.py pyproject.toml $(wildcard csrc/*)
	$(PIP) --no-build-isolation --no-deps --editable .
	touch $@

$(VENV)/torch.done: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade 'pip>=25.1' setuptools torch
	touch $@

$(VENV)/docs.done: constraints.txt pyproject.toml  # without torch
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade 'pip>=25.1'
	$(PIP) --group docs
	touch $@

# An environment of its own: frameworks ask for many packages, and some for versions that others refuse.
$(VENV)/frameworks.done: examples/frameworks/requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)/frameworks
	$(FRAMEWORKS_PIP) --upgrade 'pip>=25.1' setuptools torch
	sed 's/#.*//' $< | while read -r packages; do \
		test -z "$$packages" || (set -f; $(FRAMEWORKS_PIP) $$packages) || echo "not installed: $$packages"; \
	done
	touch $@

$(VENV)/%.done: $(VENV)/torch.done pyproject.toml
	$(PIP) --group $*
	touch $@

.PHONY: help demo train paper test test-exhaustive test-ptx mutants test-triton39 test-frameworks lint types bench bench-sharded bench-smoke gpu gpu-dry-run docs build clean
