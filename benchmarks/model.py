"""Speed of a whole model in transformers' `generate`, and time and memory for packing it.

    python benchmarks/model.py [--model smollm2-135m] [--threads 1 2] [--prompt 512] [--profile]

The contenders are the model in fp32, in bf16, and as W4A4 with the rest in fp32 or bf16. They take
turns, and the script reports medians. A streamer takes the times: prefill ends with the first new
token; decode is the greedy tokens after it, one at a time. Packing runs `quantize` with existing
statistics; its memory is the peak of the process above its level before. Benchmarks need a quiet
machine.
"""

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import date
from pathlib import Path

import torch
import transformers
from linear import chip

from smoothquant import MixedQuantConfig, collect_stats, quantize
from smoothquant.bundled import load_model, wikitext
from smoothquant.calibration.tokens import token_blocks
from smoothquant.channels.statistics import ChannelStats
from smoothquant.evaluation.speed import generate_times
from smoothquant.kernels import ops
from smoothquant.layers.linear import QuantizedLinear
from smoothquant.models.modules import module_copy


def memory_bytes(field: str) -> int:
    """Resident memory of this process: VmRSS, or VmHWM for its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def peak_of(work: Callable[[], object]) -> tuple[float, int]:
    """(seconds that work() takes, peak bytes above the level before)."""
    with suppress(OSError):  # on kernels without it, the peak since the process started
        Path("/proc/self/clear_refs").write_text("5")
    before, start = memory_bytes("VmRSS"), time.perf_counter()
    work()
    return time.perf_counter() - start, memory_bytes("VmHWM") - before


def packing(
    model: torch.nn.Module,
    config: MixedQuantConfig,
    stats: Mapping[str, ChannelStats],
    threads: int,
) -> tuple[torch.nn.Module, dict]:
    """(a quantized copy of the model, its row in the table)."""
    torch.set_num_threads(threads)
    packed = module_copy(model)  # shares all tensors, so the float ones stay in memory
    seconds, peak = peak_of(lambda: quantize(packed, config, stats, progress=False))
    linears = [m for m in packed.modules() if isinstance(m, QuantizedLinear)]
    packed_bytes = sum(b.nbytes for m in linears for b in m.buffers())
    weights = sum(m.in_features * m.out_features for m in linears)
    row = {
        "threads": threads,
        "weights": weights,
        "seconds": seconds,
        "packed_bytes": packed_bytes,
        "largest_float_bytes": max(4 * m.in_features * m.out_features for m in linears),
        "peak_above_packed_bytes": peak - packed_bytes,
    }
    return packed, row


def profile(model: torch.nn.Module, prompt: torch.Tensor, new: int) -> list[dict]:
    """Shares of time by operator, for a prefill and for decoding `new` tokens."""
    rows = []
    for phase, tokens in (("prefill", 1), ("decode", new)):
        inputs = prompt if phase == "prefill" else prompt[:, :1]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as result:
            generate_times(model, inputs, max(2, tokens))
        events = sorted(result.key_averages(), key=lambda e: -e.self_cpu_time_total)
        total = sum(event.self_cpu_time_total for event in events)
        for event in events[:10]:
            share, calls = event.self_cpu_time_total / total, event.count
            rows.append({"phase": phase, "operator": event.key, "share": share, "calls": calls})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="bundled name, folder or id")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, os.cpu_count()])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate")
    parser.add_argument("--turns", type=int, default=5, help="turns of each contender")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--salient-prop", type=float, default=0.05)
    parser.add_argument("--recipe", default="rtn", choices=["rtn", "fast"])
    parser.add_argument(
        "--compile", action="store_true", help="also measure each model with torch.compile"
    )
    parser.add_argument(
        "--profile", action="store_true", help="show where the W4A4 model spends its time"
    )
    parser.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()

    model, tokenizer = load_model(args.model, dtype=torch.float32)
    config = MixedQuantConfig(
        recipe=args.recipe, group_size=args.group_size, salient_prop=args.salient_prop
    )
    blocks = token_blocks(wikitext("validation"), tokenizer, 4, 512)
    stats = collect_stats(model, blocks, progress=False)
    prompt = token_blocks(wikitext("test"), tokenizer, 1, args.prompt)[0]

    print(f"{chip()}; {ops.isa()}; torch {torch.__version__}; {date.today()}")
    print("\n| threads | million weights | packing, s | packed, MiB | peak above packed, MiB |")
    print("|---|---|---|---|---|")
    packs = []
    for threads in args.threads:
        packed, row = packing(model, config, stats, threads)
        packs.append(row)
        print(
            f"| {threads} | {row['weights'] / 1e6:.1f} | {row['seconds']:.2f} "
            f"| {row['packed_bytes'] / 2**20:.1f} | {row['peak_above_packed_bytes'] / 2**20:.1f} |",
            flush=True,
        )

    name = f"W4A4 g{args.group_size} p{args.salient_prop:g}"
    contenders = {
        "fp32": model,
        "bf16": copy.deepcopy(model).to(torch.bfloat16),
        f"{name}, rest fp32": packed,
        f"{name}, rest bf16": copy.deepcopy(packed).to(torch.bfloat16),
    }
    if args.compile:
        for key, contender in list(contenders.items()):
            compiled = module_copy(contender)
            compiled.forward = torch.compile(compiled.forward, dynamic=True)
            contenders[f"{key}, compiled"] = compiled
    print("\n| threads | contender | prefill, tokens/s | x fp32 | decode, tokens/s | x fp32 |")
    print("|---|---|---|---|---|---|")
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        times: dict[str, list[tuple[float, float]]] = {key: [] for key in contenders}
        for turn in range(-1, args.turns):  # the first turn is a warm-up
            for key, contender in contenders.items():
                took = generate_times(contender, prompt, args.new if turn >= 0 else 4)
                if turn >= 0:
                    times[key].append(took)
        medians = {
            key: [statistics.median(t) for t in zip(*took, strict=True)]
            for key, took in times.items()
        }
        for key, (prefill, decode) in medians.items():
            row = {
                "threads": threads,
                "contender": key,
                "prefill_tokens_per_second": args.prompt / prefill,
                "prefill_ratio": medians["fp32"][0] / prefill,
                "decode_tokens_per_second": 1 / decode,
                "decode_ratio": medians["fp32"][1] / decode,
            }
            rows.append(row)
            print(
                f"| {threads} | {key} | {row['prefill_tokens_per_second']:.0f} "
                f"| {row['prefill_ratio']:.2f} | {row['decode_tokens_per_second']:.1f} "
                f"| {row['decode_ratio']:.2f} |",
                flush=True,
            )
    profiles = []
    if args.profile:
        torch.set_num_threads(args.threads[0])
        profiles = profile(packed, prompt, args.new)
        print(f"\n| phase | operator, {args.threads[0]} threads | share of time | calls |")
        print("|---|---|---|---|")
        for row in profiles:
            print("| {phase} | {operator} | {share:.1%} | {calls} |".format(**row))
    if args.json:
        record = {"chip": chip(), "isa": ops.isa(), "torch": torch.__version__}
        record |= {"transformers": transformers.__version__, "date": str(date.today())}
        with open(args.json, "w") as file:
            record |= {"arguments": vars(args), "packing": packs, "rows": rows}
            json.dump(record | {"profile": profiles}, file, indent=1)


if __name__ == "__main__":
    main()
