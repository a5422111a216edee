"""The CUDA kernels' own sources, compiled for the CPU (tests/cuda/emulator.h), against scalar C."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
CHECK = sorted((ROOT / "tests" / "cuda").glob("*.cpp"))
SCALAR = sorted((ROOT / "csrc" / "cpu").glob("*.c"))
# One of each way through the sources: Turing's small products, INT4 products, INT8 products only
ARCHS = (75, 80, 90)
CASES = 24
COMMON = ["-g", "-O1", "-ffp-contract=off", "-fsanitize=address,undefined"]
COMMON += ["-fno-sanitize-recover=all"]
CXX = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]


def run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def checks(tmp_path_factory) -> dict[int, str]:
    """{architecture: the program that checks its kernels}."""
    folder = tmp_path_factory.mktemp("emulated")
    jobs, objects = [], {arch: [] for arch in ARCHS}
    for source in SCALAR:
        target = str(folder / f"{source.name}.o")
        jobs.append(["gcc", "-std=c11", *COMMON, "-c", str(source), "-o", target])
        for arch in ARCHS:
            objects[arch].append(target)
    for arch in ARCHS:
        flags = [f"-DMQ_ARCH={arch}", "-include", str(ROOT / "tests" / "cuda" / "emulator.h")]
        for source in [*KERNELS, *CHECK]:
            target = str(folder / f"{source.name}.{arch}.o")
            jobs.append([*CXX, *COMMON, *flags, "-x", "c++", "-c", str(source), "-o", target])
            objects[arch].append(target)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: run(*job), jobs))
    programs = {arch: str(folder / f"check_{arch}") for arch in ARCHS}
    for arch, program in programs.items():
        run("g++", *COMMON, *objects[arch], "-o", program, "-lm")
    return programs


def test_kernels_equal_the_scalar_ones_on_every_kind_of_architecture(checks):
    def output(arch: int) -> dict[str, int]:
        first, *lines = run(checks[arch], str(arch), str(CASES)).splitlines()
        assert first == f"{CASES} cases: architecture {arch}"
        return {name: int(count) for name, count in map(str.split, lines)}

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = dict(zip(ARCHS, pool.map(output, ARCHS), strict=True))
    every = {"decode_8", "decode_16", "decode_32", "prefill_s8"}
    assert set(runs[90]) == every
    assert set(runs[75]) == set(runs[80]) == every | {"prefill_s4"}
