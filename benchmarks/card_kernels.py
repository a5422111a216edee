"""Time of each kernel of the W4A4 linear on a CUDA card, compared with cuBLAS fp16.

    python benchmarks/card_kernels.py                                  # Llama-2-7B's shapes
    python benchmarks/card_kernels.py --tokens 1 16 --kernels decode_8 decode_16

Shows which kernel is fastest for which number of tokens, to check the limits in the table of
csrc/cuda/linear.cu.

Times are in microseconds from torch's profiler: medians over copies of the weights that together
exceed the L2 cache. W4A4 has two: the quantizing kernel and the multiplying kernel. If the second
can start before the first ends, its time includes waiting, and a linear takes less than the sum.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Iterator
from datetime import date
from typing import NamedTuple

import torch
import torch.nn.functional as F
from card import card
from torch import Tensor

from smoothquant.kernels import ops

CACHES = 3  # size of all copies of a weight, in L2 caches
MAX_COPIES = 16
CUBLAS = "cuBLAS"
# Parts of cuBLAS' kernel names, and the kernel that adds up the parts of a split-K product.
CUBLAS_NAMES, CUBLAS_REDUCTION = ("gemm", "nvjet", "cutlass", "gemv", "cublas"), "splitKreduce"
# Range of tokens in which a kernel can be the fastest; it is measured only there.
TOKEN_RANGES: dict[str, tuple[float, float]] = {
    "decode_8": (1, 16),
    "decode_16": (1, 128),
    "decode_32": (1, 128),
    "prefill_s8": (32, math.inf),
}
DEFAULT_RANGE = (16, math.inf)


class Cell(NamedTuple):
    k: int
    n: int
    m: int
    prop: float | None  # None: cuBLAS
    kernel: str


def copies(tensors: tuple[Tensor | None, ...]) -> list[tuple[Tensor | None, ...]]:
    size = sum(t.nbytes for t in tensors if t is not None)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = max(4, min(MAX_COPIES, math.ceil(CACHES * cache / size)))
    return [tuple(None if t is None else t.clone() for t in tensors) for _ in range(count)]


def calls(args: argparse.Namespace) -> Iterator[Cell]:
    """Call each linear with every copy of its weights, and yield the cell of each call."""
    for shape in args.shapes:
        k, n = map(int, shape.split("x"))
        w = torch.randn(n, k, device="cuda")
        x = {m: torch.randn(m, k, device="cuda", dtype=torch.float16) for m in args.tokens}
        weights = copies((w.half(),))
        for m in args.tokens:
            for (weight,) in weights:
                F.linear(x[m], weight)
                yield Cell(k, n, m, None, CUBLAS)
        for prop in args.salient_props:
            perm = torch.randperm(k, device="cuda").int()
            weights = copies(ops.pack_weight(w, perm, int(prop * k), args.group_size))
            for m in args.tokens:
                x_bf16 = x[m].bfloat16()
                for kernel in args.kernels:
                    least, most = TOKEN_RANGES.get(kernel, DEFAULT_RANGE)
                    if not least <= m <= most:
                        continue
                    ops.set_cuda_kernel(kernel)
                    for packed in weights:
                        ops.w4a4_linear(x_bf16, *packed, perm, None, n, args.group_size)
                        yield Cell(k, n, m, prop, kernel)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def is_step(name: str) -> bool:
    """Whether a kernel's name is that of a W4A4 linear's kernel."""
    return "mq::" in name and any(part in name for part in ("quantize_", "decode", "prefill"))


def measure(args: argparse.Namespace) -> dict[Cell, tuple[float, float]]:
    """Median microseconds of the quantizing and the multiplying kernel; (0, time) for cuBLAS."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        called = list(calls(args))
        torch.cuda.synchronize()
    ops.set_cuda_kernel(None)
    kernels = [
        (event.name, event.device_time)
        for event in sorted(profile.events(), key=lambda event: event.time_range.start)
        if event.device_type == torch.autograd.DeviceType.CUDA
        and (
            is_step(event.name)
            or any(part in event.name for part in (*CUBLAS_NAMES, CUBLAS_REDUCTION))
        )
    ]
    times: dict[Cell, list[tuple[float, float]]] = {}
    at = 0
    for cell in called:
        if cell.prop is None:
            first, second = 0.0, kernels[at][1]
            at += 1
            if at < len(kernels) and CUBLAS_REDUCTION in kernels[at][0]:
                second += kernels[at][1]
                at += 1
        else:
            (quantizing, first), (multiplying, second) = kernels[at : at + 2]
            if "quantize_" not in quantizing or "quantize_" in multiplying:
                sys.exit(f"{cell}: unexpected kernels {quantizing}, {multiplying}")
            at += 2
        times.setdefault(cell, []).append((first, second))
    if at != len(kernels):
        sys.exit(f"{len(kernels) - at} kernels in the profile do not belong to any call")
    return {
        cell: tuple(statistics.median(step) for step in zip(*pairs, strict=True))
        for cell, pairs in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "4096x11008", "11008x4096"])
    parser.add_argument(
        "--tokens",
        nargs="+",
        type=int,
        default=[1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096],
    )
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--salient-props", nargs="+", type=float, default=[0.0, 0.05])
    parser.add_argument(
        "--kernels", nargs="+", help="default: all that support the card and the group size"
    )
    args = parser.parse_args()
    if not ops.has_cuda():
        sys.exit(
            "nothing was measured: there is no CUDA card, or MixedQuant was built without CUDA "
            f"(architectures built: {ops.build_info()['cuda_archs'] or 'none'})"
        )
    major, minor = torch.cuda.get_device_capability()
    arch = 10 * major + minor
    supported = [
        row.name
        for row in ops.cuda_kernels()
        if row.oldest <= arch <= (row.newest or arch) and args.group_size % row.group_multiple == 0
    ]
    args.kernels = args.kernels or supported
    if unknown := set(args.kernels) - set(supported):
        parser.error(f"--kernels must be among {', '.join(supported)}; got {', '.join(unknown)}")
    print(f"{card()}; torch {torch.__version__}; g = {args.group_size}; {date.today()}\n")
    print("| KxN | M | kernel | salient | quantizes us | multiplies us |")
    print("|---|---|---|---|---|---|")
    for cell, (first, second) in measure(args).items():
        shape, is_ours = f"{cell.k}x{cell.n}", cell.prop is not None
        steps = f"{cell.prop:g} | {first:.1f}" if is_ours else " | "
        print(f"| {shape} | {cell.m} | {cell.kernel} | {steps} | {second:.1f} |")


if __name__ == "__main__":
    main()
