"""The CUDA kernels as nvcc compiles them, without a card: no warnings, no spills, the tensor cores'
instructions; and the library of torch ops around them, which a torch without CUDA builds too.

For the architectures of MIXEDQUANT_CUDA_ARCHS, by default all that are shipped.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from length import at_length
from programs import ROOT, built, run, run_all, version
from setuptools import Distribution, Extension

from smoothquant.kernels import ops

with mock.patch("setuptools.setup"):
    SETUP = runpy.run_path(str(ROOT / "setup.py"))
NO_NVCC = "nvcc was not found: what it makes of the CUDA kernels was not checked"
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
# nvcc takes a minute for some; the short form compiles those that take the least
KERNELS = at_length(
    KERNELS, [p for p in KERNELS if p.stem in ("stats", "groups", "multiply_wgmma")]
)
QUANTIZERS = ("quantize", "quantize_columns")
TORCH = SimpleNamespace(
    version=SimpleNamespace(cuda=None)
)  # as cuda_compiler sees one without CUDA


@pytest.fixture(scope="module")
def nvcc() -> str:
    with mock.patch.dict(os.environ, {"MIXEDQUANT_CUDA": "1"}):
        try:
            return SETUP["cuda_compiler"](TORCH)
        except SystemExit:
            pytest.skip(NO_NVCC)


@pytest.fixture(scope="module")
def archs(nvcc) -> list[str]:
    return at_length(SETUP["cuda_archs"](nvcc), ["90a"])


@pytest.fixture(scope="module")
def compiled(nvcc, archs) -> dict[tuple[str, str], tuple[Path, str]]:
    """{(source, architecture): (machine code, what the compiler says)}."""
    # the longest first, so that no processor waits for it at the end
    sources = sorted(KERNELS, key=lambda path: "prefill" not in path.name)
    cells = {(s, a): f"{s.stem}.{a}" for s in sources for a in archs}
    flags = [*SETUP["NVCC_FLAGS"], "-Xptxas=-v", "-cubin"]

    def build(folder: Path) -> None:
        says = run_all(
            ["sh", "-c", 'exec "$@" 2>&1', "sh", nvcc, *flags, f"-arch=sm_{a}", str(s)]
            + ["-o", str(folder / f"{name}.cubin")]
            for (s, a), name in cells.items()
        )
        for name, text in zip(cells.values(), says, strict=True):
            (folder / f"{name}.txt").write_text(text)

    folder = built("cubins", build, archs, flags, version(nvcc))
    return {
        (s.stem, a): (folder / f"{name}.cubin", (folder / f"{name}.txt").read_text())
        for (s, a), name in cells.items()
    }


def test_kernels_compile_without_warnings_and_without_spills(compiled):
    for cell, (_, says) in compiled.items():
        assert "warning" not in says.lower(), (cell, says)
        # of products in the background: that ptxas lets them run one after another, or adds waits
        assert not re.search("serialized|injected", says), (cell, says)
        frames = re.findall(
            r"Function properties for (\S+)\s+(\d+) bytes stack frame, "
            r"(\d+) bytes spill stores, (\d+) bytes spill loads",
            says,
        )
        assert len(frames) == says.count("Compiling entry function") > 0, cell
        for name, *sizes in frames:
            assert sizes == ["0", "0", "0"], (cell, name, sizes)
        # kOrdinaryShared of common.cuh counts on it
        has_dynamic = cell[0] in (*QUANTIZERS, "multiply_prefill", "multiply_wgmma")
        most = 1024 if has_dynamic else 48 << 10
        assert all(int(smem) <= most for smem in re.findall(r"(\d+) bytes smem", says)), cell


@pytest.mark.long
def test_no_code_multiplies_nibbles_where_that_is_a_routine(compiled):
    """By its name, which is in the machine code wherever the routine is."""
    for cell, (cubin, _) in compiled.items():
        assert b"mma_sub_byte" not in cubin.read_bytes(), cell


def disassembler() -> str:
    found = shutil.which("nvdisasm") or shutil.which("nvdisasm", path="/usr/local/cuda/bin")
    if found:
        return found
    try:
        files = distribution("nvidia-cuda-nvdisasm").files or []
    except PackageNotFoundError:
        files = []
    for path in files:
        if path.name == "nvdisasm":
            return str(path.locate())
    pytest.skip("nvdisasm was not found (pip install nvidia-cuda-nvdisasm): no SASS was looked at")


def instructions(cubin: Path) -> dict[str, list[str]]:
    """{kernel, by the words of its mangled name: its instructions, operands included}."""
    kernels, own = {}, []
    for line in run(disassembler(), "-c", str(cubin)).splitlines():
        if line.startswith("\t.section\t"):
            own = []
            if section := re.search(r"\.text\.(\w+)", line):
                kernels[section[1]] = own
        elif text := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            own.append(text[1])
    return kernels


# Products of the tensor cores: of bytes, of nibbles, and of the salient channels' halves
TURING = {"IMMA.8816.S8.S8"}, {"IMMA.8832.S4"}, {"HMMA.1688.F32"}
AMPERE = (
    {"IMMA.16832.S8.S8"},
    {"IMMA.16832.S4", "IMMA.16864.S4"},
    {"HMMA.16816.F32", "HMMA.16816.F32.BF16"},
)
# in the background: of bytes and of halves
HOPPER = {"IGMMA.64x64x32.S8.S8", "HGMMA.64x64x16.F32", "HGMMA.64x64x16.F32.BF16"}
# of nibbles, by the format of the activations: symmetric, unsigned, zero-point
RIGHT_SIDES = {"mq_act_format0": ".S4", "mq_act_format1": ".U4", "mq_act_format2": ".U4"}


@pytest.mark.long
def test_products_are_the_tensor_cores(compiled, archs):
    for arch in archs:
        number = int(arch.rstrip("af"))
        of_bytes, of_nibbles, of_halves = TURING if number < 80 else AMPERE
        decode = instructions(compiled["multiply_decode", arch][0])
        prefill = instructions(compiled["multiply_prefill", arch][0])
        wgmma = instructions(compiled["multiply_wgmma", arch][0])
        assert len(decode) == 6 and len(prefill) == 1 + len(RIGHT_SIDES) and len(wgmma) == 1
        for name, code in (decode | prefill | wgmma).items():
            products = {m[0] for text in code if (m := re.search(r"[IH]G?MMA[.\w]*", text))}
            if "wgmma" in name and arch == "90a":
                assert products == HOPPER, name
            elif "wgmma" in name:
                assert not products, (arch, name)  # an empty kernel, never launched
            elif "prefill_s4" not in name:
                assert products == of_bytes | of_halves, (arch, name)
            elif number < 90:
                (right,) = (side for key, side in RIGHT_SIDES.items() if key in name)
                assert products == {left + right for left in of_nibbles} | of_halves, (arch, name)
            else:
                assert not products, (arch, name)  # an empty kernel, never launched


@pytest.mark.long
def test_kernels_of_the_linear_use_no_local_memory_and_no_routine_but_division(compiled, archs):
    for arch in archs:
        allowed = r"__cuda_sm\d+_(div|rem)_[su]64"
        if arch == "75":
            # no instruction for products of bf16: lanes ask each other for the factors
            allowed += "|__cuda_sm70_shflsync"
        for source in ("multiply_decode", "multiply_prefill", "multiply_wgmma", *QUANTIZERS):
            for name, code in instructions(compiled[source, arch][0]).items():
                assert not [text for text in code if re.search(r"\b(LDL|STL)\b", text)], name
                if source in QUANTIZERS:  # reciprocals and roots have routines for odd values
                    continue
                # a place in the kernel itself is a jump that comes back
                calls = [text for text in code if "CALL" in text and "(.L_" not in text]
                wrong = [text for text in calls if not re.search(allowed, text)]
                assert not wrong, (arch, name, wrong)


@pytest.mark.long
def test_weights_are_asked_for_before_the_wait_for_the_tokens(compiled, archs):
    """ptxas moves some kinds of loads behind it."""
    for arch in {"90a", "100", "120"} & set(archs):
        checked = 0
        for source in ("multiply_decode", "multiply_wgmma"):
            for name, code in instructions(compiled[source, arch][0]).items():
                loads = [i for i, text in enumerate(code) if re.search(r"LDG\.E\.NA\.128", text)]
                waits = [i for i, text in enumerate(code) if "ACQBULK" in text]
                if "wgmma" in name and arch != "90a":
                    continue  # an empty kernel
                assert len(waits) == 1, (arch, name)
                if "decode" in name and "Lb0" in name:
                    continue  # for groups of any size: it asks behind the wait
                ahead = sum(load < waits[0] for load in loads)
                assert ahead >= (4 if "wgmma" in name else 8), (arch, name)
                # tokens come behind it
                copies = [i for i, text in enumerate(code) if "LDGSTS" in text]
                assert all(copy > waits[0] for copy in copies), (arch, name)
                checked += 1
        assert checked == (4 if arch == "90a" else 3)


# ---- What is built, and where it is loaded ----


def test_cuda_is_built_where_it_is_asked_for_or_torch_has_it(monkeypatch, nvcc):
    find = SETUP["cuda_compiler"]
    with_cuda = SimpleNamespace(version=SimpleNamespace(cuda="13.0"))
    for wanted, of_torch, expected in (
        ("0", with_cuda, None),
        ("", with_cuda, nvcc),
        ("", TORCH, None),
        ("1", TORCH, nvcc),
    ):
        monkeypatch.setenv("MIXEDQUANT_CUDA", wanted)
        assert find(of_torch) == expected
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    with pytest.raises(SystemExit, match="MIXEDQUANT_CUDA=1, but nvcc was found neither .*nowhere"):
        find(TORCH)


@pytest.fixture
def listing(tmp_path):
    """Makes an nvcc that only lists the architectures it knows."""

    def write(*known: str) -> str:
        path = tmp_path / "nvcc"
        path.write_text("\n".join(["#!/bin/sh", *(f"echo compute_{arch}" for arch in known)]))
        path.chmod(0o755)
        return str(path)

    return write


def test_architectures_that_nvcc_does_not_know_are_left_out(monkeypatch, listing, capsys):
    old = listing("75", "80", "86", "89", "90")
    monkeypatch.delenv("MIXEDQUANT_CUDA_ARCHS", raising=False)
    assert SETUP["cuda_archs"](old) == ["75", "80", "86", "89", "90a"]
    assert f"{old} does not know, and nothing is built for, 100,120" in capsys.readouterr().out
    monkeypatch.setenv("MIXEDQUANT_CUDA_ARCHS", "90a, 120")
    assert SETUP["cuda_archs"](old) == ["90a", "120"]


def test_architectures_and_ptx(monkeypatch, listing):
    """PTX of an architecture with products of nibbles would become a routine on newer cards."""
    monkeypatch.delenv("MIXEDQUANT_CUDA_ARCHS", raising=False)
    nvcc = listing("75", "80", "86", "87", "89", "90", "100", "120")
    archs = SETUP["cuda_archs"](nvcc)
    assert archs == ["75", "80", "86", "89", "90a", "100", "120"]
    flags = SETUP["code_flags"](archs)
    assert [flag for flag in flags if "code=compute" in flag] == [
        "-gencode=arch=compute_100,code=compute_100"
    ]
    assert len(flags) == 9 and flags[-1] == "-DMQ_BUILD_WGMMA"
    assert "-DMQ_BUILD_WGMMA" not in SETUP["code_flags"](["80", "90"])
    # 90 beside 90a is PTX alone: of two codes for one GPU, the one without wgmma could be taken
    assert [flag for flag in SETUP["code_flags"](["90", "90a"]) if "90" in flag] == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    for none in (["80"], ["75", "89", "90a"]):
        assert not [flag for flag in SETUP["code_flags"](none) if "code=compute" in flag]
    monkeypatch.setenv("MIXEDQUANT_CUDA_ARCHS", "80,sm_90")
    with pytest.raises(SystemExit, match="MIXEDQUANT_CUDA_ARCHS must be like .*'80,sm_90'"):
        SETUP["cuda_archs"](nvcc)


def test_pybind11_is_not_the_one_that_torch_brings(tmp_path):
    """That of torch 2.11 refuses to be read with TORCH_TARGET_VERSION."""
    header = tmp_path / "include" / "pybind11" / "pybind11.h"
    header.parent.mkdir(parents=True)
    header.write_text("#error torch's own\n")
    extension = Extension("smoothquant._C", ["csrc/torch/module.cpp"])
    build = SETUP["BuildExtension"](Distribution({"ext_modules": [extension]}))
    build.build_lib = build.build_temp = str(tmp_path)
    build.ensure_finalized()
    build.torch = SimpleNamespace(__file__=str(tmp_path / "__init__.py"), __version__="2.11.0")
    build.nvcc, commands = None, []
    build.compile_one = commands.append
    build.build_extension(extension)
    compile_module, _ = commands
    run(*compile_module, "-E")  # what is included, no more


@pytest.fixture(scope="module")
def package(nvcc) -> Path:
    """The folder of a package that was built with CUDA."""
    environment = {
        "MIXEDQUANT_CUDA": "1",
        "MIXEDQUANT_CUDA_ARCHS": "90a",
        "MIXEDQUANT_CFLAGS": "-O1",
    }

    def build(folder: Path) -> None:
        command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(folder)]
        command += ["--build-lib", str(folder / "lib")]
        result = subprocess.run(
            command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr

    how = (sys.version, torch.__version__, (ROOT / "setup.py").read_text(), version(nvcc))
    folder = built("package", build, environment, *how)
    # Python files are those of now, whichever they were when the kernels were built
    shutil.copytree(
        ROOT / "smoothquant",
        folder / "lib" / "smoothquant",
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    return folder / "lib" / "smoothquant"


def cuda_library(package: Path) -> str:
    (library,) = package.glob("_cuda*.so")
    return str(library)


@pytest.mark.long
def test_the_library_needs_of_torch_what_its_c_shim_declares(package):
    library = cuda_library(package)
    lines = run("nm", "-D", "--undefined-only", library).splitlines()
    strong = {line.split()[1] for line in lines if line.split()[0] == "U"}
    of_torch = {name for name in strong if re.match(r"(aoti_)?torch_", name)}
    system = r"@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$"
    assert [name for name in strong - of_torch if not re.search(system, name)] == []

    include = Path(torch.__file__).parent / "include" / "torch" / "csrc"
    shims = [include / "inductor/aoti_torch/c/shim.h", include / "stable/c/shim.h"]
    declared = set(re.findall(r"\w+", "".join(path.read_text() for path in shims)))
    assert of_torch - declared == set()
    cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    exported = {
        line.split()[-1] for line in run("nm", "-D", "--defined-only", str(cpu)).split("\n")[:-1]
    }
    assert of_torch - exported == {"aoti_torch_get_current_cuda_stream"}


@pytest.mark.long
def test_the_library_brings_its_cuda_runtime_and_exports_nothing(package):
    library = cuda_library(package)
    needed = set(re.findall(r"NEEDED.*\[(\S+)\]", run("readelf", "-d", library)))
    assert {"libtorch_cpu.so", "libtorch_cuda.so"} < needed
    assert not [name for name in needed if re.match(r"libcud(a|art)", name)]
    lines = run("nm", "-D", "--defined-only", library).splitlines()
    assert not [line for line in lines if re.search(r" (_*cuda|_*cu[A-Z]|mq_)", line)]


@pytest.mark.long
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA: it may be loaded")
def test_without_cuda_the_package_works_and_the_library_cannot_be_loaded(package, run_python):
    code = f"""
import ctypes, torch
from smoothquant import ops
assert ops.build_info()["cuda_archs"] == "90a" and not ops.has_cuda()
assert ops.__file__.startswith({str(package)!r})
q, scales = ops.group_quantize(torch.ones(2, 8), 4)
assert "_cuda" not in open("/proc/self/maps").read()
try:
    ctypes.CDLL({cuda_library(package)!r})
except OSError as error:
    print(error)
"""
    printed = run_python(code, PYTHONPATH=str(package.parent), PYTHONSAFEPATH="1").stdout
    assert "libtorch_cuda.so: cannot open shared object file" in printed


def test_build_info_names_the_architectures():
    info = ops.build_info()
    assert set(info) == {"compiler", "torch", "cuda_archs"}
    assert re.fullmatch(r"(\d+[af]?(,\d+[af]?)*)?", info["cuda_archs"])
    assert ops.has_cuda() <= bool(info["cuda_archs"])
