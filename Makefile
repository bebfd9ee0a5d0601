# Every target makes .venv on first use; PYTHON picks the interpreter it is made with.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test bench aot gpu lint format clean

demo: $(VENV)/.ready
	$(BIN)/eefast demo

# Two test processes on few cores: threads that spin while they wait would slow one another down many times over.
test: $(VENV)/.ready
	OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -n 2 --dist worksteal

# Microbenchmarks and whole networks on this machine's CPU, rows to bench/results/; about four minutes, best alone.
bench: $(VENV)/.ready
	$(BIN)/python bench/ops.py --device cpu
	$(BIN)/python bench/throughput.py --device cpu --only eenet20 --seconds 110

# Compiles every Triton kernel for five generations of GPUs, without one; a table of registers, memory, instructions.
aot: $(VENV)/.ready
	$(BIN)/python tests/aot.py

# On a machine with a GPU and its own PyTorch: no network, no .venv; under nine minutes. PHASE=tests|sanitize|ops|...
gpu:
	bench/gpu.sh $(PHASE)

lint: $(VENV)/.ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h')

format: $(VENV)/.ready
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h')

# torch comes first: the C++ kernels are built against the torch that they will run with.
$(VENV)/.ready: pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "setuptools>=61" wheel ninja "torch>=2.11" torchvision
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info eefast/*.so
