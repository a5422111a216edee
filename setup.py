"""Builds smoothquant._C, the C kernels and the C++ shim over them, and smoothquant/_cuda*.so, the
same for CUDA: a library that Python loads where there is a GPU.

A build_ext of the project's own, because setuptools and torch compile .c files as C++ or need a
CUDA build of torch. Environment:
    CC, CXX                  compilers (default: cc, c++)
    MIXEDQUANT_CUDA          0: never build CUDA kernels; 1: with any torch, and fail without nvcc
                             (default: for a torch with CUDA, where nvcc is found)
    MIXEDQUANT_CUDA_ARCHS    architectures for nvcc (default: those of "75,80,86,89,90a,100,120"
                             that it knows); 90a has kernels that 90 lacks
    MIXEDQUANT_CFLAGS        further flags for C and C++, e.g. sanitizers, or -Wno-error
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 10)
TORCH_FIRST = (
    "run \"pip install torch==2.13.0 'setuptools>=77' wheel pybind11\", then "
    '"pip install --no-build-isolation ."'
)
WARNINGS = ["-Wall", "-Wextra", "-Wconversion"]
# not for users, whose compilers may know warnings that ours do not
WARNINGS += ["-Werror"] * (os.environ.get("MIXEDQUANT_WERROR") == "1")
COMMON_FLAGS = ["-fPIC", "-fvisibility=hidden", *WARNINGS]
C_FLAGS = ["-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
C_FLAGS += COMMON_FLAGS
CXX_FLAGS = ["-std=c++20", "-O2", *COMMON_FLAGS]
# -fmad=false: kernels write a fused multiply-add as one, as C does
NVCC_FLAGS = ["-O3", "-std=c++17", "-fmad=false", "-Werror=all-warnings"]
NVCC_FLAGS += [f"-Xcompiler={','.join(COMMON_FLAGS)}"]
CUDA_ARCHS = "75,80,86,89,90a,100,120"
CUDA_LIBRARY = "smoothquant._cuda"
CPU_SHIM = ["torch/library.cpp", "torch/module.cpp", "torch/decoder.cpp", "torch/snapshot.cpp"]


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


def cuda_compiler(torch) -> str | None:
    """nvcc, where CUDA kernels shall be built."""
    wanted = os.environ.get("MIXEDQUANT_CUDA", "")
    if wanted == "0" or (wanted != "1" and torch.version.cuda is None):
        return None
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=toolkit)
    if wanted == "1" and nvcc is None:
        stop(f"MIXEDQUANT_CUDA=1, but nvcc was found neither on PATH nor in {toolkit}")
    return nvcc


def cuda_archs(nvcc: str) -> list[str]:
    """As nvcc names them, e.g. ["80", "90a"]."""
    text = os.environ.get("MIXEDQUANT_CUDA_ARCHS")
    if text is None:
        listed = subprocess.run(
            [nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True
        )
        known = set(listed.stdout.split())
        archs = CUDA_ARCHS.split(",")
        unknown = [arch for arch in archs if f"compute_{arch.rstrip('a')}" not in known]
        if unknown:
            print(
                f"MixedQuant: {nvcc} does not know, and nothing is built for, {','.join(unknown)}"
            )
        return [arch for arch in archs if arch not in unknown]
    archs = [arch.strip() for arch in text.split(",")]
    if not all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in archs):
        stop(f'MIXEDQUANT_CUDA_ARCHS must be like "80,90a"; got {text!r}')
    return archs


def code_flags(archs: list[str]) -> list[str]:
    """nvcc's flags for machine code of each architecture, and PTX, which newer GPUs compile for
    themselves, of the oldest from Hopper on: that of older ones multiplies nibbles, by an
    instruction that newer ones know only as a slow routine. The host is told whether there is
    code for sm_90a, which alone has products in the background (wgmma)."""
    general = [int(arch) for arch in archs if arch.isdigit() and int(arch) >= 90]
    own = [arch for arch in archs if f"{arch}a" not in archs]  # else an H100 could get either
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in own]
    flags += [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in sorted(general)[:1]]
    return flags + ["-DMQ_BUILD_WGMMA"] * ("90a" in archs)


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


def torch_cuda_flags(torch, cc: list[str], folder: Path) -> list[str]:
    """To link with libtorch_cuda; for a torch without it, with a stand-in of the one function that
    is called there. The library then asks for libtorch_cuda.so when it is loaded."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    if not library.is_file():
        library = folder / library.name
        command = [*cc, "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-x", "c", "-"]
        source = "void aoti_torch_get_current_cuda_stream(void) {}"
        subprocess.run([*command, "-o", str(library)], input=source, text=True, check=True)
    return [f"-L{library.parent}", "-ltorch_cuda"]


