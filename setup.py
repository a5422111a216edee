"""Builds smoothquant._C: C kernels and the C++ shim over them, CUDA kernels once it has them.

A build_ext of the project's own, because setuptools and torch compile .c files as C++ or need a
CUDA build of torch. Environment:
    CC, CXX                  compilers (default: cc, c++)
    MIXEDQUANT_CUDA          0: never build CUDA kernels; 1: fail without nvcc (default: if found)
    MIXEDQUANT_CUDA_ARCHS    architectures for nvcc, e.g. "80,90a"
    MIXEDQUANT_CFLAGS        further flags for C and C++, e.g. sanitizers
"""

import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 10)
TORCH_FIRST = (
    'run "pip install torch==2.13.0", then "pip install setuptools wheel pybind11", then '
    '"pip install --no-build-isolation ."'
)
COMMON_FLAGS = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
C_FLAGS = ["-std=c11", "-O3", "-ffp-contract=off", "-Wconversion", *COMMON_FLAGS]
CXX_FLAGS = ["-std=c++20", "-O2", *COMMON_FLAGS]
CUDA_ARCHS = "75,80,86,89,90a"


def stop(sentence: str) -> None:
    sys.exit(f"MixedQuant: {sentence}")


def installed_torch():
    """The torch to build against."""
    try:
        import torch
    except (ImportError, OSError):
        stop(f"the build needs PyTorch; {TORCH_FIRST}")
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < OLDEST_TORCH:
        stop(f"PyTorch {torch.__version__} is too old, 2.10 or newer is needed; {TORCH_FIRST}")
    return torch


def compiler(variable: str, default: str) -> list[str]:
    command = shlex.split(os.environ.get(variable, default))
    if not command or shutil.which(command[0]) is None:
        stop(
            f"no compiler {command[0] if command else default!r} was found; install one "
            f"(Debian: apt install build-essential) or set {variable}"
        )
    return command


def cuda_compiler() -> str | None:
    wanted = os.environ.get("MIXEDQUANT_CUDA", "")
    nvcc = None if wanted == "0" else shutil.which("nvcc")
    if wanted == "1" and nvcc is None:
        stop("MIXEDQUANT_CUDA=1, but nvcc was not found on PATH")
    return nvcc


def cuda_library_flags(nvcc: str) -> list[str]:
    """nvcc may be a wrapper, so it is asked where its libraries are."""
    dry = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True
    )
    for line in dry.stderr.splitlines():
        if line.startswith("#$ LIBRARIES="):
            folders = shlex.split(line.split("=", 1)[1])
            return [*folders, "-lcudart_static", "-lpthread", "-ldl", "-lrt"]
    return ["-lcudart_static", "-lpthread", "-ldl", "-lrt"]


class BuildExtension(build_ext):
    def build_extension(self, ext: Extension) -> None:
        torch = installed_torch()
        try:
            import pybind11
        except ImportError:
            stop('the build needs pybind11; run "pip install setuptools wheel pybind11"')
        cc, cxx = compiler("CC", "cc"), compiler("CXX", "c++")
        extra = shlex.split(os.environ.get("MIXEDQUANT_CFLAGS", ""))
        include = Path(torch.__file__).parent / "include"
        nvcc = cuda_compiler()
        if not any(source.endswith(".cu") for source in ext.sources):
            nvcc = None
        archs = os.environ.get("MIXEDQUANT_CUDA_ARCHS", CUDA_ARCHS) if nvcc else ""
        compiler_name = subprocess.run([*cc, "--version"], capture_output=True, text=True).stdout
        defines = {
            "TORCH_TARGET_VERSION": "0x020a000000000000",
            "MQ_BUILD_COMPILER": f'"{(compiler_name.splitlines() or ["unknown"])[0]}"',
            "MQ_BUILD_TORCH": f'"{torch.__version__}"',
            "MQ_BUILD_CUDA_ARCHS": f'"{archs}"',
        }
        cxx_command = [
            *cxx,
            *CXX_FLAGS,
            *(f"-D{name}={value}" for name, value in defines.items()),
            *(f"-isystem{path}" for path in (include, pybind11.get_include())),
            *(f"-isystem{path}" for path in self.include_dirs),
        ]
        commands = {".c": [*cc, *C_FLAGS], ".cpp": cxx_command}
        if nvcc:
            gencode = [
                f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs.split(",") if arch
            ]
            commands[".cu"] = [nvcc, "-O3", "-std=c++17", "-Xcompiler=-fPIC", *gencode]

        objects, jobs = [], []
        for source in ext.sources:
            suffix = Path(source).suffix
            if suffix not in commands:
                continue
            target = Path(self.build_temp) / Path(source).with_suffix(f"{suffix}.o")
            target.parent.mkdir(parents=True, exist_ok=True)
            objects.append(str(target))
            flags = extra if suffix != ".cu" else []
            jobs.append([*commands[suffix], *flags, "-c", str(ROOT / source), "-o", str(target)])
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self.compile_one, jobs))

        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        link = [*cxx, "-shared", *extra, *objects, "-o", str(output), "-lm"]
        # torch is imported before this module, so its libraries are found without a path to them
        link += [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]
        self.compile_one(link + (cuda_library_flags(nvcc) if nvcc else []))

    def compile_one(self, command: list[str]) -> None:
        result = subprocess.run(command, capture_output=True, text=True)
        if result.stderr:
            print(result.stderr, file=sys.stderr)
        if result.returncode:
            stop(f"the build failed at: {' '.join(command)}")


def sources() -> list[str]:
    found = [
        path.relative_to(ROOT).as_posix()
        # csrc/cuda joins when the shim registers its operations
        for folder, suffix in (("cpu", "c"), ("torch", "cpp"))
        for path in (ROOT / "csrc" / folder).glob(f"*.{suffix}")
    ]
    return sorted(found)


setup(
    ext_modules=[
        Extension(
            "smoothquant._C",
            sources(),
            depends=[path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.h")],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
