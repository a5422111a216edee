"""Run a sweep of quantization settings over one model, and the published functions for it.

    python -m run_experiments                        the default preset
    python -m run_experiments --preset paper --model <Hugging Face id or folder>
    python -m run_experiments report                 figures and a page of what is finished

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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    # Run as a file: Python put this folder, not the repository, in front of the path.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


from run_experiments import executors, page, report
from run_experiments.grid import (
    OTHER_METHODS,
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
from run_experiments.identity import (
    DTYPES,
    model_identity,
    package_versions,
    wikitext_identity,
)
from run_experiments.report import plot_results
from run_experiments.rows import stored_rows
from run_experiments.search import Budget, search, space
from run_experiments.store import Store
from run_experiments.worker import Job, unload
from smoothquant.core.progress import progress_bar

OF_MODELS = ("Evaluator", "get_calib_dataset", "get_calib_feat")  # in published.py
__all__ = ["Workers", "find_front", "main", "plot_results", "run_experiments", "sweep", *OF_MODELS]

INTERRUPTED = 130  # what shells report for Ctrl-C


def __getattr__(name: str) -> Any:
    # They need torch, which "nothing to compute" does not wait for.
    if name in OF_MODELS:
        from run_experiments import published

        return getattr(published, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
    import torch

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
        for row in stored_rows(store, plan)
        if row.config is not None
    }
    results: dict[str, dict[float, list[float]]] = {"perplexity": {}, "model_size": {}}
    for share in salient_props:
        line = [found[int(group_size), float(share)] for group_size in group_sizes]
        results["perplexity"][share] = [row.result["perplexity"] for row in line]
        results["model_size"][share] = [row.size_mib for row in line]
    return results, group_sizes


def sweep(
    preset: Preset,
    store: Store,
    *,
    progress: bool = True,
    **workers: Any,
) -> list[Cell]:
    """Compute every cell of a preset that the store does not hold yet.

    Args:
        preset: what to compute.
        store: where results are kept; other sweeps may share it at the same time.
        progress: show progress bars.
        workers: fields of `Workers`.

    Returns:
        all cells of the preset, each of them in the store.

    Raises:
        ValueError, TypeError: a setting is wrong. Settings are checked before the first cell.
        RuntimeError: a worker or the executor failed; finished cells are kept.
    """
    chosen = Workers(**workers)
    plan = _planned(preset)
    found = _found(plan, store)
    if len(found) == len(plan):
        print(f"All {len(plan)} cells are in {store.folder}: nothing to compute.")
        return plan
    waiting = len(plan) - len(found)
    print(f"{len(plan)} cells, {len(found)} of them in {store.folder}, {waiting} to compute.")
    _print_windows(preset)
    try:
        _compute(plan, found, preset, store, chosen, progress)
    finally:
        unload()
    return plan


def find_front(
    preset: Preset,
    store: Store,
    budget: Budget,
    *,
    progress: bool = True,
    **workers: Any,
) -> list[Cell]:
    """Look for the least perplexity at every size among all combinations of a preset's choices.

    Args:
        budget: how many cells to compute, or for how long; what the store holds costs nothing.
        preset, store, progress, workers: as `sweep`.

    Returns:
        all cells of these choices that the store holds by then: `rows.front` picks the front.

    Raises:
        ValueError, TypeError, RuntimeError: as `sweep`; RuntimeError without Optuna, too.
    """
    chosen = Workers(**workers)
    preset = space(preset)
    plan = _planned(preset)
    print(f"{sum(cell.task == 'quantized' for cell in plan)} combinations to choose from.")
    _print_windows(preset)

    def compute(cells: list[Cell]) -> None:
        needs = {need.key: need for cell in cells for need in cell.needs}
        part = [*needs.values(), *cells]
        _compute(part, _found(part, store), preset, store, chosen, progress)

    try:
        tried = {c.key for c in search(plan, store, budget, chosen.at_once, compute)}
    finally:
        unload()
    return [c for c in plan if c.key in tried or (c.task != "quantized" and store.get(c))]


@dataclasses.dataclass(frozen=True)
class Workers:
    """Who computes the cells of a sweep.

    executor: "local", "dask://host:port" or "slurm": where workers run.
    jobs: workers; None for one, or all of a Dask cluster's.
    threads: of torch in each worker; None for all of its machine's, shared out among local workers.
    slurm: parameters of submitit's executor.

    Raises ValueError for an executor or a number of workers that cannot be meant.
    """

    executor: str = executors.LOCAL
    jobs: int | None = None
    threads: int | None = None
    slurm: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        executors.check(self.executor, self.jobs, self.slurm)

    @property
    def in_this_process(self) -> bool:
        return self.executor == executors.LOCAL and self.jobs in (None, 1)

    @property
    def at_once(self) -> int:
        """Cells for a round of a search: several for each worker, which starts anew for it."""
        return 1 if self.in_this_process else 4 * (self.jobs or 1)

    @property
    def threads_each(self) -> int | None:
        if self.threads is None and self.executor == executors.LOCAL and not self.in_this_process:
            has_affinity = hasattr(os, "sched_getaffinity")
            cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
            return max(1, cores // self.jobs)
        return self.threads


def _found(plan: Sequence[Cell], store: Store) -> dict[str, dict[str, Any]]:
    """The results that the store holds, by the cells' keys."""
    results = ((cell.key, store.get(cell)) for cell in plan)
    return {key: result for key, result in results if result is not None}


