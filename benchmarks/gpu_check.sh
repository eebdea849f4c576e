#!/usr/bin/env bash
# Everything that a GPU has to show, in at most ten minutes: see --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: benchmarks/gpu_check.sh [--dry-run] [--since REVISION] [--only STEP] [--python PROGRAM] [--help]

Build the kernels, run the GPU tests of what changed, time attention, training and sampling, and write a summary. Takes
at most ten minutes on one H200. A step that fails or runs out of time does not keep the later ones from running: the
summary and the exit status (1) show it. Time that a step leaves is added to the next one's.

  build       the C++ and CUDA kernels in place, unless they load
  tests       tests marked `gpu` of the operators and rooms that changed since REVISION
  attention   both passes, head dimensions 64 and 128, grouped and not, against SDPA's kernels and flash-attn
  train_step  one step of sft and align of the paper's model
  family      a Llama of 1.1B: prefill, gradients against transformers, one step of align and sft
  best_of_n   16 and 128 candidates of that model, against transformers' generate and scoring

options:
  --dry-run         on the CPU: collect the tests, and time small shapes in few rounds
  --since REVISION  default: the newest commit with results of the H200; a tree without git runs all GPU tests
  --only STEP       run a single step
  --python PROGRAM  default: .venv/bin/python if it exists, else python3

The results go to the folder $OUT, by default benchmarks/results/ with the GPU's name, in a dry run a temporary folder:
check.md (the table), check.json (steps and all figures), check.log (the output), and the benchmarks' own
attention.json, train_step.json, family.json and best_of_n.json.

example: OUT=/tmp/check benchmarks/gpu_check.sh --since HEAD~5
TEXT
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
dry_run=false since="" only="" python=python3
if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi

fail() {
  printf 'gpu_check.sh: %s\n' "$1" >&2
  exit 2
}

while [ $# -gt 0 ]; do
  case $1 in
    --help) usage; exit 0 ;;
    --dry-run) dry_run=true; shift; continue ;;
    --since | --only | --python) ;;
    *) fail "expected an option of --help, got $1" ;;
  esac
  [ $# -gt 1 ] || fail "$1: expected a value, got none"
  case $1 in
    --since) since=$2 ;;
    --only) only=$2 ;;
    --python) python=$2 ;;
  esac
  shift 2
done
case " build tests attention train_step family best_of_n " in
  *" ${only:-build} "*) ;;
  *) fail "--only: expected build, tests, attention, train_step, family or best_of_n, got $only" ;;
esac

if $dry_run; then export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1; fi # one thread, which no busy process stalls
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

steps=$(mktemp)
output=$(mktemp)
trap 'rm -f "$steps" "$output"' EXIT
if [ -n "${OUT:-}" ]; then
  folder=$OUT
elif $dry_run; then
  folder=$(mktemp -d)
else
  folder=benchmarks/results/$("$python" -m benchmarks.gpu_check device)
fi
mkdir -p "$folder"
: >"$folder/check.log"

# The steps, which run in a shell of their own.

build() {
  local device=cuda
  if $dry_run; then device=cpu; fi
  if "$python" -c "import sys; from dph_kernels import native; sys.exit(native.missing('$device') is not None)"; then
    echo "the kernels for $device are built"
  else
    "$python" setup.py build_ext --inplace
    "$python" -c "import sys; from dph_kernels import native; sys.exit(native.missing('$device'))"
  fi
}

gpu_tests() {
  local files workers=()
  files=$("$python" -m benchmarks.gpu_check tests ${since:+--since "$since"})
  if [ -z "$files" ]; then
    echo "no test file belongs to what changed"
    return 5
  fi
  mapfile -t files <<<"$files"
  if $dry_run; then
    "$python" -m pytest -m gpu -q -p no:cacheprovider --collect-only "${files[@]}"
    return
  fi
  if "$python" -c "import xdist" 2>/dev/null; then workers=(-n 8); fi
  "$python" -m pytest -m gpu -q -p no:cacheprovider --maxfail=20 "${workers[@]}" "${files[@]}"
}

bench() {
  local json=$1 quick=()
  shift
  if $dry_run; then quick=(--quick); fi
  "$python" -m pytest "$@" -m brief -q -p no:cacheprovider --benchmark-only --benchmark-json="$json" "${quick[@]}"
}

run_step() {
  case $1 in
    build) build ;;
    tests) gpu_tests ;;
    *) bench "$2" "benchmarks/bench_$1.py" ;;
  esac
}

export -f build gpu_tests bench run_step
export dry_run since python

# Run a step until the sum of the budgets so far is spent, and note its status, time and last line.
deadline=0 failed=0
step() {
  local name=$1 budget=$2 code=0 started=$SECONDS limit note
  if [ -n "$only" ] && [ "$only" != "$name" ]; then return; fi
  deadline=$((deadline + budget))
  limit=$((deadline - SECONDS))
  rm -f "$folder/$name.json"
  printf '== %s, at most %d s\n' "$name" "$limit" | tee -a "$folder/check.log"
  timeout --signal=INT --kill-after=8 "$limit" bash -euo pipefail -c 'run_step "$@"' "$name" "$name" \
    "$folder/$name.json" >"$output" 2>&1 || code=$?
  cat "$output" >>"$folder/check.log"
  note=$(grep -v '^[[:space:]]*$' "$output" | tail -n 1 | tr '\t' ' ' | cut -c 1-200 || true)
  printf '%s\t%d\t%d\t%d\t%s\n' "$name" "$code" $((SECONDS - started)) "$limit" "$note" >>"$steps"
  printf '   %s\n' "$note"
  if [ "$code" -ne 0 ] && [ "$code" -ne 5 ]; then failed=1; fi
}

step build 90
step tests 140
step attention 100
step train_step 70
step family 110
step best_of_n 90

"$python" -m benchmarks.gpu_check summary "$folder" --steps "$steps" || failed=1
echo "results: $folder"
exit "$failed"
