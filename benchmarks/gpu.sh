#!/usr/bin/env bash
# Build, test and measure on a machine with a CUDA device and nvcc. No network is needed: torch,
# triton, setuptools, pybind11 and pytest have to be there, diffusers may be on PYTHONPATH.
#
#     benchmarks/gpu.sh [--dry-run] [build test models kernels sanitize bench ...]
#
#     build     the extension in place, for this GPU (TORCH_CUDA_ARCH_LIST overrides)
#     test      the suite with the real kernels; not Triton's interpreter, which is for CPUs
#     models    every family end to end, on tiny models
#     kernels   the second tier: every configuration, sanitizers on the host
#     sanitize  compute-sanitizer on small cases of the CUDA kernels, where it is installed
#     bench     the same as hessian cholesky sweep joint prune: rows in benchmarks/results/<device>.csv
#     speed     dense and pruned denoisers, eager, fused, compiled and in graphs: speed.csv, fused.csv
#
# Without a name all parts run. Each ends within ten minutes; all run whatever fails, and the exit
# status is 1 if one did. PYTHON is the interpreter (python3). Where OUT is set, the log and the
# results of this run are copied there. --dry-run prints the commands and needs no GPU.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

PYTHON=${PYTHON:-python3}
PART_SECONDS=590
SMALL='float64_is_the_reference or ties or dead or sweep or (inverse and not 1100)'
ALL_PARTS=(build test models kernels sanitize hessian cholesky sweep joint prune speed)

die() {
  echo "gpu.sh: $1" >&2
  exit 2
}

dry_run=false
parts=()
for argument in "$@"; do
  case $argument in
    --dry-run) dry_run=true ;;
    bench) parts+=(hessian cholesky sweep joint prune) ;;
    build | test | models | kernels | sanitize | hessian | cholesky | sweep | joint | prune | speed) parts+=("$argument") ;;
    -h | --help)
      sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
      exit 0
      ;;
    *) die "a part must be one of ${ALL_PARTS[*]} bench, got '$argument'." ;;
  esac
done
[ ${#parts[@]} -gt 0 ] || parts=("${ALL_PARTS[@]}")

capability() {
  "$PYTHON" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))'
}

if ! $dry_run; then
  "$PYTHON" -c 'import torch' || die "torch must be importable by $PYTHON. Run make gpu PYTHON=... with a Python that has a CUDA torch."
  "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    die "a CUDA device must be visible to torch, got none. Use 'make test' on this machine."
  command -v nvcc >/dev/null || PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
  command -v nvcc >/dev/null ||
    die "nvcc must be on PATH or in CUDA_HOME, found nowhere. Install the CUDA toolkit."
  architectures=${TORCH_CUDA_ARCH_LIST:-$(capability)}
else
  architectures=${TORCH_CUDA_ARCH_LIST:-of this GPU}
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

# Runs a command of at most so many seconds, or prints it.
limited() {
  local seconds=$1
  shift
  if $dry_run; then
    printf '%q ' "$@"
    printf '  # at most %s s\n' "$seconds"
  else
    timeout --kill-after=10 "$seconds" "$@"
  fi
}

part_build() {
  limited $PART_SECONDS env MOSAIC_BUILD=cuda TORCH_CUDA_ARCH_LIST="$architectures" \
    "$PYTHON" -m pip install --no-build-isolation --no-deps --no-index --editable . &&
    limited 60 "$PYTHON" -c 'import mosaic_kernels as mk; print(mk.backends())'
}

part_test() {
  limited $PART_SECONDS "$PYTHON" -m pytest -m 'not interpreter and not kernels and not models' -rs
}

part_models() {
  limited $PART_SECONDS "$PYTHON" -m pytest -m models -rs
}

part_kernels() {
  limited $PART_SECONDS "$PYTHON" -m pytest -m 'kernels and not interpreter' -rs
}

part_sanitize() {
  if ! $dry_run && ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not installed: left out"
    return 0
  fi
  local tool failed=0
  for tool in memcheck racecheck; do
    # Without torch's cache every tensor is an allocation of its own, whose ends are watched.
    limited $((PART_SECONDS / 2)) env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 9 \
      "$PYTHON" -m pytest -m gpu -k "$SMALL" tests/mosaic_kernels || failed=1
  done
  return $failed
}

# Together within ten minutes; the published way that bench_prune runs beside ours is slow.
part_hessian() { limited 100 "$PYTHON" -m benchmarks.bench_hessian --device cuda; }
part_cholesky() { limited 60 "$PYTHON" -m benchmarks.bench_cholesky --device cuda; }
part_sweep() { limited 120 "$PYTHON" -m benchmarks.bench_sweep --device cuda --repeats 2; }
part_joint() { limited 60 "$PYTHON" -m benchmarks.bench_joint --device cuda; }
part_prune() { limited 280 "$PYTHON" -m benchmarks.bench_prune --device cuda; }
part_speed() { limited $PART_SECONDS "$PYTHON" -m benchmarks.bench_speed --device cuda --dtype bfloat16; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
summary=()
status=0
for part in "${parts[@]}"; do
  echo "== $part"
  begin=$SECONDS
  if "part_$part" 2>&1 | tee -a "$work/gpu.log"; then
    $dry_run && word=printed || word=passed
    summary+=("$part: $word, $((SECONDS - begin)) s")
  else
    summary+=("$part: FAILED, $((SECONDS - begin)) s")
    status=1
  fi
done

echo "== summary"
printf '%s\n' "${summary[@]}" | tee -a "$work/gpu.log"
if [ -n "${OUT:-}" ] && ! $dry_run; then
  mkdir -p "$OUT"
  cp "$work/gpu.log" "$OUT/"
  find benchmarks/results -name '*.csv' -newer "$work" -exec cp {} "$OUT/" \;
fi
exit $status
