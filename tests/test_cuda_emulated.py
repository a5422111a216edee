"""The CUDA kernels' own sources, compiled for the CPU (tests/cuda/emulator.h), against scalar C."""

from pathlib import Path

import pytest
from programs import CC, CXX, EMULATED, FLAGS, ROOT, SANITIZERS, built, run, run_all, traps, version

KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
CHECK = [ROOT / "tests" / "cuda" / name for name in ("check_cuda.cpp", "emulator.cpp")]
SCALAR = sorted((ROOT / "csrc" / "cpu").glob("*.c"))
# One of each way through the sources: Turing's small products, INT4 products, Hopper's wgmma
ARCHS = (75, 80, 90)
CASES = 4  # random ones


@pytest.fixture(scope="module")
def checks() -> dict[int, str]:
    """{architecture: the program that checks its kernels}."""
    folder = built(
        "emulated", _build, ARCHS, SANITIZERS, FLAGS, EMULATED, version(*CC), version(*CXX)
    )
    return {arch: str(folder / f"check_{arch}") for arch in ARCHS}


def _build(folder: Path) -> None:
    flags = [*FLAGS, *SANITIZERS, "-O1", "-c"]
    emulated = [*SANITIZERS, *EMULATED, "-c"]
    jobs, programs = [], {}

    def compiled(command: list[str], source: Path, name: str) -> str:
        target = str(folder / f"{name}.o")
        jobs.append([*command, str(source), "-o", target])
        return target

    scalar = [compiled([*CC, "-std=c11", *flags], source, source.name) for source in SCALAR]
    for arch in ARCHS:
        command = [*CXX, f"-DMQ_ARCH={arch}", *emulated]
        sources = [*KERNELS, *CHECK]
        objects = [compiled(command, source, f"{source.name}.{arch}") for source in sources]
        programs[arch] = [*CXX, *SANITIZERS, *objects, *scalar, "-lm", "-o"]
    run_all(jobs)
    for arch, link in programs.items():
        run(*link, str(folder / f"check_{arch}"))


@pytest.mark.long  # test_cuda.py has the ops on one emulated architecture
def test_kernels_equal_the_scalar_ones_on_every_kind_of_architecture(checks):
    outputs = run_all([checks[arch], str(arch), str(CASES)] for arch in ARCHS)
    runs = {}
    for arch, output in zip(ARCHS, outputs, strict=True):
        first, *lines = output.splitlines()
        assert first == f"{CASES} cases: architecture {arch}"
        runs[arch] = {name: int(count) for name, count in map(str.split, lines)}
    every = {"decode_8", "decode_16", "decode_32", "prefill_s8"}
    for arch in ARCHS:
        assert set(runs[arch]) == every | {"prefill_wgmma" if arch == 90 else "prefill_s4"}


def test_a_step_traps_where_a_contract_is_broken(checks):
    run(checks[ARCHS[-1]], "none")
    for contract in ("x", "scales", "kernel"):
        assert traps(checks[ARCHS[-1]], contract), contract
