#!/usr/bin/env bash
# Everything that needs a GPU, what decides first: smoke, figures, tests, sanitizers; commands of 480 s at most.
#
#   bench/gpu.sh                all phases, 850 s at most, as many as fit into a command
#   bench/gpu.sh smoke key ...  only these, of: build smoke key compact throughput profile ops sanitize parity tests;
#                               seconds: LIMIT below
#   bench/gpu.sh train          only when asked for: trains networks, 480 s at most
#
# A command begins no phase that may not fit into its $BUDGET of seconds (default: 480). Its last line, NEXT=..., is the
# command for those that are left, of 180 s; empty where none is. A summary comes after every phase.
#
# `smoke` answers in seconds whether kernels run and which of several ways is faster; `key` runs the tests that matter
# most, while torch.compile fills its cache, `tests` all. `throughput` measures the networks of the resident engine,
# `compact` those of the compact one; `profile` shows their kernels one by one; `parity` compares their answers with those
# of the network that sees one image at a time. Without `build` before it, and on a machine without timm, a phase leaves
# out what it lacks, and the rows say so. Kernels built before (`make gpu-pack`) are taken from
# EEFAST_LIBRARY=.../_C.abi3.so, Triton's from TRITON_CACHE_DIR.
#
# Needs torch, Triton and pytest in $PYTHON (default: python3), for `build` also a C++ compiler and ninja; no network and
# no installation of eefast. Logs (logs.tar.gz), summary.txt and new rows go to the folder $OUT (default: build/gpu), rows
# also to bench/results/. COMMIT names the commit in the rows where git does not know it.
set -u

asked=${PYTHON:-python3}
PYTHON=$(command -v "$asked") || { echo "bench/gpu.sh: no interpreter PYTHON=$asked" >&2 && exit 2; }
[[ $PYTHON == /* ]] || PYTHON=$PWD/$PYTHON
# Not a wrapper around it: the sanitizers look at the process that they start.
PYTHON=$("$PYTHON" -c 'import sys; print(sys.executable)')
[[ ${OUT:-/} == /* ]] || OUT=$PWD/$OUT
[[ ${EEFAST_LIBRARY:-/} == /* ]] || EEFAST_LIBRARY=$PWD/$EEFAST_LIBRARY
[[ ${TRITON_CACHE_DIR:-/} == /* ]] || TRITON_CACHE_DIR=$PWD/$TRITON_CACHE_DIR
cd "$(dirname "$0")/.." || exit

declare -A LIMIT=([build]=75 [smoke]=25 [key]=65 [compact]=150 [throughput]=75 [profile]=45)
LIMIT+=([ops]=105 [sanitize]=75 [parity]=30 [tests]=205 [train]=480)
PHASES="build smoke key compact throughput profile ops sanitize parity tests"
BUDGET=${BUDGET:-480}
case " $* " in *" -h "* | *" --help "*) sed -n '2,23s/^# \{0,1\}//p' bench/gpu.sh && exit ;; esac
for phase in "$@"; do
  [ -n "${LIMIT[$phase]:-}" ] || { echo "bench/gpu.sh: no phase '$phase'; choose from: $PHASES train" >&2 && exit 2; }
done

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || {
  echo "bench/gpu.sh: $PYTHON has no PyTorch that finds a CUDA device; name another in PYTHON, or another machine" >&2 && exit 2
}

export PYTHON OUT=${OUT:-$PWD/build/gpu} SITE=$PWD/build/gpu/site PYTHONUNBUFFERED=1
BEGIN=$(date -u +%Y-%m-%dT%H:%M:%S+00:00) LOGS=$PWD/build/gpu/logs
rm -rf "$LOGS"
mkdir -p "$OUT" "$SITE/eefast" "$LOGS"

# The folder kernels/ is imported as eefast.kernels; without an installation a folder of links does that.
find "$SITE/eefast" -type l -delete
for path in "$PWD"/eefast/*; do
  [[ $path == *.so || $path == */__pycache__ ]] || ln -s "$path" "$SITE/eefast/"
