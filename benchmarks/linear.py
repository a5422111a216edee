"""Speed of the W4A4 linear against other linears on the CPU, measured in one interleaved run.

    python benchmarks/linear.py [--threads 1 2] [--shapes 4096x4096] [--tokens 1 64 512] [--json F]
    python benchmarks/linear.py --matrix --json docs/benchmark_peers.json  # for docs/results.md
    python benchmarks/linear.py --gate                                # after changing a kernel

All times include quantizing the activations. The contenders take turns, and the script reports
medians. For M <= 16, calls rotate over more than 200 MB of weights, so that they come from memory.
With --peers (benchmarks/peers.py), other libraries' threads keep spinning for a while after a call,
so each timed call follows a pause and an untimed call.

"of limit" is the time that the chip needs at the peak of its instructions and memory, both measured
at the start, divided by the measured time. "error" is the relative error of the outputs against
fp32, for normally distributed weights and activations. --gate fails if a kernel reaches a smaller
share of the limit than FLOORS, on any machine. Benchmarks need a quiet machine.
"""

import argparse
import ctypes
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peers import PEERS, Layer

from smoothquant.kernels import ops
from smoothquant.layers.linear import W4A4Linear

COLD_BYTES = 200e6
MEMORY_BYTES = 256 << 20
LIMIT_ROUNDS = 5
FLOORS = {1: 0.35, 64: 0.6}  # {tokens: smallest accepted share of the limit}; g = 128, one thread
MATRIX_SHAPES = ["4096x4096", "4096x11008", "11008x4096", "576x1536", "1536x576"]
MATRIX_TOKENS = [1, 4, 16, 64, 512]


