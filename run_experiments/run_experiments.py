"""Run a sweep of quantization settings over one model, and the published functions for it.

    python -m run_experiments                        the default preset
    python -m run_experiments --preset paper --model <Hugging Face id or folder>

Every finished cell is kept; the same command again continues where the last one stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:
    # Run as a file: Python put this folder, not the repository, in front of the path.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor, nn
from tqdm import tqdm

from run_experiments import peers, report, runner
from run_experiments.grid import (
    PRESETS,
    PUBLISHED_GROUP_SIZES,
    PUBLISHED_SALIENT_PROPS,
    Cell,
    Preset,
    Product,
    cells,
    configs,
    override,
)
from run_experiments.report import plot_results
from run_experiments.store import Store
from smoothquant import ppl_eval
from smoothquant.bundled import wikitext
from smoothquant.config import parse_field
from smoothquant.errors import CheckpointError

__all__ = [
    "Evaluator",
    "get_calib_dataset",
    "get_calib_feat",
    "main",
    "plot_results",
    "run_experiments",
    "sweep",
]

INTERRUPTED = 130  # what shells report for Ctrl-C


def get_calib_dataset(
    tokenizer: Any = None, n_samples: int = 256, block_size: int = 512
) -> list[Tensor]:
    """Token blocks of WikiText-2 validation, as published: shuffled lines, joined and cut.

    Args:
        tokenizer: a transformers tokenizer.
        n_samples: lines to take; empty ones and those longer than block_size are passed over.
        block_size: tokens per block.

    Returns:
        list of int64 [1, block_size]; the incomplete last block is dropped.

    Raises:
        ValueError: no tokenizer, or a count below 1.
    """
    if tokenizer is None:
        raise ValueError("tokenizer must be a transformers tokenizer; got None")
    for name, value in (("n_samples", n_samples), ("block_size", block_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value!r}")
    import numpy

    rows = wikitext("validation")
    token_ids: list[int] = []
    taken = 0
    # The generator and seed by which the published code's dataset library shuffles.
    for index in numpy.random.default_rng(42).permutation(len(rows)):
        line = tokenizer.encode(rows[index].strip())
        if not line or len(line) > block_size:
            continue
        token_ids += line
        taken += 1
        if taken == n_samples:
            break
    count = len(token_ids) // block_size
    print(f" * Split into {count} blocks")
    ids = torch.tensor(token_ids[: count * block_size], dtype=torch.int64)
    return list(ids.view(count, 1, block_size))


@torch.no_grad()
def get_calib_feat(model: nn.Module, tokenizer: Any) -> dict[str, list[Tensor]]:
    """Mean absolute input per channel of every nn.Linear, as published.

    `smoothquant.calibration.collect_stats` gives more (what sorting by rms, max or mean + 3 STD
    needs) in less time.

    Returns:
        name of the linear -> one float32 [K] tensor on the CPU per block of `get_calib_dataset`.
    """
    features: dict[str, list[Tensor]] = {}

    def record(name: str):
        def hook(module: nn.Module, args: tuple) -> None:
            x = args[0].detach()
            mean = x.reshape(-1, x.shape[-1]).float().abs().mean(dim=0)
            features.setdefault(name, []).append(mean.cpu())

        return hook

    handles = [
        module.register_forward_pre_hook(record(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    device = next(model.parameters()).device
    try:
        for block in tqdm(get_calib_dataset(tokenizer), desc="calibrating", unit="block"):
            model(block.to(device))
    finally:
        for handle in handles:
            handle.remove()
    return features


class Evaluator(ppl_eval.Evaluator):
    """Perplexity on the first `n_samples` windows of `batch_size` tokens, as published.

    Args:
        dataset: mapping with the texts under "text", a list of texts, or a path.
        tokenizer: a transformers tokenizer.
        device: where the tokens are put.
        n_samples: windows; None for all.
        batch_size: tokens per window (the published name).
    """

    def __init__(
        self,
        dataset: Any,
        tokenizer: Any,
        device: str | torch.device,
        n_samples: int | None = 10,
        batch_size: int = 2048,
    ) -> None:
        super().__init__(dataset, tokenizer, device, n_samples, seq_len=batch_size)
        self.batch_size = batch_size


def run_experiments(
    model_name: str,
    group_sizes: Sequence[int] = PUBLISHED_GROUP_SIZES,
    salient_props: Sequence[float] = PUBLISHED_SALIENT_PROPS,
    device: str = "cpu",
    *,
    preset: str = "paper",
    output: str | os.PathLike = "results",
) -> tuple[dict[str, dict[float, list[float]]], Sequence[int]]:
    """Perplexity and size for each group size and salient share; finished cells are not redone.

    Args:
        model_name: a bundled name ("smollm2-135m", "tiny-opt"), a folder or a Hugging Face id.
        group_sizes: integers >= 1.
        salient_props: shares of channels kept in 16 bits, in [0, 1].
        device: "cpu", where the INT4 kernels run.
        preset: the row of `grid.PRESETS` that gives sort, windows and calibration.
        output: folder of the store.

    Returns:
        ({"perplexity": {share: [one per group size]}, "model_size": {share: [MiB]}}, group_sizes);
        a perplexity that is not finite is None.

    Raises:
        ValueError, TypeError: an argument is wrong; nothing was computed yet.
    """
    if torch.device(device).type != "cpu":
        raise ValueError(f"device must be 'cpu', where the INT4 kernels run; got {device!r}")
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {preset!r}")
    product = PRESETS[preset].products[0]
    products = (
        Product(tuple(group_sizes), tuple(salient_props), product.sorts[:1], product.backends[:1]),
    )
    chosen = dataclasses.replace(PRESETS[preset], model=str(model_name), products=products)
    store = Store(output)
    plan = sweep(chosen, store)
    found = {
        (row.config["group_size"], row.config["salient_prop"]): row
        for row in report.stored_rows(store, plan)
        if row.config is not None
    }
    results: dict[str, dict[float, list[float]]] = {"perplexity": {}, "model_size": {}}
    for share in salient_props:
        line = [found[int(group_size), float(share)] for group_size in group_sizes]
        results["perplexity"][share] = [row.result["perplexity"] for row in line]
        results["model_size"][share] = [row.size_mib for row in line]
    return results, group_sizes


def sweep(preset: Preset, store: Store, *, progress: bool = True) -> list[Cell]:
    """Compute every cell of a preset that the store does not hold yet.

    Returns:
        all cells of the preset, each of them in the store.

    Raises:
        ValueError, TypeError: a setting is wrong. Settings are checked before the first cell.
    """
    bench, plan = _planned(preset, store, progress)
    waiting = [cell for cell in plan if store.get(cell) is None]
    done = len(plan) - len(waiting)
    if not waiting:
        print(f"All {len(plan)} cells are in {store.folder}: nothing to compute.")
        return plan
    # What the texts or the model cannot give is found before any work is done.
    model, _ = bench.loaded()
    runner.check_seqlen(model, preset.calibration_block_size)
    if any("method" in (cell.config or {}) for cell in waiting):
        peers.check_model(model)
    windows = [bench.evaluator(c.evaluation).num_windows for c in plan if c.evaluation][0]
    print(f"{len(plan)} cells, {done} of them in {store.folder}, {len(waiting)} to compute.")
    print(f"Perplexity on {windows} windows of {preset.seqlen:,} tokens of the test split.")
    reference = next(
        (store.get(c) for c in plan if c.task == "baseline" and c not in waiting), None
    )
    with tqdm(total=len(plan), initial=done, unit="cell", disable=not progress) as bar:
        for cell in waiting:
            bar.set_description(cell.label)
            result = runner.run_cell(cell, bench)
            store.put(cell, result)
            if cell.task == "baseline":
                reference = result
            bar.write(f"  {cell.label:<38} {_outcome(result, reference)}")
            bar.update()
        bar.set_description("done")
    return plan


def finished(preset: Preset, store: Store) -> list[Cell]:
    """All cells of a preset whose results are in the store already; nothing is computed.

    Raises:
        ValueError: there are none, or a setting is wrong. TypeError: a setting is wrong.
    """
    _, plan = _planned(preset, store, False)
    found = [cell for cell in plan if store.get(cell) is not None]
    if not any(cell.task in ("baseline", "quantized") for cell in found):
        raise ValueError(
            f"output: no result of this sweep is in {store.folder}: run the sweep first"
        )
    print(f"{len(found)} of {len(plan)} cells are in {store.folder}; no others are computed.")
    return found


def _planned(preset: Preset, store: Store, progress: bool) -> tuple[runner.Bench, list[Cell]]:
    """What computes a preset's cells, and the cells."""
    _check(preset)
    bench = runner.Bench(preset.model, preset.dtype, store, progress=progress)
    plan = cells(
        preset,
        model=bench.identity(),
        versions=runner.package_versions(),
        calibration_data=runner.wikitext_identity("validation"),
        evaluation_data=runner.wikitext_identity("test"),
    )
    return bench, plan