done
ln -s "$PWD/kernels" "$SITE/eefast/kernels"
ln -sf "$PWD/eefast_command.py" "$SITE/"
export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH}
# Here and in the phases: what `key` compiles is found by those after it.
export TORCHINDUCTOR_CACHE_DIR=$PWD/build/gpu/inductor

if [ -f "${TRITON_CACHE_DIR:-}/packed.json" ]; then
  "$PYTHON" tests/helpers/gpu_pack.py --place "$TRITON_CACHE_DIR" || unset TRITON_CACHE_DIR
fi

build() {
  [[ -z ${EEFAST_LIBRARY:-} ]] || { echo "not built: EEFAST_LIBRARY=$EEFAST_LIBRARY" && return; }
  # For this machine's GPU, with the instructions of its generation.
  TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c 'import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + "a" * (major >= 9))') || return
  export TORCH_CUDA_ARCH_LIST
  # The system's compiler: a variable may name one that links another C++ runtime, through which no exception passes.
  export CC=cc CXX=c++
  "$PYTHON" setup.py build_ext --build-lib "$SITE" --build-temp build/gpu/temp && cd build/gpu &&
    "$PYTHON" -c 'import eefast.kernels.exit_head as _, eefast.ops as o
print("C++ kernels:", o.CPP_MISSING or "loaded", "CUDA kernels:", o.CUDA_MISSING or "loaded")' &&
    EEFAST_ISA=none "$PYTHON" -c 'import eefast.ops as o
try: o.instruction_set()
except RuntimeError: print("errors get out of the C++ kernels")
else: raise SystemExit("EEFAST_ISA=none was accepted")'
}

# The options in pyproject.toml ask for plugins of pytest that may be missing here. Started from elsewhere, since in the
# top folder Python would find eefast/ before the folder of links. Other files need packages that may be missing.
GPU_TESTS="-m pytest $(grep -lE 'mark\.gpu|runs_triton' tests/*/test_*.py | sed 's|^|../../|' | tr '\n' ' ')"
GPU_TESTS+="-m gpu -o addopts= -o faulthandler_timeout=60 -q -ra -p no:cacheprovider --continue-on-collection-errors"

tests() {
  local workers=()
  "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n $(($(nproc) < 8 ? $(nproc) : 8)) --dist worksteal)
  cd build/gpu && "$PYTHON" $GPU_TESTS "${workers[@]}"
}

smoke() { "$PYTHON" bench/gpu_smoke.py; }

KEY="TestOnTheGpu or test_on_a_gpu or nan or capture or uint8 or every_exit or free_exits or the_same_bits or in_a_graph"
key() {
  local workers=()
  "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n 6 --dist worksteal)
  # Nothing is timed here, so torch.compile takes the other cores; what is not done then is compiled later.
  timeout -k 1 55 "$PYTHON" bench/precompile.py &
  (cd build/gpu && "$PYTHON" $GPU_TESTS "${workers[@]}" -k "$KEY or exit_head_cuda or indexed_conv_triton")
  local status=$?
  wait
  return $status
}

# The tools run side by side, since most of their time goes into starting PyTorch under them. Alone, without the kernels
# that `tests` has compiled, this takes longer than its budget.
sanitize() {
  local places sanitizer tool jobs=() status=0
  places=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin:$(dirname "$(readlink -f "$(command -v nvcc)")")
  sanitizer=$(export PATH=$places && command -v compute-sanitizer) || { echo "not found in $places" && return 1; }
  set -o pipefail
  cd build/gpu || return
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck initcheck; do
    # Tests fill fresh memory, which would hide from initcheck what is read before it is written.
    [ $tool = initcheck ] && export EEFAST_TEST_POISON=0
    "$sanitizer" --tool "$tool" --target-processes application-only --launch-timeout 0 --error-exitcode 9 \
      "$PYTHON" $GPU_TESTS -k sanitize 2>&1 | sed -u "s/^/$tool: /" &
    jobs+=($!)
  done
  for job in "${jobs[@]}"; do wait "$job" || status=1; done
  return $status
}

ops() { "$PYTHON" bench/ops.py --device cuda --seconds 85; }

throughput() { "$PYTHON" bench/throughput.py --device cuda --engine resident --seconds 58; }

compact() { "$PYTHON" bench/throughput.py --device cuda --engine compact --seconds 125; }

