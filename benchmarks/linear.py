"""Speed of the W4A4 linear against torch's own linears, as ratios of one interleaved run.

    python benchmarks/linear.py [--threads 1 2] [--shapes 4096x4096] [--tokens 1 64 512] [--json F]

Every figure includes the quantization of the activations. The contenders take turns, and medians
are reported; weights of M <= 16 rotate over more than 200 MB, so that they come from memory.
"of limit" is the time that the chip would need at the peak of the instruction in use and of its
memory, both measured at the start, over the time that was needed. Benchmarks need a quiet machine.
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
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F

from smoothquant import ops

COLD_BYTES = 200e6
MEMORY_BYTES = 256 << 20


def chip() -> str:
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"{platform.system()} {platform.machine()}, {ops.isa()}"
    with open("/proc/cpuinfo") as lines:
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    vnni = "AVX-512 VNNI" if "avx512_vnni" in fields.get("flags", "") else "no AVX-512 VNNI"
    family = fields.get("cpu family", "?")
    return f"{fields.get('model name', platform.processor())}, family {family}, {vnni}"


def measure_limits(thread_counts: list[int]) -> dict[int, dict[str, float]]:
    """By threads: 1e9 multiply-accumulates per second by instruction, and "memory" in 1e9 bytes."""
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

    result = {}
    for threads in thread_counts:
        with ThreadPoolExecutor(threads) as pool:  # ctypes releases the interpreter
            result[threads] = {
                name: sum(pool.map(lambda _, f=function: f(), range(threads)))
                for name, function in functions.items()
            } | {"memory": sum(pool.map(memory_read, range(threads)))}
    return result


@dataclass
class Contender:
    """Layers to rotate over, run on one instruction set."""

    name: str
    layers: list[Callable[[torch.Tensor], torch.Tensor]]
    isa: str
    weight_bytes: float
    macs: dict[str, float]  # per token, by the limit that they are measured by
    offset: int = 0  # in the rotation, where several contenders share layers


def dense(n: int, k: int, dtype: torch.dtype):
    w = torch.randn(n, k).to(dtype)
    return [w], lambda w: lambda x: F.linear(x.to(dtype), w)


def packed(n: int, k: int, group_size: int, num_salient: int, salient_dtype: torch.dtype):
    w = torch.randn(n, k)
    perm = torch.randperm(k).int()
    weights = ops.pack_weight(w, perm, num_salient, group_size, salient_dtype=salient_dtype)
    return weights, lambda *w: lambda x: ops.w4a4_linear(x, *w, perm, None, n, group_size)


def copies(weights: list[torch.Tensor | None], layer_of, cold: bool) -> tuple[list, float]:
    size = sum(w.nbytes for w in weights if w is not None)
    count = int(COLD_BYTES / size) + 1 if cold else 1
    return [layer_of(*(w if w is None else w.clone() for w in weights)) for _ in range(count)], size


def contenders(n: int, k: int, args, cold: bool) -> list[Contender]:
    result = []
    for name, dtype, limit in (
        ("torch fp32", torch.float32, "fma"),
        *([("torch bf16", torch.bfloat16, "bf16")] if args.bf16 else []),
    ):
        layers, size = copies(*dense(n, k, dtype), cold)
        result.append(Contender(name, layers, args.isas[0], size, {limit: n * k}))
    for group_size in args.group_sizes:
        for prop, salient in itertools.product(args.salient_props, args.salient_dtypes):
            num_salient = int(prop * k)
            weights = packed(n, k, group_size, num_salient, getattr(torch, salient))
            layers, size = copies(*weights, cold)
            for i, isa in enumerate(args.isas):
                name = f"W4A4 g{group_size} p{prop:g}{' int8' * (salient == 'int8')} {isa}"
                macs = {isa: n * (k - num_salient), "fma": n * num_salient}
                offset = i * len(layers) // len(args.isas)
                result.append(Contender(name, layers, isa, size, macs, offset))
    return result


def measure(group: list[Contender], x: torch.Tensor, seconds: float) -> dict[str, float]:
    """Median seconds of each contender; they take turns until `seconds` each have passed."""
    times = {contender.name: [] for contender in group}
    turn = -1  # one that does not count
    while turn < 5 or min(map(sum, times.values())) < seconds:
        for contender in group:
            ops.set_isa(contender.isa)
            layer = contender.layers[(turn + contender.offset) % len(contender.layers)]
            start = time.perf_counter()
            layer(x)
            if turn >= 0:
                times[contender.name].append(time.perf_counter() - start)
        turn += 1
    return {name: statistics.median(values) for name, values in times.items()}


def least_seconds(contender: Contender, m: int, cold: bool, limits: dict[str, float]) -> float:
    """What the chip needs at its peaks; 0 where one of them is not known."""
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
    parser.add_argument("--bf16", action="store_true", help="also against torch's bf16 linear")
    parser.add_argument("--seconds", type=float, default=1.0, help="per contender")
    parser.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args()

    print(f"{chip()}; torch {torch.__version__}; {date.today()}")
    limits = measure_limits(args.threads)
    for threads, values in limits.items():
        peaks = ", ".join(f"{k} {v:.0f}" for k, v in values.items() if k != "memory")
        print(f"Limits of {threads} threads: {values['memory']:.1f} GB/s; GMAC/s: {peaks}")
    print("\n| KxN | M | threads | contender | median ms | GMAC/s | x torch fp32 | of limit |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for shape in args.shapes:
        k, n = map(int, shape.split("x"))
        for m in args.tokens:
            cold = m <= 16
            group = contenders(n, k, args, cold)
            x = torch.randn(m, k)
            for threads in args.threads:
                torch.set_num_threads(threads)
                medians = measure(group, x, args.seconds)
                for contender in group:
                    median = medians[contender.name]
                    row = {
                        "k": k,
                        "n": n,
                        "m": m,
                        "threads": threads,
                        "contender": contender.name,
                        "milliseconds": 1e3 * median,
                        "gmacs": m * n * k / median / 1e9,
                        "ratio": medians["torch fp32"] / median,
                        "of_limit": least_seconds(contender, m, cold, limits[threads]) / median,
                    }
                    rows.append(row)
                    print(
                        f"| {shape} | {m} | {threads} | {contender.name} | {1e3 * median:.3f} "
                        f"| {row['gmacs']:.1f} | {row['ratio']:.2f} | {row['of_limit']:.0%} |",
                        flush=True,
                    )
    if args.json:
        record = {"chip": chip(), "torch": torch.__version__, "date": str(date.today())}
        with open(args.json, "w") as file:
            json.dump(record | {"limits": limits, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
