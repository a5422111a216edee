#!/usr/bin/env bash
# Build with CUDA, test on the card, and measure, on a machine with an Nvidia card and nvcc:
#     benchmarks/card.sh [--quick] [options of benchmarks/card.py]
# --quick: only this card's kernels, one pass of compute-sanitizer, few shapes; about 8 minutes.
# Stops at the first failure, or if there is no card. Environment variables:
#     PYTHON                  a Python with a CUDA build of torch and the packages of extra "test"
#     ALLOW_NO_SANITIZER=1    continue without compute-sanitizer
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-python3}"
PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
export MIXEDQUANT_CUDA=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" # the package need not be installed

fail() {
    printf 'card.sh: %s\n' "$1" >&2
    exit 1
}

"$PYTHON" -c 'import torch, sys; sys.exit(not (torch.version.cuda and torch.cuda.is_available()))' ||
    fail "nothing was run: torch in $PYTHON sees no CUDA card"
if ! command -v compute-sanitizer >/dev/null && [ "${ALLOW_NO_SANITIZER:-}" != 1 ]; then
    fail "nothing was run: compute-sanitizer was not found (ALLOW_NO_SANITIZER=1 continues without it)"
fi

tools=(memcheck racecheck initcheck synccheck)
tests=(tests/test_cuda.py tests/test_cuda_build.py)
speed=() kernels=() model=()
if [ "${1:-}" = --quick ]; then
    shift
    # wgmma needs 90a
    MIXEDQUANT_CUDA_ARCHS="$("$PYTHON" -c 'import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}{minor}" + "a" * (major == 9))')"
    export MIXEDQUANT_CUDA_ARCHS
    tools=(memcheck)
    tests=(-m card tests/test_cuda.py)
    if "$PYTHON" -c 'import xdist' 2>/dev/null; then tests+=(-n auto --maxprocesses 12); fi
    speed=(--shapes 4096x4096 --tokens 1 16 64 2048 --group-sizes 128 --salient-props 0 0.05)
    kernels=(--shapes 4096x4096 --tokens 1 16 64 2048)
    model=(--layers 4 --modes eager graph)
fi

printf '== Build\n'
"$PYTHON" setup.py -q build_ext --inplace
"$PYTHON" -c 'import sys; from smoothquant import ops; sys.exit(not ops.has_cuda())' ||
    fail "the CUDA kernels were built, but cannot be loaded"

printf '== Tests\n'
"$PYTHON" -m pytest -q "${tests[@]}"

printf '== compute-sanitizer\n'
if command -v compute-sanitizer >/dev/null; then
    # without torch's memory pool, so that the tools see the bounds of every tensor
    for tool in "${tools[@]}"; do
        printf -- '-- %s\n' "$tool"
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
            --target-processes all "$PYTHON" -m pytest -q tests/test_cuda.py -m "card and not large"
    done
else
    printf 'NOT run: compute-sanitizer was not found\n'
fi

printf '== Speed\n'
"$PYTHON" benchmarks/card.py --json docs/benchmark_cuda.json "${speed[@]}" "$@"
"$PYTHON" benchmarks/report.py docs/benchmark_cuda.json docs/benchmark_cuda.png \
    >docs/benchmark_cuda.md
"$PYTHON" benchmarks/card_kernels.py "${kernels[@]}" >docs/benchmark_cuda_kernels.md
"$PYTHON" benchmarks/card_model.py --json docs/benchmark_cuda_model.json "${model[@]}"
"$PYTHON" benchmarks/report.py docs/benchmark_cuda_model.json >docs/benchmark_cuda_model.md