def chip() -> str:
    """Name, family and AVX-512 VNNI support of the processor."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"{platform.system()} {platform.machine()}, {ops.isa()}"
    with open("/proc/cpuinfo") as lines:
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    vnni = "AVX-512 VNNI" if "avx512_vnni" in fields.get("flags", "") else "no AVX-512 VNNI"
    family = fields.get("cpu family", "?")
    return f"{fields.get('model name', platform.processor())}, family {family}, {vnni}"


def measure_limits(thread_counts: list[int]) -> dict[int, dict[str, float]]:
    """Measure the peaks of the chip.

    Returns:
        {threads: {instruction: 1e9 multiply-accumulates per second, "memory": 1e9 bytes per
        second}}, the best of several rounds: other load on the machine must not lower a limit.
    """
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/limits.so"
        source = Path(__file__).with_name("limits.c")
        cc = shlex.split(os.environ.get("CC", "cc"))
        subprocess.run([*cc, "-O3", "-shared", "-fPIC", str(source), "-o", library], check=True)
        limits = ctypes.CDLL(library)
    names = ["fma", *["bf16"] * limits.has_bf16(), *ops.supported_isas()]
    names.remove("scalar")
    functions = {name: getattr(limits, f"peak_{name}") for name in names}
    for function in (*functions.values(), limits.memory_read):
        function.restype = ctypes.c_double
    data = torch.ones(MEMORY_BYTES, dtype=torch.uint8)

    def memory_read(part: int) -> float:
        size = MEMORY_BYTES // threads
        start = ctypes.c_void_p(data.data_ptr() + part * size)
        return limits.memory_read(start, ctypes.c_size_t(size))

    measures: dict[str, Callable[[int], float]] = {
        name: lambda _, f=function: f() for name, function in functions.items()
    }
    measures["memory"] = memory_read
    result = {}
    for threads in thread_counts:
        with ThreadPoolExecutor(threads) as pool:  # ctypes releases the GIL
            rounds = [
                {name: sum(pool.map(measure, range(threads))) for name, measure in measures.items()}
                for _ in range(LIMIT_ROUNDS)
            ]
        result[threads] = {name: max(speeds[name] for speeds in rounds) for name in measures}
    return result


@dataclass
class Contender:
    """Layers to rotate over, on one instruction set."""

    name: str
    layers: list[Layer]
    isa: str
    weight_bytes: float
    macs: Mapping[str, float]  # {name of a limit: multiply-accumulates per token}
    offset: int = 0  # start in the rotation, for contenders that share layers


def copies(
    weights: Sequence[torch.Tensor | None], make_layer: Callable[..., Layer], count: int
) -> tuple[list[Layer], float]:
    """Make `count` layers with their own copies of the weights: (layers, bytes of one copy)."""
    size = sum(w.nbytes for w in weights if w is not None)
    layers = [make_layer(*(w if w is None else w.clone() for w in weights)) for _ in range(count)]
    return layers, size


def cold_copies(size: float, cold: bool) -> int:
    return int(COLD_BYTES / size) + 1 if cold else 1


def dense(w: torch.Tensor, args: argparse.Namespace, cold: bool) -> list[Contender]:
    result = []
    for name, dtype, limit in (
        ("torch fp32", torch.float32, "fma"),
        *([("torch bf16", torch.bfloat16, "bf16")] if args.bf16 else []),
    ):
        cast = w.to(dtype)
        layers, size = copies(
            [cast],
            lambda w: lambda x: F.linear(x.to(w.dtype), w),
            cold_copies(cast.nbytes, cold),
        )
        result.append(Contender(name, layers, args.isas[0], size, {limit: w.numel()}))
    return result


def packed(w: torch.Tensor, args: argparse.Namespace, cold: bool) -> list[Contender]:
    n, k = w.shape
    perm = torch.randperm(k).int()
    result = []
    for group_size, prop, salient in itertools.product(
        args.group_sizes, args.salient_props, args.salient_dtypes
    ):
        num_salient = int(prop * k)
        weights = ops.pack_weight(
            w, perm, num_salient, group_size, salient_dtype=getattr(torch, salient)
        )
        layers, size = copies(
            weights,
            lambda *w, g=group_size: lambda x: ops.w4a4_linear(x, *w, perm, None, n, g),
            cold_copies(sum(t.nbytes for t in weights if t is not None), cold),
        )
        for i, isa in enumerate(args.isas):
            name = f"W4A4 g{group_size} p{prop:g}{' int8' * (salient == 'int8')} {isa}"
            macs = {isa: n * (k - num_salient), "fma": n * num_salient}
            offset = i * len(layers) // len(args.isas)
            result.append(Contender(name, layers, isa, size, macs, offset))
    return result


def others(
    w: torch.Tensor, args: argparse.Namespace, cold: bool, m: int, threads: int
) -> list[Contender]:
    result = []
    for name, (make, bytes_per_weight, limit) in PEERS.items():
        try:
            layers, size = make(w, cold_copies(bytes_per_weight * w.numel(), cold), m, threads)
        except (ImportError, RuntimeError) as error:
            UNAVAILABLE.setdefault(name, f"{error}")
            continue
        isa = args.isas[-1]
        result.append(Contender(name, layers, isa, size, {limit or isa: w.numel()}))
    return result


UNAVAILABLE: dict[str, str] = {}  # {requested peer: why it could not be measured}


def errors(group: list[Contender], w: torch.Tensor, x: torch.Tensor) -> dict[str, float]:
    expected, result = F.linear(x, w), {}
    for contender in group:
        ops.set_isa(contender.isa)
        layer = contender.layers[0]
        y = getattr(layer, "result", layer)(x).float()
        result[contender.name] = ((y - expected).norm() / expected.norm()).item()
        if not result[contender.name] < 0.3:
            raise SystemExit(f"{contender.name} is wrong: relative error {result[contender.name]}")
    return result


def measure(
    group: list[Contender], x: torch.Tensor, seconds: float, settle: bool
) -> dict[str, float]:
    """Median seconds per call. The contenders take turns until each has run for `seconds`.

    Args:
        group: the contenders.
        x: their input.
        seconds: time for each contender.
        settle: before each call, let other libraries' threads go to sleep, then wake the
            contender's own threads with an untimed call.
    """
    times: dict[str, list[float]] = {contender.name: [] for contender in group}
    turn = -1  # a warm-up turn
    while turn < 5 or min(map(sum, times.values())) < seconds:
        for contender in group:
            ops.set_isa(contender.isa)
            at = turn * (1 + settle) + contender.offset
            if settle:
                time.sleep(0.005)
                contender.layers[(at + 1) % len(contender.layers)](x)
            layer = contender.layers[at % len(contender.layers)]
            start = time.perf_counter()
            layer(x)
            if turn >= 0:
                times[contender.name].append(time.perf_counter() - start)
        turn += 1
    return {name: statistics.median(values) for name, values in times.items()}


def least_seconds(contender: Contender, m: int, cold: bool, limits: dict[str, float]) -> float:
    """Seconds that the chip needs at its peaks; 0 if a peak is unknown."""
    if not all(name in limits for name, macs in contender.macs.items() if macs):
        return 0.0
    arithmetic = sum(m * macs / limits[name] for name, macs in contender.macs.items() if macs)
    return 1e-9 * max(arithmetic, cold * contender.weight_bytes / limits["memory"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096"], help="KxN of the layers")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 64, 512])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, os.cpu_count()])
    parser.add_argument("--group-sizes", nargs="+", type=int, default=[128, 32, 16, 8])
    parser.add_argument("--salient-props", nargs="+", type=float, default=[0.0, 0.05])
    parser.add_argument(
        "--salient-dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "int8"]
    )
    parser.add_argument("--isas", nargs="+", default=[ops.isa()], choices=ops.supported_isas())
    parser.add_argument("--bf16", action="store_true", help="also measure torch's bf16 linear")
    parser.add_argument("--peers", action="store_true", help="also measure benchmarks/peers.py")
    parser.add_argument(
        "--matrix", action="store_true", help="five shapes, five token counts, all peers"
    )
    parser.add_argument(
        "--quantizer", action="store_true", help="only the quantizer and the cost of a call"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="time per contender")
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--gate", action="store_true", help="fail if a kernel is too slow")
    args = parser.parse_args()
    if args.matrix:
        args.shapes, args.tokens = MATRIX_SHAPES, MATRIX_TOKENS
        args.group_sizes, args.salient_props = [128, 32], [0.0, 0.05]
        args.bf16 = args.peers = True

    if args.gate:
        args.shapes, args.tokens, args.threads = ["4096x4096"], list(FLOORS), [1]
        args.group_sizes, args.salient_props = [128], [0.0]
        args.isas = [name for name in ops.supported_isas() if name != "scalar"]

    print(f"{chip()}; torch {torch.__version__}; {date.today()}")
    limits = measure_limits(args.threads)
    for threads, values in limits.items():
        peaks = ", ".join(f"{k} {v:.0f}" for k, v in values.items() if k != "memory")
        print(f"Limits of {threads} threads: {values['memory']:.1f} GB/s; GMAC/s: {peaks}")
    record: dict[str, Any] = {"chip": chip(), "torch": torch.__version__, "date": str(date.today())}
    record |= {"limits": limits, "rows": [] if args.quantizer else speeds(args, limits)}
    for name, reason in UNAVAILABLE.items():
        print(f"not measured: {name} ({reason})")
    if args.matrix or args.quantizer:
        record |= {"quantizer": quantizer(args), "call_microseconds": call_microseconds()}
    if args.json:
        with open(args.json, "w") as file:
            json.dump(record, file, indent=1)
    if args.gate:
        slow = [
            f"{row['contender']}, M = {row['m']}: {row['of_limit']:.0%} of the limit, "
            f"expected at least {FLOORS[row['m']]:.0%}"
            for row in record["rows"]
            if row["contender"].startswith("W4A4") and row["of_limit"] < FLOORS[row["m"]]
        ]
        sys.exit("\n".join(slow) or None)


def speeds(args: argparse.Namespace, limits: dict[int, dict[str, float]]) -> list[dict]:
    """Measure all linears; print each row as soon as it is ready."""
    print(
        "\n| KxN | M | threads | contender | median ms | GMAC/s | x torch fp32 | of limit | error |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    rows = []
    for shape in args.shapes:
        k, n = map(int, shape.split("x"))
        for m in args.tokens:
            cold = m <= 16
            w, x = torch.randn(n, k), torch.randn(m, k)
            always = [*dense(w, args, cold), *packed(w, args, cold)]
            for threads in args.threads:
                torch.set_num_threads(threads)
                group = always + (others(w, args, cold, m, threads) if args.peers else [])
                relative_errors = errors(group, w, x)
                medians = measure(group, x, args.seconds, args.peers)
                for contender in group:
                    median = medians[contender.name]
                    least = least_seconds(contender, m, cold, limits[threads])
                    row = {
                        "k": k,
                        "n": n,
                        "m": m,
                        "threads": threads,
                        "contender": contender.name,
                        "milliseconds": 1e3 * median,
                        "gmacs": m * n * k / median / 1e9,
                        "ratio": medians["torch fp32"] / median,
                        "of_limit": least / median,
                        "weight_bytes": contender.weight_bytes,
                        "error": relative_errors[contender.name],
                    }
                    rows.append(row)
                    print(
                        f"| {shape} | {m} | {threads} | {contender.name} | {1e3 * median:.3f} "
                        f"| {row['gmacs']:.1f} | {row['ratio']:.2f} | {row['of_limit']:.0%} "
                        f"| {row['error']:.4f} |",
                        flush=True,
                    )
    return rows


def quantizer(args: argparse.Namespace) -> list[dict]:
    """Measure the speed of quantizing 512 x 4096 fp32 activations, in 1e9 bytes read per second."""
    m, k = 512, 4096
    x = torch.randn(m, k)
    perms = {"in place": torch.arange(k).int(), "gathered": torch.randperm(k).int()}
    print("\n| quantizer | g | Hadamard | format | threads | GB/s |\n|---|---|---|---|---|---|")
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        choices = [
            (reading, group_size, rotation, act_format)
            for reading in perms
            for group_size, rotation, act_format in (
                (128, 0, "symmetric"),
                (32, 0, "symmetric"),
                (128, 128, "symmetric"),
                (128, 128, "zero_point"),
            )
        ]
        group = [
            Contender(
                " | ".join(map(str, choice)),
                [lambda x, c=choice: ops.quantize_input(x, perms[c[0]], 0, *c[1:3], 4, c[3])],
                args.isas[-1],
                0,
                {},
            )
            for choice in choices
        ]
        for name, median in measure(group, x, args.seconds, False).items():
            speed = x.nbytes / median / 1e9
            rows.append({"choice": name, "threads": threads, "gigabytes_per_second": speed})
            print(f"| {name} | {threads} | {speed:.1f} |", flush=True)
    return rows


def call_microseconds() -> dict[str, float]:
    """Overhead of a call, measured on a tiny layer; the best of several repeats."""
    torch.set_num_threads(1)
    dense = torch.nn.Linear(16, 16, bias=False)
    layer = W4A4Linear.from_float(dense, group_size=16)
    x = torch.randn(1, 16)
    with torch.no_grad():
        op = (x, *(getattr(layer, name) for name in ops.PACKED), layer.perm, None, 16, 16)
        calls = {
            "nn.Linear": lambda: dense(x),
            "W4A4Linear": lambda: layer(x),
            "its op alone": lambda: ops.w4a4_linear(*op),
        }
        result = {
            name: 1e6 * min(timeit.repeat(call, number=2000, repeat=15)) / 2000
            for name, call in calls.items()
        }
    print("\nOverhead of a call:", ", ".join(f"{k} {v:.1f} us" for k, v in result.items()))
    return result


if __name__ == "__main__":
    main()
