#!/usr/bin/env bash
# All figures of one GPU, in under six minutes: bash benchmarks/gpu.sh [--quick] OUT
#
# OUT/PART.json and OUT/PART.md for each part, see gpu.py. A part that fails or takes too long costs no other part.
# It needs torch with CUDA, DeepSpeed, transformers and pytest, and nvcc and ninja to build DeepSpeed's FusedAdam.
# --quick: tiny sizes, also without a GPU: whether it runs, not how fast.
set -uo pipefail

quick=
if [[ ${1:-} == --quick ]]; then
    quick=--quick
    shift
fi
out=$(realpath -m "${1:?"usage: bash benchmarks/gpu.sh [--quick] OUT, a folder for the results"}")
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
mkdir -p "$out"
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

failed=()
run() { # part, seconds after which no case begins, seconds after which it is ended; --quick: hours
    local start=$SECONDS
    timeout --kill-after=5 "${quick:+60}$3" python3 -m benchmarks.gpu "$1" --seconds "$2" --out "$out" $quick 2>"$out/$1.log"
    local status=$?
    echo "$1: $((SECONDS - start)) s, exit status $status"
    if ((status)); then
        failed+=("$1")
        tail -n 15 "$out/$1.log"
    fi
    return $status
}

timeout --kill-after=5 120 python3 -m benchmarks.gpu build --out "$out" $quick >"$out/build.log" 2>&1 &
building=$!
if ! run smoke 30 60; then
    echo "LENA does not train here, see above: the rest is left out" >&2
    kill $building
    exit 1
fi
run parity 80 90
wait $building
tail -n 1 "$out/build.log"
run table 185 205
run profile 50 65
run step 25 40
echo "$SECONDS s in all; results in $out"
if ((${#failed[@]})); then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
