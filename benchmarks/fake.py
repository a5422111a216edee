"""Speed of the simulation ("fake" backend) against the published code's formulas, for whole cells.

    python benchmarks/fake.py --model smollm2-135m --windows 1

The published code loads and calibrates the model again for every cell, quantizes weights and
activations group by group, and sorts the activations in every call. This script re-implements its
formulas in plain torch. Both sides take turns, and the best of --rounds counts. Times are CPU
seconds, which other programs affect little.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from run_experiments import grid, runner
from run_experiments.grid import Product
from run_experiments.identity import model_identity, package_versions, wikitext_identity
from run_experiments.store import Store
from smoothquant.bundled import load_model
from smoothquant.calibration.collect import collect_stats
from smoothquant.cli.doctor import chip_name
from smoothquant.models.modules import replace_module

PARTS = ("load", "calibrate", "quantize", "evaluate")


def published_group_absmax_sort(t: Tensor, n_bits: int, group_size: int) -> Tensor:
    """Quantize and dequantize t [..., K] group by group, with channels sorted by largest magnitude.

    The result has the channels in their original order.
    """
    rows = t.reshape(-1, t.shape[-1])
    order = torch.argsort(rows.abs().max(dim=0).values)
    rows = rows[:, order]
    for start in range(0, rows.shape[1], group_size):
        block = rows[:, start : start + group_size]
        scales = block.abs().max(dim=-1, keepdim=True)[0]
        scales.clamp_(min=1e-5).div_(2 ** (n_bits - 1) - 1)
        block.div_(scales).round_().mul_(scales)
    unsorted = torch.empty_like(rows)
    unsorted[:, order] = rows
    return unsorted.reshape(t.shape)


class PublishedLinear(nn.Module):
    """A linear layer that quantizes its input in every call, except for the salient channels."""

    def __init__(self, linear: nn.Linear, importance: Tensor, share: float, group_size: int):
        super().__init__()
        count = int(linear.in_features * share)
        is_salient = torch.zeros(linear.in_features, dtype=torch.bool)
        is_salient[importance.topk(count).indices] = True
        self.group_size, self.bias = group_size, linear.bias
        self.rest = (~is_salient).nonzero().flatten()
        self.weight = linear.weight.clone()
        self.weight[:, self.rest] = self._rounded(self.weight)

    def _rounded(self, t: Tensor) -> Tensor:
        return published_group_absmax_sort(t[..., self.rest], 4, self.group_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[..., self.rest] = self._rounded(x)
        return F.linear(x, self.weight, self.bias)


def timed(seconds: dict[str, float], part: str, function: Callable) -> Any:
    """Call a function and store its CPU seconds in seconds[part]."""
    started = time.process_time()
    result = function()
    seconds[part] = time.process_time() - started
    return result


@torch.no_grad()
def published_cell(source: str, cell: grid.Cell, bench: runner.Bench) -> dict[str, float]:
    """Seconds for each part of a cell by the published formulas."""
    seconds: dict[str, float] = {}
    model, _ = timed(seconds, "load", lambda: load_model(source))
    blocks, config = bench.blocks(cell.calibration), cell.config
    stats = timed(seconds, "calibrate", lambda: collect_stats(model, blocks, progress=False))

    def swap() -> None:
        for name, entry in stats.items():
            linear = model.get_submodule(name)
            mean = entry.abs_sum / entry.count
            share, group_size = config["salient_prop"], config["group_size"]
            replace_module(model, name, PublishedLinear(linear, mean, share, group_size))

    timed(seconds, "quantize", swap)
    timed(seconds, "evaluate", lambda: bench.evaluator(cell.evaluation).evaluate(model))
    return seconds


def worker_cell(cell: grid.Cell, bench: runner.Bench) -> dict[str, float]:
    """Seconds for each part of a cell as a worker of a sweep computes it."""
    seconds = {"load": 0.0, "calibrate": 0.0}
    model, *_ = timed(seconds, "quantize", lambda: runner.quantized_model(cell, bench))
    timed(seconds, "evaluate", lambda: bench.evaluator(cell.evaluation).evaluate(model))
    return seconds


def measure(source: str, group_sizes: list[int], rounds: int, **sizes: int) -> list[dict]:
    """A row per group size: seconds of each part by the published formulas and by a worker."""
    products = (Product(tuple(group_sizes), (0.05,), ("max",), ("fake",)),)
    preset = replace(grid.PRESETS["tiny"], model=source, products=products, **sizes)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        bench = runner.Bench(source, "float32", store, progress=False)
        plan = grid.cells(
            preset,
            model=model_identity(source, "float32"),
            versions=package_versions(),
            calibration_data=wikitext_identity("validation"),
            evaluation_data=wikitext_identity("test"),
        )
        store.put(plan[0], runner.run_cell(plan[0], bench))
        rows = []
        for cell in plan[2:]:
            worker_cell(cell, bench)  # makes what all cells share
            tried: dict[str, list] = {"published": [], "worker": []}
            for _ in range(rounds):
                tried["published"].append(published_cell(source, cell, bench))
                tried["worker"].append(worker_cell(cell, bench))
            best = {
                side: {part: min(times[part] for times in rounds_) for part in PARTS}
                for side, rounds_ in tried.items()
            }
            rows.append({"group_size": cell.config["group_size"], **best})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-opt")
    parser.add_argument("--group-sizes", nargs="+", type=int, default=[4, 16, 128])
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--calibration-blocks", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print the seconds as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = measure(
        args.model,
        args.group_sizes,
        args.rounds,
        windows=args.windows,
        seqlen=args.seqlen,
        calibration_blocks=args.calibration_blocks,
        calibration_block_size=args.seqlen,
    )
    if args.json:
        print(json.dumps(rows))
        return
    print(f"{chip_name()}, {args.threads} threads, {args.model}; published / worker, CPU seconds\n")
    print(f"{'group':>5}", *(f"{part:>17}" for part in PARTS), f"{'cell':>17} ratio")
    for row in rows:
        sides = [row["published"], row["worker"]]
        sums = [sum(side.values()) for side in sides]
        pairs = [[side[part] for side in sides] for part in PARTS] + [sums]
        cells = (f"{a:>8.3f}/{b:>8.3f}" for a, b in pairs)
        print(f"{row['group_size']:>5}", *cells, f"{sums[0] / sums[1]:.1f}x")


if __name__ == "__main__":
    main()
