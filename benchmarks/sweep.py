"""Overhead of a sweep's cell beyond its work, which is quantizing and evaluating the model.

    python benchmarks/sweep.py --model smollm2-135m

Runs a few cells in this process, as a worker does, with the model loaded. Work is
`runner.quantized_model` (including the copy of the modules and the simulation of layers) and
`Evaluator.token_comparison`. Overhead is everything else: looking up and claiming the cell, the
16-bit model's logits, the size by counting and (for packed integers) by saving, and writing the
result. Reports wall time and CPU time; other programs affect CPU time less.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from run_experiments import grid, runner, worker
from run_experiments.grid import Product
from run_experiments.identity import model_identity, package_versions, wikitext_identity
from smoothquant.cli.doctor import chip_name
from smoothquant.evaluation.perplexity import Evaluator

CLOCKS = (time.perf_counter, time.process_time)


class Watch:
    """Measures time by both clocks since the last `lap`, inside and outside of watched calls."""

    def __init__(self) -> None:
        self.inside = [0.0, 0.0]
        self.started = [clock() for clock in CLOCKS]

    def watch(self, owner: Any, name: str) -> None:
        """From now on, count calls of `owner.name` as work."""
        original: Callable = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            before = [clock() for clock in CLOCKS]
            result = original(*args, **kwargs)
            spent = [clock() - start for clock, start in zip(CLOCKS, before, strict=True)]
            self.inside = [sum(pair) for pair in zip(self.inside, spent, strict=True)]
            return result

        setattr(owner, name, counted)

    def lap(self) -> list[tuple[float, float]]:
        """(seconds inside, seconds outside) for each clock."""
        now = [clock() for clock in CLOCKS]
        pairs = zip(now, self.started, self.inside, strict=True)
        result = [(inside, end - start - inside) for end, start, inside in pairs]
        self.inside, self.started = [0.0, 0.0], now
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-opt")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    products = (Product((32, 64, 128, 256), (0.05,), ("max",), ("int4", "fake")),)
    sizes = {"windows": 1, "seqlen": 512, "calibration_blocks": 2, "calibration_block_size": 512}
    preset = replace(grid.PRESETS["tiny"], model=args.model, products=products, **sizes)
    cells = grid.cells(
        preset,
        model=model_identity(args.model, "float32"),
        versions=package_versions(),
        calibration_data=wikitext_identity("validation"),
        evaluation_data=wikitext_identity("test"),
    )
    watch = Watch()
    watch.watch(runner, "quantized_model")
    watch.watch(Evaluator, "token_comparison")
    laps_by_backend: dict[str, list[list[tuple[float, float]]]] = {}

    def report(cell: grid.Cell, _: Any) -> None:
        lap = watch.lap()
        if cell.config:
            laps_by_backend.setdefault(cell.config["backend"], []).append(lap)

    with tempfile.TemporaryDirectory() as folder:
        job = worker.Job([cell.to_json() for cell in cells], args.model, folder)
        worker.work(job.to_json(), report)
    print(f"\n{chip_name()}, {args.threads} threads, {args.model}; median seconds per cell\n")
    print(f"{'backend':<8}{'work':>9}{'overhead':>10}{'work, CPU':>12}{'overhead, CPU':>15}")
    for backend, laps in laps_by_backend.items():
        wall, cpu = ([statistics.median(part) for part in zip(*lap, strict=True)]
                     for lap in zip(*laps, strict=True))  # fmt: skip
        print(f"{backend:<8}{wall[0]:>9.3f}{wall[1]:>10.3f}{cpu[0]:>12.3f}{cpu[1]:>15.3f}")


if __name__ == "__main__":
    main()