class DistInfo(dist_info):
    """Fails without torch: `pip install .` would else download all dependencies before the build
    fails."""

    def run(self) -> None:
        installed_torch()
        super().run()


class BuildExtension(build_ext):
    def run(self) -> None:
        self.torch = installed_torch()
        self.nvcc = cuda_compiler(self.torch)
        if not self.nvcc:
            self.extensions = [ext for ext in self.extensions if ext.name != CUDA_LIBRARY]
        super().run()

    def build_extension(self, ext: Extension) -> None:
        try:
            import pybind11
        except ImportError:
            stop("the build needs pybind11; run \"pip install 'setuptools>=77' wheel pybind11\"")
        cc, cxx = compiler("CC", "cc"), compiler("CXX", "c++")
        extra = shlex.split(os.environ.get("MIXEDQUANT_CFLAGS", ""))
        torch_folder = Path(self.torch.__file__).parent
        archs = cuda_archs(self.nvcc) if self.nvcc else []
        compiler_name = subprocess.run([*cc, "--version"], capture_output=True, text=True).stdout
        defines = {
            "TORCH_TARGET_VERSION": "0x020a000000000000",
            "MQ_BUILD_COMPILER": f'"{(compiler_name.splitlines() or ["unknown"])[0]}"',
            "MQ_BUILD_TORCH": f'"{self.torch.__version__}"',
            "MQ_BUILD_CUDA_ARCHS": f'"{",".join(archs)}"',
        }
        cxx_command = [
            *cxx,
            *CXX_FLAGS,
            *(f"-D{name}={value}" for name, value in defines.items()),
            # pybind11 first: some torch brings its own, which TORCH_TARGET_VERSION turns off
            *(f"-isystem{path}" for path in (pybind11.get_include(), torch_folder / "include")),
            *(f"-isystem{path}" for path in self.include_dirs),
        ]
        commands = {".c": [*cc, *C_FLAGS, *extra], ".cpp": [*cxx_command, *extra]}
        if self.nvcc:
            commands[".cu"] = [self.nvcc, *NVCC_FLAGS, *code_flags(archs)]

        objects, jobs = [], []
        for source in ext.sources:
            suffix = Path(source).suffix
            target = Path(self.build_temp) / Path(source).with_suffix(f"{suffix}.o")
            target.parent.mkdir(parents=True, exist_ok=True)
            objects.append(str(target))
            jobs.append([*commands[suffix], "-c", str(ROOT / source), "-o", str(target)])
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self.compile_one, jobs))

        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        link = [*cxx, "-shared", *extra, *objects, "-o", str(output), "-lm"]
        # torch is imported before this module, so its libraries are found without a path to them
        link += [f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
        if ext.name == CUDA_LIBRARY:
            link += torch_cuda_flags(self.torch, cc, Path(self.build_temp))
            # else torch's own CUDA runtime, of another version, could take its functions' places
            link += [*cuda_library_flags(self.nvcc), "-Wl,--exclude-libs,ALL", "-Wl,-z,defs"]
        self.compile_one(link)

    def compile_one(self, command: list[str]) -> None:
        result = subprocess.run(command, capture_output=True, text=True)
        if result.stderr:
            print(result.stderr, file=sys.stderr)
        if result.returncode:
            stop(f"the build failed at: {' '.join(command)}")


def extension(name: str, *patterns: str) -> Extension:
    def found(pattern: str) -> list[str]:
        return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(f"csrc/{pattern}"))

    headers = [*found("**/*.h"), *found("**/*.cuh")]
    return Extension(
        name, [path for pattern in patterns for path in found(pattern)], depends=headers
    )


setup(
    ext_modules=[
        extension("smoothquant._C", "cpu/*.c", *CPU_SHIM),
        extension(CUDA_LIBRARY, "cuda/*.cu", "cpu/shape.c", "torch/cuda.cpp"),
    ],
    cmdclass={"build_ext": BuildExtension, "dist_info": DistInfo},
)
