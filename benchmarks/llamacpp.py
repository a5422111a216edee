"""Builds llama.cpp for this machine, and measures it beside our models in model.py.

    python benchmarks/llamacpp.py [--folder build/llama.cpp] [--jobs 2]

Takes the sources from the Python package llama-cpp-python and compiles them for the processor of
this machine, without CUDA. It needs pip, cmake, ninja and a C++ compiler, and takes 5 to 15 minutes
on two cores. A second call does nothing.

The GGUF files are written without a vocabulary: the benchmark passes token ids. Weights are stored
in 16 bits, norms in 32; llama-quantize makes the Q4_0 file from that.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smoothquant.checkpoints.export_gguf import export_gguf

FOLDER = Path(__file__).parents[1] / "build" / "llama.cpp"
PACKAGE = "llama-cpp-python"
PACKAGE_VERSION = "0.3.36"
PROGRAMS = ("llama-bench", "llama-batched-bench", "llama-perplexity", "llama-quantize")
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_OPENSSL": "OFF",
}
LOG_RANGE = 16  # llama.cpp stores log-probabilities down to this far below the largest


def program(name: str, folder: Path = FOLDER) -> Path:
    return folder / "build" / "bin" / name


def is_built(folder: Path = FOLDER) -> bool:
    return (folder / "version.txt").is_file()


def version(folder: Path = FOLDER) -> str:
    """What was built, such as "llama.cpp 0c1e57098 (llama-cpp-python 0.3.36)".

    Raises:
        RuntimeError: nothing was built.
    """
    if not is_built(folder):
        raise RuntimeError(
            f"llama.cpp is not built in {folder}. Build it with: python benchmarks/llamacpp.py "
            f"--folder {folder}"
        )
    return (folder / "version.txt").read_text().strip()


def build(folder: Path = FOLDER, jobs: int = 2) -> None:
    """Download and compile llama.cpp, unless that is done already.

    Raises:
        RuntimeError: a tool is missing, or the download or the compiler failed.
    """
    if is_built(folder):
        return
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    missing = [name for name in ("cmake", "ninja") if shutil.which(name, path=tools) is None]
    if missing:
        names = " ".join(missing)
        raise RuntimeError(f"llama.cpp cannot be built without {names}: pip install {names}")
    # Without the ceiling, the build would report the commit of the repository around it.
    environment = os.environ | {"PATH": tools, "GIT_CEILING_DIRECTORIES": str(folder.resolve())}
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / f"{PACKAGE.replace('-', '_')}-{PACKAGE_VERSION}.tar.gz"
    if not archive.is_file():
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", PACKAGE]
        _run([*pip, "--dest", str(folder), f"{PACKAGE}=={PACKAGE_VERSION}"], environment)
    commit = _unpack(archive, folder / "source")
    options = [f"-D{name}={value}" for name, value in OPTIONS.items()]
    options.append(f"-DLLAMA_BUILD_COMMIT={commit}")
    where = ["-S", str(folder / "source"), "-B", str(folder / "build"), "-G", "Ninja"]
    _run(["cmake", *where, *options], environment)
    target = ["--target", *PROGRAMS]
    _run(["cmake", "--build", str(folder / "build"), "--parallel", str(jobs), *target], environment)
    text = f"llama.cpp {commit} ({PACKAGE} {PACKAGE_VERSION})\n"
    (folder / "version.txt").write_text(text)


def _unpack(archive: Path, target: Path) -> str:
    """Unpack llama.cpp from the package's archive; return its commit."""
    inside = f"{archive.name.removesuffix('.tar.gz')}/"
    vendor = f"{inside}vendor/llama.cpp/"
    with tarfile.open(archive) as tar:
        changes = tar.extractfile(f"{inside}CHANGELOG.md")
        assert changes is not None
        text = changes.read().decode()
        for member in tar:
            if member.name.startswith(vendor) and not target.is_dir():
                member.name = member.name.removeprefix(vendor)
                tar.extract(member, target.with_name("unpacking"), filter="data")
    if not target.is_dir():
        target.with_name("unpacking").rename(target)
    found = re.search(r"update llama\.cpp to ggml-org/llama\.cpp@(\w+)", text)
    return found[1] if found else "unknown"


def _run(command: list[str], environment: dict[str, str] | None = None) -> str:
    """Run a program; return what it printed to stdout and then to stderr.

    Raises:
        RuntimeError: it does not exist or failed; the message has its last lines.
    """
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise RuntimeError(f"{' '.join(command)} failed ({done.returncode}):\n{last}")
    return done.stdout + done.stderr


def write_files(model: Any, name: str, folder: Path = FOLDER) -> tuple[Path, Path]:
    """Write `name`-f16.gguf and, quantized from it, `name`-q4_0.gguf; return their paths.

    Raises:
        ValueError, RuntimeError: as `export_gguf` and `version`.
    """
    version(folder)
    plain, target = (folder / f"{name}-{kind}.gguf" for kind in ("f16", "q4_0"))
    export_gguf(model, plain, overwrite=True)
    return plain, quantized(plain, target, folder)


