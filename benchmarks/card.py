"""Speed of the W4A4 linear on a CUDA card, against cuBLAS, torch._int_mm and W4A16.

    python benchmarks/card.py --json docs/benchmark_cuda.json       # Llama-2-7B's shapes
    python benchmarks/card.py --shapes 4096x4096 --tokens 1 4096 --group-sizes 128

W4A4 times include quantizing the activations. torch._int_mm multiplies int8 matrices and applies no
scales. W4A16 is torch's _weight_int4pack_mm.

A CUDA graph makes one call per copy of the weights. All copies together are four times as large as
the L2 cache, so each call reads its weights from memory. The contenders take turns, and the script
reports medians. torch's profiler times the quantizer, whose speed is compared with the bandwidth of
a copy. benchmarks/report.py draws the roofline; benchmarks/card.sh builds and tests first.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import Any

import torch
import torch.nn.functional as F
from peers import four_bits
from torch import Tensor

from smoothquant.kernels import ops

CACHES = 4  # size of all copies of a weight, in L2 caches
MOST_ERROR = 1e-2  # relative to the same product of the same rounded numbers in fp32
INT_MM_TOKENS = 17  # minimum for torch._int_mm
BASELINE = "cuBLAS fp16"
to_int4pack = torch.ops.aten._convert_weight_to_int4pack


@dataclass
class Contender:
    """A linear with one weight. Each call in its graph uses another copy of the weight."""

    name: str
    weight_bytes: int
    graph: torch.cuda.CUDAGraph
    inputs: object  # keeps alive what the graph reads
    calls: int
    error: float  # relative error of the outputs against the exact linear


def card() -> str:
    """Name and compute capability of the card."""
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, compute capability {properties.major}.{properties.minor}"


def relative(y: Tensor, expected: Tensor) -> float:
    """Relative error of y."""
    return ((y - expected).norm() / expected.norm()).item()


def dequantized(
    x: Tensor, packed: tuple[Tensor | None, ...], perm: Tensor, n: int, g: int
) -> Tensor:
    """The expected result of w4a4_linear: an fp32 product of the dequantized codes."""
    channels = perm.long()
    int4 = len(channels) - packed[2].shape[1]
    x = x.float()[:, channels]
    x[:, :int4] = ops.group_fake_quantize(x[:, :int4], g)
    return F.linear(x, ops.unpack_weight(*packed, perm, n, g)[:, channels])


def contender(
    name: str,
    weights: tuple[Tensor | None, ...],
    call: Callable[..., Tensor],
    exact: Tensor,
    expected: Tensor | None = None,
) -> Contender:
    """Capture call(*weights) in a graph, for enough copies of the weights to exceed the cache.

    Args:
        name: name of the contender.
        weights: the tensors to copy.
        call: the linear.
        exact: result of the linear that it approximates.
        expected: expected result of the call; None: `exact`.
    """
    size = sum(w.nbytes for w in weights if w is not None)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = max(8, math.ceil(CACHES * cache / size))
    copies = [[None if w is None else w.clone() for w in weights] for _ in range(count)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = call(*copies[0]).float()
    torch.cuda.current_stream().wait_stream(side)
    error = relative(y, exact if expected is None else expected)
    if not error < MOST_ERROR:
        raise SystemExit(f"{name} is wrong: relative error {error}")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in copies:
            call(*copy)
    return Contender(name, size, graph, (copies, call), count, relative(y, exact))


def contenders(w: Tensor, x: Tensor, args: argparse.Namespace) -> list[Contender]:
    """All contenders for a weight [N, K] and tokens [M, K], both fp32."""
    n, k = w.shape
    expected = F.linear(x, w)
    result = []
    for name, dtype in ((BASELINE, torch.float16), ("cuBLAS bf16", torch.bfloat16)):
        cast = x.to(dtype)
        result.append(contender(name, (w.to(dtype),), lambda w, x=cast: F.linear(x, w), expected))
    if x.shape[0] >= INT_MM_TOKENS:
        scales = w.abs().amax() / 127, x.abs().amax() / 127
        w8, x8 = ((t / s).round().to(torch.int8) for t, s in zip((w, x), scales, strict=True))
        in_units = expected / (scales[0] * scales[1])
        product = F.linear(x8.float(), w8.float())
        result.append(
            contender("torch._int_mm", (w8,), lambda w: torch._int_mm(x8, w.T), in_units, product)
        )
    try:
        weights, call, product = int4pack(w, x)
        result.append(contender("W4A16 g128", weights, call, expected, product))
    except (RuntimeError, NotImplementedError) as error:  # unsupported card, shape or torch
        print(f"W4A16 g128 was not measured: {str(error).splitlines()[0]}", file=sys.stderr)
    perm = torch.randperm(k, device="cuda").int()
    x_bf16 = x.to(torch.bfloat16)
    for group_size, prop in itertools.product(args.group_sizes, args.salient_props):
        packed = ops.pack_weight(w, perm, int(prop * k), group_size)
        result.append(
            contender(
                f"W4A4 g{group_size} p{prop:g}",
                (*packed, perm),
                lambda *w, g=group_size: ops.w4a4_linear(x_bf16, *w, None, n, g),
                expected,
                dequantized(x_bf16, packed, perm, n, group_size),
            )
        )
    return result


def int4pack(w: Tensor, x: Tensor) -> tuple[tuple[Tensor, Tensor], Callable[..., Tensor], Tensor]:
    """torch's W4A16: (packed weights and scales, the call, its expected result)."""
    codes, scales = four_bits(w, 128)
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
    packed = to_int4pack(pairs, 8)
    table = torch.stack([scales.T, torch.zeros_like(scales.T)], -1).bfloat16().contiguous()
    x_bf16 = x.to(torch.bfloat16)
    weights = (codes - 8) * scales.bfloat16().float().repeat_interleave(128, 1)
    expected = F.linear(x_bf16.float(), weights)
    return (
        (packed, table),
        lambda w, t: torch.ops.aten._weight_int4pack_mm(x_bf16, w, 128, t),
        expected,
    )