def _check(preset: Preset) -> None:
    configs(preset.products)
    least = {"seqlen": 2, "calibration_blocks": 1, "calibration_block_size": 1, "gptq_blocks": 1}
    for name, low in (least | {"layer_windows": 0}).items():
        value = getattr(preset, name)
        if value < low:
            raise ValueError(f"{name} must be at least {low}; got {value}")
    if preset.windows is not None and preset.windows < 1:
        raise ValueError(f"windows must be at least 1 or all; got {preset.windows}")


def _outcome(result: dict[str, Any], reference: dict[str, Any] | None) -> str:
    seconds = result["run"]["cell_seconds"]
    if "perplexity" not in result:
        return f"{result['tokens']:,} tokens{seconds:>20.1f} s"
    perplexity = result["perplexity"]
    if perplexity is None:
        return f"PPL not finite{seconds:>20.1f} s"
    delta = ""
    if reference and result is not reference and reference["perplexity"]:
        delta = f"({perplexity - reference['perplexity']:+,.2f})"
    kl = "" if result.get("kl") is None else f"KL {result['kl']:.3f}"
    return f"PPL {perplexity:>10,.2f} {delta:>12} {kl:>9} {seconds:>6.1f} s"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; wrong values end the program with a message that names the flag."""
    presets = "\n".join(f"  {name:<8} {preset.about}" for name, preset in PRESETS.items())
    parser = argparse.ArgumentParser(
        prog="python -m run_experiments",
        description=__doc__.replace("\n\n\n", "\n\n"),
        epilog=f"presets:\n{presets}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=PRESETS, default="default", help="see below")
    parser.add_argument(
        "--model", help="smollm2-135m, tiny-opt, a folder with a model or a Hugging Face id"
    )
    parser.add_argument("--group-sizes", nargs="+", type=int, metavar="G")
    parser.add_argument(
        "--salient-props", nargs="+", type=float, metavar="P", help="shares in 0 ... 1"
    )
    parser.add_argument("--sorts", nargs="+", metavar="S", help="none max mean3std argmax rms")
    parser.add_argument("--backends", nargs="+", metavar="B", help="int4 fake")
    parser.add_argument("--recipes", nargs="+", metavar="R", help="rtn fast best")
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="M",
        help=f"mixedquant, or simulated: {' '.join(peers.METHODS)}",
    )
    parser.add_argument(
        "--set",
        dest="fields",
        nargs="+",
        type=_field,
        metavar="FIELD=VALUE",
        help="other fields of MixedQuantConfig, for example act_clip=0.9",
    )
    parser.add_argument("--windows", type=_windows, metavar="N", help="test windows, or all")
    parser.add_argument("--seqlen", type=int, metavar="T", help="tokens per window")
    parser.add_argument(
        "--calibration-blocks", type=int, metavar="N", help="token blocks for statistics"
    )
    parser.add_argument("--gptq-blocks", type=int, metavar="N", help="the same for what needs GPTQ")
    parser.add_argument("--seed", type=int, metavar="N", help="of the draw of these blocks")
    parser.add_argument(
        "--layers",
        dest="layer_windows",
        type=int,
        metavar="N",
        help="also the errors of each layer, over N windows",
    )
    parser.add_argument("--dtype", choices=runner.DTYPES, help="of what is not quantized")
    parser.add_argument(
        "--output", default="results", metavar="FOLDER", help="finished cells (default: results)"
    )
    parser.add_argument(
        "--cells",
        nargs="+",
        metavar="FILE",
        help="take finished cells from what earlier runs published: figures/*_cells.jsonl",
    )
    parser.add_argument("--figures", default="figures", metavar="FOLDER", help="default: figures")
    # what `smoothquant plot` adds: draw the finished cells, compute none
    parser.add_argument("--plot", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, metavar="N", help="default: all cores")
    args = parser.parse_args(argv)
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads must be at least 1; got {args.threads}")
    return args


def _windows(text: str) -> float | int:
    return math.inf if text == "all" else int(text)


def _field(text: str) -> tuple[str, Any]:
    try:
        return parse_field(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _chosen_preset(args: argparse.Namespace) -> Preset:
    products = {
        name: tuple(values)
        for name in (f.name for f in dataclasses.fields(Product))
        if (values := getattr(args, name)) is not None
    }
    fields = {
        name: value
        for name in (f.name for f in dataclasses.fields(Preset) if hasattr(args, f.name))
        if (value := getattr(args, name)) is not None
    }
    if fields.get("windows") == math.inf:
        fields["windows"] = None
    return override(PRESETS[args.preset], products, **fields)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    started = time.perf_counter()
    made_by = [word for word in argv if word != "--plot"]
    command = shlex.join(["python", "-m", "run_experiments", *made_by])
    try:
        preset = _chosen_preset(args)
        store = Store(args.output)
        for path in args.cells or []:
            print(f"{store.adopt(path)} cells taken from {path}")
        print(f"Model {preset.model}, {torch.get_num_threads()} threads, preset {args.preset}")
        plan = finished(preset, store) if args.plot else sweep(preset, store)
        text, paths = report.write(store, plan, preset.model, args.figures, command)
    except KeyboardInterrupt:
        print(
            f"\nStopped. Finished cells are kept in {args.output}; continue with\n  {command}",
            file=sys.stderr,
        )
        return INTERRUPTED
    except (ValueError, TypeError, RuntimeError, CheckpointError) as error:
        if os.environ.get("MIXEDQUANT_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"\n{text}\n\nWritten:", *(f"  {path}" for path in paths), sep="\n")
    print(f"\n{time.perf_counter() - started:.0f} s in all.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