def quantized(plain: Path, target: Path, folder: Path = FOLDER) -> Path:
    """Quantize a GGUF file to Q4_0 by llama.cpp's own program; return `target`."""
    partial = target.with_suffix(".new")
    _run([str(program("llama-quantize", folder)), str(plain), str(partial), "Q4_0", "2"])
    return partial.rename(target)  # a file that exists is complete


def bench(
    gguf: Path, threads: int, prompt: int, new: int, folder: Path = FOLDER
) -> tuple[float, float]:
    """Tokens per second in prefill and in decode, from one process of llama-bench."""
    sizes = ["-p", str(prompt), "-n", str(new), "-t", str(threads)]
    command = [str(program("llama-bench", folder)), "-m", str(gguf), *sizes]
    output = _run([*command, "-r", "1", "-o", "json"])
    start, end = output.index("[\n"), output.rindex("\n]")
    rows = json.loads(output[start : end + 2])
    prefill = next(row["avg_ts"] for row in rows if row["n_prompt"])
    return prefill, next(row["avg_ts"] for row in rows if row["n_gen"])


def batched_bench(
    gguf: Path, threads: int, prompt: int, new: int, batch: int, folder: Path = FOLDER
) -> float:
    """Tokens per second, over all sequences, that llama-batched-bench decodes."""
    context = batch * (prompt + new)
    sizes = ["-npp", str(prompt), "-ntg", str(new), "-npl", str(batch), "-c", str(context)]
    command = [str(program("llama-batched-bench", folder)), "-m", str(gguf), *sizes]
    command += ["-t", str(threads), "-tb", str(threads), "--output-format", "jsonl"]
    lines = _run(command).splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    return rows[-1]["speed_tg"]


def write_base_logits(
    path: Path, windows: torch.Tensor, logits: Iterable[torch.Tensor], vocabulary: int
) -> None:
    """Write the file of a reference's predictions that llama-perplexity compares with.

    llama.cpp scores the second half of each window. It stores a log-probability as 16 bits between
    the smallest and the largest, at most LOG_RANGE apart.

    Args:
        path: the file.
        windows: int [W, T], the token ids.
        logits: for each window, the reference's logits, float [T - 1, V].
        vocabulary: V.
    """
    count, size = windows.shape
    with open(path, "wb") as file:
        file.write(b"_logits_")
        np.array([size, vocabulary, count], dtype=np.int32).tofile(file)
        windows.to(torch.int32).numpy().tofile(file)
        for window in logits:
            packed_log_probabilities(window[size // 2 :].float()).tofile(file)


def packed_log_probabilities(logits: torch.Tensor) -> np.ndarray:
    """Log-probabilities as llama-perplexity stores them.

    Args:
        logits: float32 [T, V].

    Returns:
        uint16 [T, V + 4], or V + 5 if V is odd: scale and smallest log-probability as two float32,
        then the codes.
    """
    largest = logits.amax(-1, keepdim=True)
    smallest = logits.amin(-1, keepdim=True).maximum(largest - LOG_RANGE)
    scale = (largest - smallest) / 65535
    codes = ((logits - smallest) / scale.clamp_min(1e-30)).round().clamp(0, 65535)
    head = torch.cat((scale, smallest - logits.logsumexp(-1, keepdim=True)), -1)
    count, vocabulary = logits.shape
    rows = np.zeros((count, 4 + vocabulary + vocabulary % 2), dtype=np.uint16)
    rows[:, :4] = head.numpy().view(np.uint16)
    rows[:, 4 : 4 + vocabulary] = codes.numpy().astype(np.uint16)
    return rows


def compare(gguf: Path, base: Path, window: int, threads: int, folder: Path = FOLDER) -> dict:
    """Compare a model with a reference on the windows in a file of `write_base_logits`.

    Returns:
        {"perplexity", "kl" (nats), "top1"} over the second half of each window.
    """
    command = [str(program("llama-perplexity", folder)), "-m", str(gguf), "-c", str(window)]
    command += ["-b", str(window), "-t", str(threads), "--kl-divergence"]
    output = _run([*command, "--kl-divergence-base", str(base)])
    return parse_comparison(output)


def parse_comparison(output: str) -> dict[str, float]:
    """The means in what llama-perplexity --kl-divergence prints.

    Raises:
        RuntimeError: they are not there.
    """
    patterns = {
        "perplexity": r"Mean PPL\(Q\)\s*:\s*([\d.]+)",
        "kl": r"Mean\s+KLD:\s*(-?[\d.]+)",
        "top1": r"Same top p:\s*([\d.]+)",
    }
    found = {key: re.search(pattern, output) for key, pattern in patterns.items()}
    values = {key: float(match[1]) for key, match in found.items() if match}
    if len(values) < len(patterns):
        last = "\n".join(output.splitlines()[-15:])
        raise RuntimeError(f"llama-perplexity printed no comparison:\n{last}")
    return values | {"top1": values["top1"] / 100}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to build")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    args = parser.parse_args()
    os.nice(10)
    build(args.folder, args.jobs)
    print(version(args.folder))


if __name__ == "__main__":
    main()
