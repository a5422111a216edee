"""The C kernels alone, with guard pages and sanitizers: as this processor runs them, those of x86
by SIMDe on any processor, and those of Arm by an emulator."""

import itertools
import random
import shutil
from importlib.metadata import distribution
from pathlib import Path

import pytest
from length import at_length
from programs import CC, FLAGS, SANITIZERS, built, run, run_all, traps, version

from smoothquant.kernels import ops

ROOT = Path(__file__).resolve().parent.parent
C_SOURCES = sorted(str(path) for path in (ROOT / "csrc" / "cpu").glob("*.c"))
CHECKS = {
    "check_kernels": ["check_kernels.c"],
    "check_assumptions": ["check_assumptions.c"],
    "fuzz": ["fuzz_kernels.c", "fuzz_main.c"],
}
X86_ISAS = "scalar avx2 avxvnni avx512vnni"
ARM_CC, ARM_EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
ARM_ISAS = {
    "cortex-a72": "scalar",
    "neoverse-n1": "scalar neon",
    "max": "scalar neon neoni8mm",
}


def build_check(name: str, *flags: str, cc: list[str] = CC) -> Path:
    """A folder with a program for each of CHECKS."""
    return built(name, lambda folder: _build(folder, flags, cc), FLAGS, flags, version(*cc))


def _build(folder: Path, flags: tuple[str, ...], cc: list[str]) -> None:
    checks = {
        name: [str(ROOT / "tests" / "csrc" / file) for file in CHECKS[name]] for name in CHECKS
    }
    sources = [*C_SOURCES, *itertools.chain(*checks.values())]
    objects = {source: str(folder / f"{Path(source).stem}.o") for source in sources}
    common = [*cc, "-std=c11", *FLAGS, *flags, "-c"]
    run_all([*common, source, "-o", target] for source, target in objects.items())
    kernels = [objects[source] for source in C_SOURCES]
    for name, own in checks.items():
        run(*cc, *flags, *(objects[s] for s in own), *kernels, "-o", str(folder / name), "-lm")


@pytest.fixture(scope="module")
def native_check():
    return build_check("native", "-O1", *SANITIZERS)


@pytest.fixture(scope="module")
def simde_check():
    """The same sources with every intrinsic computed lane by lane. It takes a minute to compile if
    sanitized, and as long if optimized."""
    include = distribution("cmeel-simde").locate_file("cmeel.prefix/include")
    flags = ["-O0", "-DMQ_SIMDE", f"-isystem{include}", "-Wno-psabi"]
    flags += at_length(SANITIZERS, [])
    return build_check("simde", *flags)


@pytest.fixture(scope="module")
def arm_check():
    """Optimized as it is shipped, in full; sanitized, it would take a minute to compile too."""
    missing = [program for program in (ARM_CC, ARM_EMULATOR) if shutil.which(program) is None]
    if missing:
        pytest.skip(
            f"NEON kernels were not tested: {' and '.join(missing)} not found "
            "(Debian: apt install gcc-aarch64-linux-gnu qemu-user)"
        )
    return build_check("arm", at_length("-O3", "-O1"), cc=[ARM_CC])


@pytest.mark.parametrize("seed", at_length([1, 2], [1]))
def test_kernels_of_this_processor_equal_scalar(native_check, seed):
    isas = " ".join(ops.supported_isas())
    cases = at_length(3000, 500)
    program = str(native_check / "check_kernels")
    assert run(program, str(seed), str(cases)) == f"{cases} cases: {isas}\n"


@pytest.mark.parametrize("seed", at_length([3, 4], [3]))
def test_kernels_of_every_x86_processor_equal_scalar(simde_check, seed):
    cases = at_length(400, 60)
    program = str(simde_check / "check_kernels")
    assert run(program, str(seed), str(cases)) == f"{cases} cases: {X86_ISAS}\n"


@pytest.mark.parametrize(("processor", "isas"), ARM_ISAS.items())
def test_kernels_of_arm_processors_equal_scalar(arm_check, processor, isas):
    emulator = [ARM_EMULATOR, "-L", "/usr/aarch64-linux-gnu", "-cpu", processor]
    cases = at_length(500, 40)
    program = str(arm_check / "check_kernels")
    assert run(*emulator, program, "5", str(cases)) == f"{cases} cases: {isas}\n"
    calls = at_length(3000, 200)
    assert run(*emulator, str(arm_check / "fuzz"), "0", str(calls)) == f"{calls} cases\n"


def test_random_calls_are_refused_or_computed_alike(native_check):
    """Any sizes, up to the end of int64; --all also runs seeds that no other run has."""
    program, cases = str(native_check / "fuzz"), at_length(150_000, 3000)
    seeds = at_length([0, random.SystemRandom().randrange(2**32)], [0])
    outputs = run_all([program, str(seed), str(cases)] for seed in seeds)
    assert outputs == [f"{cases} cases\n"] * len(seeds)


def test_random_calls_are_computed_alike_by_every_x86_processor(simde_check):
    cases = at_length(10_000, 150)
    assert run(str(simde_check / "fuzz"), "0", str(cases)) == f"{cases} cases\n"


def test_kernels_trap_where_a_contract_is_broken(native_check):
    program = str(native_check / "check_assumptions")
    contracts = run(program).split()
    assert len(contracts) > 10
    for isa in ops.supported_isas():
        for contract in contracts:
            run(program, isa, contract, "0")
            assert traps(program, isa, contract, "1"), (isa, contract)


def test_header_is_plain_c_and_cpp():
    header = ROOT / "csrc" / "mixedquant.h"
    for command in ([*CC, "-std=c11", "-xc"], [*CC, "-std=c++17", "-xc++"]):
        run(*command, "-Wall", "-Wextra", "-pedantic", "-Werror", "-fsyntax-only", str(header))


def test_kernels_know_no_torch_no_threads_and_no_heap():
    forbidden = ("malloc", "calloc", "realloc", "free(", "printf", "pthread", "abort(", "getenv")
    for path in C_SOURCES:
        text = Path(path).read_text()
        assert "torch" not in text
        assert not [word for word in forbidden if word in text], path