def _compute(
    plan: Sequence[Cell],
    found: Mapping[str, dict[str, Any]],
    preset: Preset,
    store: Store,
    workers: Workers,
    progress: bool,
) -> None:
    """Have the cells computed that are not found, with a line printed for each."""
    job = Job(
        cells=[cell.to_json() for cell in plan if cell.key not in found],
        # workers may have another working directory
        source=os.path.abspath(preset.model) if os.path.isdir(preset.model) else preset.model,
        output=str(store.folder.resolve()),
        threads=workers.threads_each,
        progress=progress and workers.in_this_process,
    )
    reference = next((found.get(cell.key) for cell in plan if cell.task == "baseline"), None)
    with progress_bar(total=len(plan), initial=len(found), unit="cell", shown=progress) as bar:

        def report_cell(cell: Cell, result: dict[str, Any]) -> None:
            nonlocal reference
            if cell.task == "baseline":
                reference = result
            bar.write(f"  {cell.label:<38} {_outcome(result, reference)}")
            bar.update()

        executors.run(job, report_cell, workers.executor, workers.jobs, workers.slurm)


def _print_windows(preset: Preset) -> None:
    windows = "all" if preset.windows is None else preset.windows
    print(f"Perplexity on {windows} windows of {preset.seqlen:,} tokens of the test split.")


def finished(preset: Preset, store: Store) -> list[Cell]:
    """All cells of a preset whose results are in the store already; nothing is computed.

    Raises:
        ValueError: there are none, or a setting is wrong. TypeError: a setting is wrong.
    """
    plan = _planned(preset)
    held = _found(plan, store)
    found = [cell for cell in plan if cell.key in held]
    if not any(cell.task in ("baseline", "quantized") for cell in found):
        raise ValueError(
            f"output: no result of this sweep is in {store.folder}: run the sweep first"
        )
    print(f"{len(found)} of {len(plan)} cells are in {store.folder}; no others are computed.")
    return found


def _planned(preset: Preset) -> list[Cell]:
    _check(preset)
    return cells(
        preset,
        model=model_identity(preset.model, preset.dtype),
        versions=package_versions(),
        calibration_data=wikitext_identity("validation"),
        evaluation_data=wikitext_identity("test"),
    )


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
    seconds = result["run"].get("cell_seconds", math.nan)
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
        help=f"mixedquant, or simulated: {' '.join(OTHER_METHODS)}",
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
    parser.add_argument("--dtype", choices=DTYPES, help="of what is not quantized")
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
    parser.add_argument(
        "--threads", type=int, metavar="N", help="of each worker (default: all cores, shared out)"
    )
    parser.add_argument(
        "--executor",
        default=executors.LOCAL,
        metavar="E",
        help="where workers run: local, dask://HOST:PORT or slurm (default: local)",
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="workers (default: 1; of Dask, all that it has)"
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="try only some of all combinations of the preset's choices: those that may give the "
        "least perplexity at their size",
    )
    parser.add_argument(
        "--budget",
        type=_budget,
        default=Budget(cells=24),
        metavar="N|Nm",
        help="of a search, in cells or minutes (default: 24)",
    )
    parser.add_argument(
        "--slurm",
        nargs="+",
        type=_field,
        default=[],
        metavar="NAME=VALUE",
        help="submitit's parameters, for example slurm_partition=cpu timeout_min=60",
    )
    args = parser.parse_args(argv)
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads must be at least 1; got {args.threads}")
    return args


def _budget(text: str) -> Budget:
    try:
        return Budget.from_text(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _windows(text: str) -> float | int:
    return math.inf if text == "all" else int(text)


def _field(text: str) -> tuple[str, Any]:
    from smoothquant.core.config import parse_field

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


def _command(argv: Sequence[str], hidden: str | None = None) -> str:
    """The command of these words, without a hidden option and its value."""
    words, skip = ["python", "-m", "run_experiments"], False
    for word in argv:
        if not (skip or word in ("--plot", hidden) or word.startswith(f"{hidden}=")):
            words.append(word)
        skip = word == hidden
    return shlex.join(words)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    from smoothquant.core.errors import CheckpointError

    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["report"]:
        argv[0] = "--plot"
    args = parse_args(argv)
    started = time.perf_counter()
    command = _command(argv)
    recorded = _command(argv, hidden="--output")  # a place on this machine, which changes nothing
    try:
        preset = _chosen_preset(args)
        store = Store(args.output)
        for path in args.cells or []:
            print(f"{store.adopt(path)} cells taken from {path}")
        print(f"Model {preset.model}, preset {args.preset}")
        if args.plot:
            plan = finished(preset, store)
        else:
            workers = {name: getattr(args, name) for name in ("executor", "jobs", "threads")}
            workers["slurm"] = dict(args.slurm)
            if args.search:
                plan = find_front(preset, store, args.budget, **workers)
            else:
                plan = sweep(preset, store, **workers)
        text, paths = report.write(store, plan, preset.model, args.figures, recorded)
        if args.plot:
            paths.append(page.write(store, plan, preset.model, args.figures, recorded))
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
    if args.search:
        print("\nThe front: every other model found is larger or worse than one of these.\n")
        print(report.front_table(store, plan))
    print(f"\n{text}\n\nWritten:", *(f"  {path}" for path in paths), sep="\n")
    print(f"\n{time.perf_counter() - started:.0f} s in all.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