# What PyTorch's profiler sees of whole networks; then what the kernels reach, by NVIDIA's, where it is installed.
profile() {
  "$PYTHON" bench/gpu_profile.py || return
  local tool
  tool=$(command -v ncu || command -v "${CUDA_HOME:-/usr/local/cuda}/bin/ncu") || { echo "ncu not found" && return; }
  "$tool" --clock-control none --set basic --launch-count 8 \
    --kernel-name 'regex:resident|exit_head|classes|indexed_conv' "$PYTHON" bench/gpu_smoke.py || echo "ncu failed: $?"
}

# A way that has begun is finished, which the limit leaves room for.
parity() { "$PYTHON" bench/parity.py --device cuda --images 512 --seconds 12; }

# Needs lightning and rich too, and MNIST, Fashion-MNIST and cifar10-jpeg/ (an archive is unpacked) in the folder $DATA
# (default: data); $ONLY trains what has this in its name, such as "eenet110 on CIFAR". Networks go to $OUT.
train() {
  local data=${DATA:-data} unpacked=build/gpu/data
  if [ -f "$data/cifar10-jpeg/images.tar.xz" ] && [ ! -d "$data/cifar10-jpeg/train" ]; then
    mkdir -p "$unpacked/cifar10-jpeg" || return
    [ -d "$unpacked/cifar10-jpeg/train" ] || tar -xJf "$data/cifar10-jpeg/images.tar.xz" -C "$unpacked/cifar10-jpeg" || return
    for folder in mnist fashion-mnist; do ln -sfn "$(realpath "$data/$folder")" "$unpacked/$folder"; done
    data=$unpacked
  fi
  "$PYTHON" bench/training.py --device cuda --data-root "$data" --output "$OUT/training" --seconds 260 --only "${ONLY:-}"
}

export GPU_TESTS KEY
export -f build smoke key tests sanitize ops throughput compact profile parity train

# Few files come back from some machines, and none where a command is killed before it has written them.
pack() {
  tar -czf "$OUT/logs.tar.gz" -C "$LOGS" . 2>/dev/null
  printf '%s\n' "${summary[@]}" >"$OUT/summary.txt"
}
failed=0 summary=() left=() ran=0
trap pack EXIT
trap 'exit 143' TERM
for phase in ${*:-$PHASES}; do
  if [ $ran -gt 0 ] && [ $((SECONDS + LIMIT[$phase])) -gt "$BUDGET" ]; then
    left+=("$phase")
    continue
  fi
  ran=$((ran + 1))
  echo "$phase … (at most ${LIMIT[$phase]} s)" >&2
  start=$SECONDS
  # Interrupted, pytest still says what it found; background jobs, as in `sanitize`, ignore that signal.
  [[ $phase == tests || $phase == key ]] && signal=INT || signal=TERM
  timeout -s $signal -k 5 "${LIMIT[$phase]}" bash -uc "$phase" >"$LOGS/$phase.log" 2>&1
  code=$?
  case $code in 0) status=ok ;; 124 | 137) status="TIMED OUT" ;; *) status="FAILED ($code)" ;; esac
  [ $code -eq 0 ] && keep=1 || { keep=4 && failed=1; }
  wide=150
  [[ $phase == smoke || $phase == profile ]] && keep=40 wide=400
  lines=("$(printf '%-10s  %-11s %4d s' "$phase" "$status" $((SECONDS - start)))")
  filter=.
  [[ $phase == sanitize ]] && filter='SUMMARY|not found|(passed|failed|error|deselected).* in ' keep=6
  lines+=("$(grep -aE "$filter" "$LOGS/$phase.log" | tail -n $keep | cut -c 1-$wide | sed 's/^/    /')")
  printf '%s\n' "${lines[@]}"
  summary+=("${lines[@]}")
  pack
done

if compgen -G "$OUT/*.jsonl" >/dev/null; then "$PYTHON" bench/summary.py "$OUT"/*.jsonl --since "$BEGIN" --lines 64; fi
printf '%s\n' "${summary[@]}"
echo "NEXT=${left[*]:+BUDGET=180 bench/gpu.sh ${left[*]}}"
exit $failed
