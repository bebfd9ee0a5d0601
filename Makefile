# Every target makes .venv on first use; PYTHON picks the interpreter it is made with.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A hundred processes import these modules: with the variable set each would compile them again.
unexport PYTHONDONTWRITEBYTECODE

CPP := 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/simt/*' 'tests/tsan/*.cpp' 'examples/cpp/*.cpp'

.PHONY: demo test test-all fuzz sanitize sanitized sanitize-tests sanitize-calls sanitize-threads bench int8 \
	int8-accuracy backbones bounds rules drift wheel aarch64 host-time latency score-bench serving-bench parity guard training report second-torch first-hour docs aot gpu gpu-pack lint format clean

demo: $(VENV)/.ready
	$(BIN)/eefast demo

# Two test processes on few cores: threads that spin while they wait would slow one another down many times over.
test: $(VENV)/.ready
	OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -n 2 --dist worksteal

# The tests marked slow, too: what `make test` proves, on more inputs; on Ray, where it can be installed; with the oldest
# torch; the Triton kernels by an older release, which the machine with a GPU may have.
test-all: $(VENV)/.ready
	-$(BIN)/pip install --quiet "ray[data]"
	OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -n 2 --dist worksteal -m ""
	$(BIN)/python tests/second_torch/second_torch.py
	$(MAKE) aot TRITON=3.6.0 SKIP=--skip

# Tests of what depends on torch, with the oldest release that eefast supports, on the library that was built for another
# one; SECOND_TORCH="--torch 2.12.1 tests/network" for others. The environment takes 6 GB of build/.
second-torch: $(VENV)/.ready
	$(BIN)/python tests/second_torch/second_torch.py $(SECOND_TORCH)

# A million rows of random networks, called in random ways, beside float64 (FUZZ="--rows 20000 --seed 7" for others); what
# fails is printed as the line of code that repeats it. A quarter of an hour.
fuzz: $(VENV)/.ready
	$(BIN)/python tests/fuzz --rows 1000000 $(FUZZ)

# The tests of the ops in C++, not of their references nor of confidences alone, and HOSTILE wrong calls of each, on
# kernels that stop at a wrong address, an overflow or undefined behaviour; the engines under ThreadSanitizer; with GCC,
# side by side. HOSTILE=10000 takes some minutes more.
HOSTILE ?= 1000
SANITIZED := build/sanitized/eefast/_C.abi3.so
UNDER_ASAN = EEFAST_LIBRARY=$(CURDIR)/$(SANITIZED) OMP_WAIT_POLICY=PASSIVE \
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0
sanitize: $(VENV)/.ready
	$(MAKE) --jobs 2 --output-sync=target sanitize-threads sanitize-tests sanitize-calls

sanitized: $(SANITIZED)

$(SANITIZED): $(VENV)/.ready
	SANITIZE=1 $(BIN)/python setup.py --quiet build_ext --build-lib build/sanitized --build-temp build/sanitized
	touch $@

sanitize-tests: $(SANITIZED)
	$(UNDER_ASAN) $(BIN)/pytest tests/ops/test_exit_head.py tests/ops/test_exit_head_rules.py \
		tests/ops/test_resident_forward.py tests/ops/test_resident_int8.py -p no:cacheprovider -k "not (reference \
		or other or without or compiles or opcheck or triton or trained or 110 or eenet18 or eenet34 or eenet50 \
		or every_width or impossible or far_apart or exactly_at or agrees or helpers or seconds_are or only[2] \
		or only[4] or (bfloat16 and (wide or linear or conv1)) or the_answer_depends or threads_of or finite \
		or ((criteria or depends) and (entropy or margin or max_probability)))"

sanitize-calls: $(SANITIZED)
	$(UNDER_ASAN):allocator_may_return_null=1:max_allocation_size_mb=1024 \
		$(BIN)/python tests/helpers/hostile_ops.py 0 $(HOSTILE) exit_head resident_forward resident_int8 \
		> build/sanitized/calls || { tail -n 1 build/sanitized/calls; false; }

sanitize-threads:
	$(PYTHON) tests/tsan/run.py

# Microbenchmarks and whole networks on this machine's CPU, rows to bench/results/; under 25 minutes, best alone. What no
# longer fits, and peers that are not installed, are rows that say so: .venv/bin/pip install ".[bench]". In six minutes:
# .venv/bin/python bench/throughput.py --device cpu --quick.
bench: $(VENV)/.ready
	$(BIN)/python bench/ops.py --device cpu
	$(BIN)/python bench/throughput.py --device cpu

# Eight bits beside float32, eefast beside ONNX Runtime and OpenVINO, in one thread, then in all: rows to bench/results/;
# twelve minutes, best alone. Needs the peers, as `make bench`.
int8: $(VENV)/.ready
	$(BIN)/python bench/throughput.py --device cpu --int8

# Networks of torchvision and timm with exits attached, eefast beside ONNX Runtime and OpenVINO, in one thread: rows to
# bench/results/; half an hour, best alone (BACKBONES="--only resnet18 --batches 1" for less). Needs the peers and timm.
backbones: $(VENV)/.ready
	$(BIN)/python bench/backbones.py $(BACKBONES)

# What eight bits change in the accuracy of trained networks, the shipped one or NETWORKS="runs/a runs/b", whose data are
# in the folder DATA; rows to bench/results/, some minutes each.
int8-accuracy: $(VENV)/.ready
	$(BIN)/python bench/int8_accuracy.py $(NETWORKS) --data-root $(DATA)

# How often bounds on accuracy and cost break on new images, with an assurance and without, for the networks and data of
# int8-accuracy; rows to bench/results/, a minute each.
bounds: $(VENV)/.ready
	$(BIN)/python bench/bounds.py $(NETWORKS) --data-root $(DATA)

# Every exit rule at equal cost on new images, for the networks and data of int8-accuracy; rows to bench/results/, four
# minutes each.
rules: $(VENV)/.ready
	$(BIN)/python bench/rules.py $(NETWORKS) --data-root $(DATA)

# Cost and accuracy while test images are turned and blurred: fixed thresholds beside those of eefast.online, for the
# networks and data of int8-accuracy; rows and a figure to bench/results/, a minute each.
drift: $(VENV)/.ready
	$(BIN)/python bench/drift.py $(NETWORKS) --data-root $(DATA)

# How long an image waits, at which load, on this machine's CPU: rows to bench/results/; about two minutes, best alone.
latency: $(VENV)/.ready
	$(BIN)/python bench/latency.py

# `eefast score` beside bare streaming, decoding alone, fewer workers, Ray: rows to bench/results/; eight minutes, best
# alone. With JPEGS="--jpegs folder" from JPEG files, too; for Ray .venv/bin/pip install ".[ray]".
score-bench: $(VENV)/.ready
	$(BIN)/python bench/score.py $(JPEGS)

# What the host does per streamed batch of the resident engine on a GPU, launches replaced by nothing, beside an older
# checkout in BEFORE; rows to bench/results/, under a minute, best alone.
host-time: $(VENV)/.ready
	$(BIN)/python bench/host_time.py --before $(BEFORE)

# eefast.serving and `eefast serve` beside servers of whole batches: rows to bench/results/; eight minutes, best alone. For
# Ray Serve and LitServe .venv/bin/pip install "ray[serve]" litserve.
serving-bench: $(VENV)/.ready
	$(BIN)/python bench/serving.py

# Every engine in every dtype beside the network that sees one image at a time: flips, accuracy, cost, on 10,000 images
# (PARITY="--images 256" for fewer); rows to bench/results/, a quarter of an hour. Fails where an answer is wrong.
parity: $(VENV)/.ready
	$(BIN)/python bench/parity.py $(PARITY)

# A wheel in dist/, checked, installed into fresh environments of every Python here, tested there; minutes, most of them
# for torch. WHEEL=--cuda with CUDA kernels; for all checks .venv/bin/pip install ".[wheel]".
wheel: $(VENV)/.ready
	$(BIN)/python tests/wheel/make_wheel.py $(WHEEL)

# The portable C++ kernels on aarch64, cross-compiled and run under qemu-user, beside those of this processor; a minute.
aarch64: $(VENV)/.ready
	$(BIN)/python tests/aarch64/run.py

# Fails where eefast lost a quarter of its lead over the masked loop in PyTorch; under a minute where it passes.
# GUARD=--write writes a new lead.
guard: $(VENV)/.ready
	$(BIN)/python bench/guard.py $(GUARD)

# Networks beside their plain twins on the data sets in the folder DATA, then bench/results/training.md; hours
# on two cores. Interrupted, it continues where it stopped.
DATA ?= data
training: $(VENV)/.ready
	$(BIN)/python bench/training.py --data-root $(DATA)

# How long a newcomer takes: a fresh clone, the demo, the quick start's commands on own images; ten minutes, best alone.
# FIRST_HOUR=--random-weights where published weights cannot be fetched.
first-hour: $(VENV)/.ready
	PYTHONPATH=tests/helpers $(BIN)/python bench/first_hour.py $(FIRST_HOUR)

# docs/benchmarks.md and its figures, from the committed rows in bench/results/.
report: $(VENV)/.ready
	$(BIN)/python bench/benchmarks_page.py

# The documents as a site, build/site, by packages in an environment of their own; warnings and dead links fail.
docs: build/docs-venv/.ready
	NO_MKDOCS_2_WARNING=1 build/docs-venv/bin/mkdocs build --strict --quiet

build/docs-venv/.ready: Makefile
	$(PYTHON) -m venv build/docs-venv
	build/docs-venv/bin/pip install --quiet "mkdocs-material>=9.7,<10" "mkdocstrings[python]>=1,<2"
	touch $@

# Compiles every Triton kernel for five generations of GPUs, without one; a table of registers, memory, instructions.
# TRITON=3.6.0: by that release, beside the oldest PyTorch that eefast supports, which then loads and runs the C++ kernels;
# both are installed into build/triton-3.6.0. SKIP=--skip: no failure where they cannot be had.
WITH_TRITON = $(BIN)/python $(if $(TRITON),tests/helpers/other_triton.py $(SKIP) $(TRITON))
aot: $(VENV)/.ready
	$(WITH_TRITON) tests/helpers/aot.py
	$(if $(TRITON),OMP_WAIT_POLICY=PASSIVE $(WITH_TRITON) -m pytest tests/ops/test_library.py tests/ops/test_exit_head.py \
		tests/ops/test_resident_forward.py)

# The C++ kernels and every Triton kernel, compiled here into build/gpu-pack for a machine with a GPU, and the command that
# takes them there; GPU=80 for an A100, 90 is an H100. TRITON: the release on that machine.
GPU ?= 90
gpu-pack: $(VENV)/.ready
	$(WITH_TRITON) tests/helpers/gpu_pack.py --capability $(GPU)

# On a machine with a GPU and its own PyTorch: no network, no .venv; in commands of eight minutes. PHASE="smoke compact" for some.
gpu:
	bench/gpu.sh $(PHASE)

lint: $(VENV)/.ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files $(CPP))

format: $(VENV)/.ready
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $$(git ls-files $(CPP))

# pip uses one core, so the compilers work beside it: nvcc needs no torch; the C++ kernels are built against the torch that
# they will run with, while pip brings the other packages. Python compiles what it imports; pip would compile all 12,000
# modules.
$(VENV)/.ready: pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --no-compile --quiet "setuptools>=61" wheel ninja
	$(BIN)/python setup.py cuda & $(BIN)/pip install --no-compile --quiet "torch>=2.11" torchvision && wait $$!
	$(BIN)/python setup.py --quiet build_ext --inplace & \
		EEFAST_USE_CPP=0 $(BIN)/pip install --no-compile --quiet --no-build-isolation --editable ".[dev]" && wait $$!
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info eefast/*.so
