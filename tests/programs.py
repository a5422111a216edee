"""Programs that tests compile and run."""

import hashlib
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
CC = shlex.split(os.environ.get("CC", "cc"))
CXX = shlex.split(os.environ.get("CXX", "c++"))
# Of C and C++
FLAGS = ["-g", "-ffp-contract=off", "-Wall", "-Wextra", "-Wconversion", "-Werror"]
FLAGS += ["-DMQ_CHECK_ASSUMPTIONS"]
# Of CUDA C, compiled for the CPU
EMULATED = ["-std=c++17", *FLAGS, "-O1", "-Wno-unknown-pragmas", "-DMQ_BUILD_WGMMA"]
EMULATED += ["-include", str(ROOT / "tests" / "cuda" / "emulator.h"), "-x", "c++"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def run(*command: str) -> str:
    """What a command prints; it must succeed."""
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def traps(*command: str) -> bool:
    """Whether a command, sanitized or not, dies by a false MQ_ASSUME."""
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "handle_sigill=0",
        "UBSAN_OPTIONS": "handle_sigill=0",
    }
    result = subprocess.run(command, capture_output=True, env=environment)
    return result.returncode in (-signal.SIGILL, -signal.SIGTRAP)


def run_all(commands: Iterable[list[str]]) -> list[str]:
    """What each prints, as many running at a time as there are processors."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda command: run(*command), commands))


CACHE = ROOT / ".cache" / "tests"
SOURCES = ("csrc", "tests/csrc", "tests/cuda")


def built(name: str, build: Callable[[Path], object], *how: object) -> Path:
    """The folder that `build` filled for these sources, in this run of the tests or an earlier one.

    how: whatever else decides what is built: commands, flags, versions.
    """
    digest = hashlib.sha256(repr(how).encode())
    for path in sorted(p for folder in SOURCES for p in (ROOT / folder).rglob("*") if p.is_file()):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    folder = CACHE / name / digest.hexdigest()[:16]
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / f"{name}.lock"):
        if not (folder / "whole").exists():
            shutil.rmtree(folder.parent, ignore_errors=True)  # those of earlier sources
            folder.mkdir(parents=True)
            build(folder)
            (folder / "whole").touch()
    return folder


def version(*compiler: str) -> str:
    """What a compiler says of itself."""
    return run(*compiler, "--version")
