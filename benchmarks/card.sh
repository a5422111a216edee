#!/usr/bin/env bash
# On a machine with an Nvidia card and nvcc: build with CUDA, test on the card, measure. One call:
#     benchmarks/card.sh [options of benchmarks/card.py]
# Stops at the first thing that is wrong, and where there is no card. PYTHON: with a CUDA build of torch
# and the packages of pip's extra "test".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-python3}"
PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
# All architectures that are shipped, here and in tests/test_cuda_build.py
export MIXEDQUANT_CUDA=1 MIXEDQUANT_CUDA_ARCHS="${MIXEDQUANT_CUDA_ARCHS:-75,80,86,89,90a,100,120}"

fail() {
    printf 'card.sh: %s\n' "$1" >&2
    exit 1
}

"$PYTHON" -c 'import torch, sys; sys.exit(not (torch.version.cuda and torch.cuda.is_available()))' ||
    fail "nothing was run: $PYTHON has no torch that sees a CUDA card"

printf '== Build\n'
"$PYTHON" setup.py -q build_ext --inplace
"$PYTHON" -c 'import sys; from smoothquant import ops; sys.exit(not ops.has_cuda())' ||
    fail "the CUDA kernels were built, but are not loaded"

printf '== Tests\n'
"$PYTHON" -m pytest -q tests/test_cuda.py tests/test_cuda_build.py

printf '== compute-sanitizer\n'
if command -v compute-sanitizer >/dev/null; then
    # without torch's pool, so that every tensor has bounds of its own
    for tool in memcheck racecheck initcheck synccheck; do
        printf -- '-- %s\n' "$tool"
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
            --target-processes all "$PYTHON" -m pytest -q tests/test_cuda.py -k "card and not mistakes"
    done
else
    printf 'NOT run: compute-sanitizer was not found\n'
fi

printf '== Speed\n'
"$PYTHON" benchmarks/card.py --json docs/benchmark_cuda.json "$@"
"$PYTHON" benchmarks/report.py docs/benchmark_cuda.json docs/benchmark_cuda.png \
    >docs/benchmark_cuda.md
"$PYTHON" benchmarks/card_model.py --json docs/benchmark_cuda_model.json
