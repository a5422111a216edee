"""Speed of the W4A4 linear against torch's own linears, as ratios of one interleaved run.

    python benchmarks/linear.py [--threads 1 2] [--shapes 4096x4096] [--tokens 1 64 512] [--json F]

Every figure includes the quantization of the activations. The contenders take turns, and medians
are reported; weights of M <= 16 rotate over more than 200 MB, so that they come from memory.
Benchmarks need a quiet machine.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import time
from datetime import date

import torch
import torch.nn.functional as F

from smoothquant import ops

COLD_BYTES = 200e6


def chip() -> str:
    with open("/proc/cpuinfo") as lines:
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    vnni = "AVX-512 VNNI" if "avx512_vnni" in fields.get("flags", "") else "no AVX-512 VNNI"
    family = fields.get("cpu family", "?")
    return f"{fields.get('model name', platform.processor())}, family {family}, {vnni}"


def packed(n: int, k: int, group_size: int, num_salient: int, salient_dtype: torch.dtype):
    w = torch.randn(n, k)
    perm = torch.randperm(k).int()
    weights = ops.pack_weight(w, perm, num_salient, group_size, salient_dtype=salient_dtype)
    return lambda x: ops.w4a4_linear(x, *weights, perm, None, n, group_size)


def dense(n: int, k: int, dtype: torch.dtype):
    w = torch.randn(n, k).to(dtype)
    return lambda x: F.linear(x.to(dtype), w)


def contenders(n: int, k: int, args, cold: bool) -> dict[str, list]:
    """Name -> layers to rotate over."""
    makers = {"torch fp32": (lambda: dense(n, k, torch.float32), 4.0)}
    if args.bf16:
        makers["torch bf16"] = (lambda: dense(n, k, torch.bfloat16), 2.0)
    for group_size in args.group_sizes:
        for prop, salient in itertools.product(args.salient_props, args.salient_dtypes):
            num_salient, dtype = int(prop * k), getattr(torch, salient)
            name = f"W4A4 g{group_size} p{prop:g}" + " int8" * (salient == "int8")
            maker = lambda g=group_size, s=num_salient, d=dtype: packed(n, k, g, s, d)  # noqa: E731
            makers[name] = (maker, 0.5 + (dtype.itemsize - 0.5) * prop + 2 / group_size)
    copies = {
        name: max(1, int(COLD_BYTES / (n * k * bytes_each)) + 1) if cold else 1
        for name, (_, bytes_each) in makers.items()
    }
    return {name: [make() for _ in range(copies[name])] for name, (make, _) in makers.items()}


def measure(layers: dict[str, list], x: torch.Tensor, seconds: float) -> dict[str, float]:
    """Median seconds of each contender; they take turns until `seconds` each have passed."""
    times = {name: [] for name in layers}
    for copies in layers.values():
        copies[0](x)
    turn = 0
    while turn < 5 or min(map(sum, times.values())) < seconds:
        for name, copies in layers.items():
            layer = copies[turn % len(copies)]
            start = time.perf_counter()
            layer(x)
            times[name].append(time.perf_counter() - start)
        turn += 1
    return {name: statistics.median(values) for name, values in times.items()}


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
    parser.add_argument("--isas", nargs="+", default=[ops.isa()])
    parser.add_argument("--bf16", action="store_true", help="also against torch's bf16 linear")
    parser.add_argument("--seconds", type=float, default=1.0, help="per contender")
    parser.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args()

    print(f"{chip()}; torch {torch.__version__}; {date.today()}")
    print("| KxN | M | threads | contender | median ms | GMAC/s | x torch fp32 |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for isa in args.isas:
        ops.set_isa(isa)
        for shape in args.shapes:
            k, n = map(int, shape.split("x"))
            for m in args.tokens:
                layers = contenders(n, k, args, cold=m <= 16)
                x = torch.randn(m, k)
                for threads in args.threads:
                    torch.set_num_threads(threads)
                    medians = measure(layers, x, args.seconds)
                    for name, median in medians.items():
                        label = f"{name} {isa}" if name.startswith("W4A4") else name
                        ratio = medians["torch fp32"] / median
                        speed = m * n * k / median / 1e9
                        rows.append(
                            {"k": k, "n": n, "m": m, "threads": threads, "contender": label}
                            | {"milliseconds": 1e3 * median, "gmacs": speed, "ratio": ratio}
                        )
                        print(
                            f"| {shape} | {m} | {threads} | {label} | {1e3 * median:.3f} "
                            f"| {speed:.1f} | {ratio:.2f} |",
                            flush=True,
                        )
    if args.json:
        record = {"chip": chip(), "torch": torch.__version__, "date": str(date.today())}
        with open(args.json, "w") as file:
            json.dump(record | {"rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