def measure(group: list[Contender], seconds: float) -> dict[str, float]:
    """Median seconds per call. The contenders take turns until each has run for `seconds`."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times: dict[str, list[float]] = {contender.name: [] for contender in group}
    turn = -2  # two warm-up turns
    while turn < 5 or min(map(sum, times.values())) < seconds:
        for contender in group:
            start.record()
            contender.graph.replay()
            end.record()
            end.synchronize()
            if turn >= 0:
                times[contender.name].append(1e-3 * start.elapsed_time(end))
        turn += 1
    return {c.name: statistics.median(times[c.name]) / c.calls for c in group}


def median_seconds(call: Callable[[], object], turns: int = 20) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(turns):
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(1e-3 * start.elapsed_time(end))
    return statistics.median(times)


def limits() -> dict[str, float]:
    """Peaks of the card.

    Returns:
        {"memory": GB/s of a copy, read and written; "fp16", "int8": 1e9 multiply-accumulates per
        second of large square products}.
    """
    bytes_ = torch.zeros(2, 1 << 30, dtype=torch.uint8, device="cuda")
    peaks = {"memory": 1e-9 * bytes_.nbytes / median_seconds(lambda: bytes_[0].copy_(bytes_[1]))}
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    codes = torch.ones_like(a, dtype=torch.int8)
    for name, call in (("fp16", lambda: a @ a.T), ("int8", lambda: torch._int_mm(codes, codes.T))):
        call()
        peaks[name] = 1e-9 * 8192**3 / median_seconds(call)
    return peaks


def quantizer(args: argparse.Namespace, memory: float) -> list[dict]:
    """Time the quantizing kernel alone, at the largest number of tokens; print and return rows.

    Its bandwidth counts the activations that it reads and the codes and scales that it writes. The
    calls alternate between inputs, so that these come from memory.
    """
    rows, m = [], max(args.tokens)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    print("\n| K | M | quantizer | median us | GB/s | of a copy |")
    print("|---|---|---|---|---|---|")
    ks = sorted({int(shape.split("x")[0]) for shape in args.shapes})
    for k, g, rotation in itertools.product(ks, args.group_sizes, (0, 512)):
        inputs = [torch.randn(m, k, device="cuda", dtype=torch.bfloat16)]
        inputs *= max(8, math.ceil(CACHES * cache / inputs[0].nbytes))
        inputs = [x.clone() for x in inputs]
        perm = torch.randperm(k, device="cuda").int()
        packed = ops.pack_weight(torch.randn(16, k, device="cuda"), perm, 0, g, rotation)
        activity = torch.profiler.ProfilerActivity.CUDA
        with torch.profiler.profile(activities=[activity]) as profile:
            for x in inputs:
                ops.w4a4_linear(x, *packed, perm, None, 16, g, rotation)
            torch.cuda.synchronize()
        times = [event.device_time for event in profile.events() if "quantize_" in event.name]
        name = f"g{g}{' Hadamard' if rotation else ''}"
        if not times:
            print(f"quantizer {name} was not measured: no kernel in the profile", file=sys.stderr)
            continue
        microseconds = statistics.median(times)
        speed = 1e-3 * (2 * m * k + m * k + 4 * m * math.ceil(k / g)) / microseconds
        row = {"k": k, "m": m, "choice": name, "microseconds": microseconds}
        rows.append(row | {"gigabytes_per_second": speed, "of_copy": speed / memory})
        print(f"| {k} | {m} | {name} | {microseconds:.1f} | {speed:.0f} | {speed / memory:.0%} |")
    return rows


def row_of(contender: Contender, k: int, n: int, m: int, median: float, ratio: float) -> dict:
    """A row for benchmarks/report.py. median: seconds per call."""
    return {
        "k": k,
        "n": n,
        "m": m,
        "contender": contender.name,
        "milliseconds": 1e3 * median,
        "gmacs": 1e-9 * m * n * k / median,
        "weight_bytes": contender.weight_bytes,
        "ratio": ratio,
        "error": contender.error,
    }


def speeds(args: argparse.Namespace) -> list[dict]:
    """Measure all linears; print each row as soon as it is ready."""
    print(f"\n| KxN | M | contender | median us | TOP/s | weights GB/s | x {BASELINE} | error |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for shape, m in itertools.product(args.shapes, args.tokens):
        k, n = map(int, shape.split("x"))
        w, x = torch.randn(n, k, device="cuda"), torch.randn(m, k, device="cuda")
        group = contenders(w, x, args)
        medians = measure(group, args.seconds)
        for contender in group:
            median = medians[contender.name]
            row = row_of(contender, k, n, m, median, medians[BASELINE] / median)
            rows.append(row)
            print(
                f"| {shape} | {m} | {contender.name} | {1e6 * median:.1f} "
                f"| {2e-3 * row['gmacs']:.1f} | {1e-9 * contender.weight_bytes / median:.0f} "
                f"| {row['ratio']:.2f} | {contender.error:.4f} |",
                flush=True,
            )
        del group
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "4096x11008", "11008x4096"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[2**i for i in range(13)])
    parser.add_argument("--group-sizes", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--salient-props", nargs="+", type=float, default=[0.0, 0.05, 0.1])
    parser.add_argument("--seconds", type=float, default=0.2, help="time per contender")
    parser.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args()
    if not ops.has_cuda():
        sys.exit(
            "nothing was measured: there is no CUDA card, or MixedQuant was built without CUDA "
            f"(architectures built: {ops.build_info()['cuda_archs'] or 'none'})"
        )
    torch.manual_seed(0)
    record: dict[str, Any] = {
        "chip": card(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    record |= {"archs": ops.build_info()["cuda_archs"], "date": str(date.today())}
    print("; ".join(map(str, record.values())))
    peaks = limits()
    print("; ".join(f"{name} {value:.0f}" for name, value in peaks.items()), end=" ")
    print("(GB/s of a copy; 1e9 multiply-accumulates per second)")
    record |= {"baseline": BASELINE, "limits": {"GPU": peaks}}
    ops.set_cuda_kernel("prefill_s8")  # writes codes as bytes
    record["activations"] = quantizer(args, peaks["memory"])
    ops.set_cuda_kernel(None)
    record["rows"] = speeds(args)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()
