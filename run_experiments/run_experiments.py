"""Run a sweep: evaluate one model under many quantization settings.

    python -m run_experiments                        run the default preset
    python -m run_experiments --preset paper --model <Hugging Face id or folder>
    python -m run_experiments report                 redraw the figures and write an HTML page

Each setting is a cell. Finished cells are kept: run the same command again to resume a sweep.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

if not __package__:
    # Run as a file: Python put this folder, not the repository, first on the path.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


from run_experiments import executors, kept, page, report
from run_experiments.escaping import file_stem, for_shell
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
from run_experiments.worker import Job, kept_model, unload
from smoothquant.cli.console import prepare_streams
from smoothquant.core.config import parse_field
from smoothquant.core.messages import REPORTED_ERRORS, one_line, option_words, shortened
from smoothquant.core.progress import progress_bar

TORCH_NAMES = ("Evaluator", "get_calib_dataset", "get_calib_feat")  # in published.py
__all__ = [
    "Workers",
    "find_front",
    "main",
    "plot_results",
    "run_experiments",
    "sweep",
    *TORCH_NAMES,
]

INTERRUPTED = 130  # the status that shells report after Ctrl-C

Results = dict[str, dict[float, list[float | None]]]


def __getattr__(name: str) -> Any:
    # published.py imports torch: `--help` and a finished sweep must not wait for that.
    if name in TORCH_NAMES:
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
) -> tuple[Results, Sequence[int]]:
    """Measure perplexity and size for every group size and salient share.

    Results that the store already has are not computed again.

    Args:
        model_name: a bundled name ("smollm2-135m", "tiny-opt"), a folder or a Hugging Face id.
        group_sizes: integers >= 1.
        salient_props: shares of channels kept in 16 bits, in [0, 1].
        device: must be "cpu": a sweep runs the CPU's INT4 kernels.
        preset: name in `grid.PRESETS` that supplies the sort key, windows and calibration.
        output: folder of the store.

    Returns:
        ({"perplexity": {share: [one per group size]}, "model_size": {share: [MiB]}}, group_sizes).
        A perplexity that is not finite is None.

    Raises:
        ValueError, TypeError: an argument is invalid; nothing has been computed.
    """
    import torch

    if torch.device(device).type != "cpu":
        raise ValueError(f"device must be 'cpu': sweeps run the CPU kernels; got {device!r}")
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {preset!r}")
    product = PRESETS[preset].products[0]
    products = (
        Product(tuple(group_sizes), tuple(salient_props), product.sorts[:1], product.backends[:1]),
    )
    chosen = dataclasses.replace(PRESETS[preset], model=str(model_name), products=products)
    store = Store(output)
    plan = sweep(chosen, store)
    rows = {
        (row.config["group_size"], row.config["salient_prop"]): row
        for row in stored_rows(store, plan)
        if row.config is not None
    }
    results: Results = {"perplexity": {}, "model_size": {}}
    for share in salient_props:
        line = [rows[int(group_size), float(share)] for group_size in group_sizes]
        results["perplexity"][share] = [row.result["perplexity"] for row in line]
        results["model_size"][share] = [row.size_mib for row in line]
    return results, group_sizes


def sweep(
    preset: Preset,
    store: Store,
    *,
    keep: Path | None = None,
    progress: bool = True,
    **workers: Any,
) -> list[Cell]:
    """Compute every cell of a preset that is missing from the store.

    Args:
        preset: what to compute.
        store: where results are kept. Several sweeps may use it at the same time.
        keep: folder for the model with the lowest perplexity.
        progress: show progress bars.
        workers: fields of `Workers`.

    Returns:
        All cells of the preset. All of them are now in the store.

    Raises:
        ValueError, TypeError: a setting is invalid. Settings are checked before the first cell.
        RuntimeError: a worker or the executor failed; finished cells are kept.
    """
    chosen = Workers(**workers)
    plan = _planned(preset)
    stored = _stored_results(plan, store)
    missing = len(plan) - len(stored)
    if keep is not None:
        from smoothquant.checkpoints.folder import check_target

        check_target(keep, overwrite=kept.is_kept(keep))  # now, not after the sweep
    try:
        if missing:
            print(
                f"{len(plan)} cells: {len(stored)} already in {store.folder}, {missing} to compute."
            )
            _print_windows(preset)
            _compute(plan, stored, preset, store, chosen, progress, keep=keep is not None)
        else:
            print(f"All {len(plan)} cells are in {store.folder}: nothing to compute.")
        if keep is not None:
            _keep_best(plan, preset, store, keep, chosen, progress)
    finally:
        unload()
    return plan


def _keep_best(
    plan: Sequence[Cell],
    preset: Preset,
    store: Store,
    folder: Path,
    workers: Workers,
    progress: bool,
) -> None:
    row = kept.best_row(stored_rows(store, plan))
    if row is None:
        return

    def tokenizer() -> Any:
        from smoothquant.bundled import load_model

        return load_model(preset.model)[1]

    job = _job([], preset, store, workers, progress=progress)
    kept.keep(row, folder, lambda cell: kept_model(cell, job), tokenizer)


def find_front(
    preset: Preset,
    store: Store,
    budget: Budget,
    *,
    progress: bool = True,
    **workers: Any,
) -> list[Cell]:
    """Search all combinations of a preset's choices for the lowest perplexity at every size.

    Args:
        budget: how many cells to compute, or for how long. Stored results are free.
        preset, store, progress, workers: as in `sweep`.

    Returns:
        All cells in this space that are now in the store; `rows.front` picks the Pareto front.

    Raises:
        ValueError, TypeError, RuntimeError: as in `sweep`. RuntimeError also if Optuna is missing.
    """
    chosen = Workers(**workers)
    preset = space(preset)
    plan = _planned(preset)
    print(f"{sum(cell.task == 'quantized' for cell in plan)} combinations to choose from.")
    _print_windows(preset)

    def compute(cells: list[Cell]) -> None:
        needs = {need.key: need for cell in cells for need in cell.needs}
        part = [*needs.values(), *cells]
        _compute(part, _stored_results(part, store), preset, store, chosen, progress)

    try:
        tried = {c.key for c in search(plan, store, budget, chosen.at_once, compute)}
    finally:
        unload()
    return [c for c in plan if c.key in tried or (c.task != "quantized" and store.get(c))]


@dataclasses.dataclass(frozen=True)
class Workers:
    """Where a sweep runs, and on how many workers.

    Args:
        executor: "local", "dask://host:port" or "slurm".
        jobs: number of workers. None: one, or every worker of a Dask cluster.
        threads: torch threads per worker. None: all cores, divided among local workers.
        slurm: parameters of submitit's executor.

    Raises:
        ValueError: the executor or the number of workers is invalid.
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
        """Cells per round of a search. Workers restart every round, so each gets several."""
        return 1 if self.in_this_process else 4 * (self.jobs or 1)

    @property
    def threads_each(self) -> int | None:
        if self.threads is None and self.executor == executors.LOCAL and not self.in_this_process:
            has_affinity = hasattr(os, "sched_getaffinity")
            cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
            return max(1, cores // (self.jobs or 1))
        return self.threads


def _stored_results(plan: Sequence[Cell], store: Store) -> dict[str, dict[str, Any]]:
    """{key of a cell: its result} for every cell in the store."""
    results = ((cell.key, store.get(cell)) for cell in plan)
    return {key: result for key, result in results if result is not None}


def _compute(
    plan: Sequence[Cell],
    stored: Mapping[str, dict[str, Any]],
    preset: Preset,
    store: Store,
    workers: Workers,
    progress: bool,
    *,
    keep: bool = False,
) -> None:
    """Compute the cells that are not stored yet, and print a line for each."""
    missing = [cell for cell in plan if cell.key not in stored]
    job = _job(missing, preset, store, workers, progress=progress, keep=keep)
    reference = next((stored.get(cell.key) for cell in plan if cell.task == "baseline"), None)
    with progress_bar(total=len(plan), initial=len(stored), unit="cell", shown=progress) as bar:

        def report_cell(cell: Cell, result: dict[str, Any]) -> None:
            nonlocal reference
            if cell.task == "baseline":
                reference = result
            bar.write(f"  {cell.label:<38} {_outcome(result, reference)}")
            bar.update()

        executors.run(job, report_cell, workers.executor, workers.jobs, workers.slurm)


def _job(
    cells: Sequence[Cell],
    preset: Preset,
    store: Store,
    workers: Workers,
    *,
    progress: bool,
    keep: bool = False,
) -> Job:
    return Job(
        cells=[cell.to_json() for cell in cells],
        # a worker may have another working directory
        source=os.path.abspath(preset.model) if os.path.isdir(preset.model) else preset.model,
        output=str(store.folder.resolve()),
        threads=workers.threads_each,
        progress=progress and workers.in_this_process,
        keep=keep and workers.in_this_process,
    )


def _print_windows(preset: Preset) -> None:
    windows = "all" if preset.windows is None else preset.windows
    print(f"Evaluating {windows} windows of {preset.seqlen:,} tokens from the test split.")


def finished(preset: Preset, store: Store) -> list[Cell]:
    """Return the cells of a preset that are in the store. Computes nothing.

    Raises:
        ValueError: the store has none of them, or a setting is invalid.
        TypeError: a setting is invalid.
    """
    plan = _planned(preset)
    stored = _stored_results(plan, store)
    cells = [cell for cell in plan if cell.key in stored]
    if not any(cell.task in ("baseline", "quantized") for cell in cells):
        raise ValueError(
            f"output: no result of this sweep is in {store.folder}; run the sweep first"
        )
    print(f"{len(cells)} of {len(plan)} cells are in {store.folder}; the rest are not computed.")
    return cells


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


class _Parser(argparse.ArgumentParser):
    """A parser whose messages are as short as all others."""

    def error(self, message: str) -> NoReturn:
        super().error(shortened(message))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line. An invalid value exits with a message that names the flag.

    "words" of the result is for `one_line`: what the flags are called.
    """
    # argparse, not Typer: most flags take several values (`--group-sizes 32 128`), which Typer
    # cannot express.
    presets = "\n".join(
        textwrap.fill(f"  {name:<10}{preset.about}", 80, subsequent_indent=" " * 12)
        for name, preset in PRESETS.items()
    )
    parser = _Parser(
        prog="python -m run_experiments",
        description=__doc__.replace("\n\n\n", "\n\n"),
        epilog=f"presets:\n{presets}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--preset", choices=PRESETS, default="default", help="a named sweep, see below"
    )
    parser.add_argument(
        "--model", help="smollm2-135m, tiny-opt, a model folder or a Hugging Face id"
    )
    parser.add_argument(
        "--group-sizes", nargs="+", type=int, metavar="G", help="channels that share a scale"
    )
    parser.add_argument(
        "--salient-props",
        nargs="+",
        type=float,
        metavar="P",
        help="shares of channels kept in 16 bits, 0 to 1",
    )
    parser.add_argument(
        "--sorts", nargs="+", metavar="S", help="channel order: none max mean3std argmax rms"
    )
    parser.add_argument(
        "--backends",
        nargs="+",
        metavar="B",
        help="int4 (packed weights, integer kernels), fake (floating-point simulation)",
    )
    parser.add_argument("--recipes", nargs="+", metavar="R", help="rtn fast best")
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="M",
        help=f"mixedquant, or one of these simulations: {' '.join(OTHER_METHODS)}",
    )
    parser.add_argument(
        "--set",
        dest="fields",
        nargs="+",
        type=_field,
        metavar="FIELD=VALUE",
        help="set other MixedQuantConfig fields, e.g. act_clip=0.9",
    )
    parser.add_argument(
        "--windows", type=_windows, metavar="N", help="test windows to evaluate, or all"
    )
    parser.add_argument("--seqlen", type=int, metavar="T", help="tokens per window")
    parser.add_argument(
        "--calibration-blocks", type=int, metavar="N", help="token blocks for statistics"
    )
    parser.add_argument("--calibration-block-size", type=int, metavar="T", help="tokens per block")
    parser.add_argument(
        "--gptq-blocks",
        type=int,
        metavar="N",
        help="token blocks for recipes and methods that use GPTQ",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="seed for drawing the blocks")
    parser.add_argument(
        "--layers",
        dest="layer_windows",
        type=int,
        metavar="N",
        help="also measure the error of each layer, over N windows",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of unquantized tensors")
    parser.add_argument(
        "--output",
        default="results",
        metavar="FOLDER",
        help="where finished cells are kept (default: results)",
    )
    parser.add_argument(
        "--cells",
        nargs="+",
        metavar="FILE",
        help="import finished cells from published files, e.g. figures/*_cells.jsonl",
    )
    parser.add_argument(
        "--figures",
        metavar="FOLDER",
        help="where figures and tables go (default: figures/ in the --output folder)",
    )
    parser.add_argument(
        "--keep",
        dest="kept_in",
        metavar="FOLDER",
        help="save the model with the lowest perplexity there (default: with the default preset, "
        "MODEL-best/ in the --output folder; else nowhere)",
    )
    # set by `report` and by `smoothquant plot`: draw the finished cells, compute none
    parser.add_argument("--plot", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="threads per worker (default: all cores, divided among the workers)",
    )
    parser.add_argument(
        "--executor",
        default=executors.LOCAL,
        metavar="E",
        help="where workers run: local, dask://HOST:PORT or slurm (default: local)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="number of workers (default: 1; on Dask, the whole cluster)",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="search the combinations of the preset's choices for the lowest perplexity at every "
        "size, instead of computing all of them",
    )
    parser.add_argument(
        "--budget",
        type=_budget,
        default=Budget(cells=24),
        metavar="N|Nm",
        help="limit for --search: N cells, or N minutes (Nm) (default: 24)",
    )
    parser.add_argument(
        "--slurm",
        nargs="+",
        type=_field,
        default=[],
        metavar="NAME=VALUE",
        help="submitit parameters, e.g. slurm_partition=cpu timeout_min=60",
    )
    args = parser.parse_args(argv)
    args.words = option_words(parser._actions)
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads must be at least 1; got {args.threads}")
    return args


def _budget(text: str) -> Budget:
    try:
        return Budget.from_text(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _windows(text: str) -> float | int:
    try:
        return math.inf if text == "all" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer or all; got {text!r}") from None


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


def _command(argv: Sequence[str], hidden: tuple[str, ...] = ()) -> str:
    """The shell command with these arguments, without the `hidden` options and their values."""
    words, skip = ["python", "-m", "run_experiments"], False
    for word in argv:
        if not (skip or word == "--plot" or word.partition("=")[0] in hidden):
            words.append(word)
        skip = word in hidden
    return for_shell(words)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["report"]:
        argv[0] = "--plot"
    args = parse_args(argv)
    started = time.perf_counter()
    command = _command(argv)
    recorded = _command(argv, hidden=("--output", "--keep"))  # local paths, which change no result
    prepare_streams()
    try:
        preset = _chosen_preset(args)
        store = Store(args.output)
        figures = Path(args.output, "figures") if args.figures is None else Path(args.figures)
        best = _kept_in(args, preset)
        for path in args.cells or []:
            print(f"Imported {store.adopt(path)} cells from {path}")
        print(f"Model {preset.model}, preset {args.preset}")
        if args.plot:
            plan = finished(preset, store)
        else:
            workers = {name: getattr(args, name) for name in ("executor", "jobs", "threads")}
            workers["slurm"] = dict(args.slurm)
            if args.search:
                plan = find_front(preset, store, args.budget, **workers)
            else:
                plan = sweep(preset, store, keep=best, **workers)
        text, paths = report.write(store, plan, preset.model, figures, recorded)
        if args.plot:
            paths.append(page.write(store, plan, preset.model, figures, recorded))
        last = _next_steps(best, store, plan) if best is not None else ""
    except KeyboardInterrupt:
        print(
            f"\nStopped. Finished cells are in {args.output}; continue with\n  {command}",
            file=sys.stderr,
        )
        return INTERRUPTED
    except REPORTED_ERRORS as error:
        if os.environ.get("MIXEDQUANT_TRACEBACK"):
            raise
        print(f"error: {one_line(error, args.words)}", file=sys.stderr)
        return 1
    if args.search:
        print("\nPareto front: no other evaluated model is both smaller and better than these.\n")
        print(report.front_table(store, plan))
    print("\nWrote:", *(f"  {path}" for path in paths), sep="\n")
    print(f"\nFinished in {time.perf_counter() - started:.0f} s.")
    print(f"\n{text}")
    if last:
        print(f"\n{last}")
    return 0


def _kept_in(args: argparse.Namespace, preset: Preset) -> Path | None:
    """The folder for the most accurate model, if one is to be kept."""
    if args.kept_in is not None and (args.search or args.plot):
        raise ValueError("--keep cannot be combined with --search or report")
    if args.search or args.plot or not (args.kept_in or preset.keep):
        return None
    return Path(args.kept_in or Path(args.output, f"{file_stem(preset.model)}-best"))


def _next_steps(folder: Path, store: Store, plan: Sequence[Cell]) -> str:
    """What the kept model is, what it writes, and what to do with it; "" if none was kept."""
    rows = stored_rows(store, plan)
    row = kept.best_row(rows)
    if row is None:
        return ""
    assert row.cell is not None
    float_row = next(row for row in rows if row.config is None)
    in_float = [float_row.result["perplexity"] or math.nan, float_row.size_mib]
    lines = [
        f"Most accurate: {row.cell.settings}, perplexity {row.result['perplexity']:.2f} and "
        f"{row.size_mib:.1f} MiB (16-bit model: {in_float[0]:.2f} and {in_float[1]:.1f} MiB)"
    ]
    said = kept.sentence(folder)
    if said is not None:
        lines.append(f"It writes: {said}")
    verb = ["inspect", str(folder)] if said is None else ["generate", str(folder), kept.PROMPT]
    return "\n".join([*lines, f"Model: {folder}", f"Next: {for_shell([*_program(), *verb])}"])


def _program() -> list[str]:
    """The command `smoothquant` of this installation, as one has to type it here."""
    if shutil.which("smoothquant"):
        return ["smoothquant"]
    here = Path.cwd()
    script, python = Path(sys.executable).with_name("smoothquant"), Path(sys.executable)
    path = script if script.is_file() else python
    shown = str(path.relative_to(here) if path.is_relative_to(here) else path)
    return [shown] if path is script else [shown, "-m", "smoothquant"]


if __name__ == "__main__":
    sys.exit(main())
