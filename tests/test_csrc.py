"""The C kernels alone, under AddressSanitizer and UndefinedBehaviorSanitizer with guard pages."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
C_SOURCES = sorted(str(path) for path in (ROOT / "csrc" / "cpu").glob("*.c"))
CC = shlex.split(os.environ.get("CC", "cc"))
FLAGS = ["-std=c11", "-O1", "-g", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]


def compile_and_run(tmp_path: Path, source: str, *args: str, flags=()) -> str:
    program = tmp_path / "program"
    command = [*CC, *FLAGS, *flags, source, *C_SOURCES, "-o", str(program), "-lm"]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    result = subprocess.run([program, *args], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("seed", [1, 2])
def test_kernels_under_sanitizers_with_guard_pages(tmp_path, seed):
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    source = str(ROOT / "tests" / "csrc" / "check_kernels.c")
    assert compile_and_run(tmp_path, source, str(seed), "4000", flags=flags) == "4000 cases\n"


def test_header_is_plain_c_and_cpp(tmp_path):
    header = ROOT / "csrc" / "mixedquant.h"
    for command in ([*CC, "-std=c11", "-xc"], [*CC, "-std=c++17", "-xc++"]):
        checked = subprocess.run(
            [*command, "-Wall", "-Wextra", "-pedantic", "-Werror", "-fsyntax-only", str(header)],
            capture_output=True,
            text=True,
        )
        assert checked.returncode == 0, checked.stderr


def test_kernels_know_no_torch_no_threads_and_no_heap():
    forbidden = ("malloc", "calloc", "realloc", "free(", "printf", "pthread", "abort(", "getenv")
    for path in C_SOURCES:
        text = Path(path).read_text()
        assert "torch" not in text
        assert not [word for word in forbidden if word in text], path
