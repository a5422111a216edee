"""Tables and figures of a sweep, drawn from stored results alone.

The only writer of the figures folder, with `page`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .drawing import draw, draw_layers
from .grid import Cell
from .plots import Plot, Series, plots_of, share_label
from .rows import front, stored_rows, windows_text
from .store import Store, write_atomically
from .tables import layer_table, table, write_cells


def write(
    store: Store, cells: Sequence[Cell], model_name: str, folder: str | Path, command: str
) -> tuple[str, list[Path]]:
    """Write the figures, their data, `<model>_results.md`, `<model>_cells.jsonl`, which holds each
    result with its specification for `Store.adopt`, and the same in one table as
    `<model>_cells.csv` and `<model>_cells.parquet`, from the store.

    Args:
        store, cells: where the results lie and which ones belong to this sweep.
        model_name: its last part begins the files' names.
        folder: made if it is not there.
        command: the command that made the results, for the record.

    Returns:
        (the table as Markdown, the paths of the figures, then of the results and the cells).
    """
    rows = stored_rows(store, cells)
    text = table(rows)
    stem = _stem(model_name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [
        draw(plot, folder / f"{stem}_{name}")
        for name, plot in plots_of(rows, stem, cells[0].model["dtype"]).items()
    ]
    page = _results_page(rows, cells, model_name, command, text)
    for cell in cells:
        result = store.get(cell) if cell.task == "layers" else None
        if result is not None:
            paths.append(draw_layers(result, stem, cell.settings, folder))
            page += (
                f"\n## {_layers_title(cell.settings, result)}\n\n{layer_table(result['errors'])}\n"
            )
    results = folder / f"{stem}_results.md"
    write_atomically(results, page)
    published = folder / f"{stem}_cells.jsonl"
    store.publish(cells, published)
    tables = [folder / f"{stem}_cells.{kind}" for kind in ("csv", "parquet")]
    write_cells(store.rows(cells), *tables)
    return text, [*paths, results, published, *tables]


def plot_results(
    results: dict[str, dict[float, list[float]]],
    group_sizes: Sequence[int],
    model_name: str,
    output_folder: str | Path = "figures",
) -> list[Path]:
    """Draw perplexity and size against group size, one line per salient share.

    Args:
        results: {"perplexity": {share: values}, "model_size": {share: MiB}}, one value per group
            size; None where there is none.
        group_sizes: the group sizes, in the order of the values.
        model_name: named in the titles; its last part begins the files' names.
        output_folder: made if it is not there.

    Returns:
        paths of `<model>_ppl_vs_group_size.png` and `<model>_size_vs_group_size.png`; the data of
        each stands beside it as CSV.

    Raises:
        ValueError: results lacks an entry, or one has not a value for each group size.
    """
    plots = {}
    for name, file, quantity, scale in (
        ("perplexity", "ppl_vs_group_size", "Perplexity", "log"),
        ("model_size", "size_vs_group_size", "Model size (MiB)", "linear"),
    ):
        if name not in results:
            raise ValueError(f"results must hold {name!r}; got {sorted(results)}")
        series = []
        for share, values in results[name].items():
            if len(values) != len(group_sizes):
                raise ValueError(
                    f"results[{name!r}][{share!r}] must hold {len(group_sizes)} values, one per "
                    f"group size; got {len(values)}"
                )
            pairs = zip(group_sizes, values, strict=True)
            points = tuple(sorted((g, y) for g, y in pairs if y is not None))
            series.append(Series(share_label(share), points))
        title = f"{model_name}: {quantity.split(' (')[0].lower()} by group size"
        plots[file] = Plot(title, "", "Group size", quantity, "log", scale, tuple(series))
    folder = Path(output_folder)
    folder.mkdir(parents=True, exist_ok=True)
    stem = _stem(model_name)
    paths = [draw(plot, folder / f"{stem}_{name}") for name, plot in plots.items()]
    print("Figures:", *(f"  {path.resolve()}" for path in paths), sep="\n")
    return paths


def front_table(store: Store, cells: Iterable[Cell]) -> str:
    """`table` of the front alone, and of the unquantized model."""
    rows = stored_rows(store, cells)
    return table([*(row for row in rows if row.config is None), *front(rows)])


def _stem(model_name: str) -> str:
    return Path(model_name).name


def _results_page(rows, cells, model_name: str, command: str, text: str) -> str:
    first = cells[0]
    runs = [row.result["run"] for row in rows if row.result["run"]]
    evaluation = next((cell.evaluation for cell in cells if cell.evaluation), {})
    windows = rows[0].result["windows"] if rows else evaluation.get("windows")
    calibrations = [cell.calibration for cell in cells if cell.task == "calibration"]
    lines = [
        f"# {model_name}: perplexity and size",
        "",
        f"    {command}",
        "",
        f"- Evaluation: WikiText-2 raw {evaluation.get('split')}, "
        f"{windows_text(windows, evaluation.get('seqlen'))}, exp(mean token NLL)",
    ]
    for calibration in calibrations:
        lines.append(
            f"- Calibration{_use(calibrations, calibration, cells)}: WikiText-2 raw "
            f"{calibration['split']}, {calibration['blocks']} blocks of "
            f"{calibration['block_size']:,} tokens, seed {calibration['seed']}"
        )
    for name, what in (("chip", "Chip"), ("isa", "Instruction set"), ("threads", "Threads")):
        lines.append(f"- {what}: {', '.join(sorted({str(run[name]) for run in runs}))}")
    dates = sorted({run["date"][:10] for run in runs})
    lines.append(f"- Date: {' to '.join(dict.fromkeys([*dates[:1], *dates[-1:]]))}")
    lines.append(
        "- Packages: " + ", ".join(f"{name} {v}" for name, v in sorted(first.versions.items()))
    )
    lines += [
        "",
        text,
        "",
        f"The 16-bit model is the unquantized one, computed in {first.model['dtype']}; its size is "
        "that of its tensors in 16 bits. The size of a quantized model is that of its tensors as "
        "they are in memory, equal to the saved file's payload to the byte; embeddings and the "
        f"language head are not quantized and stay {first.model['dtype']}. Bits per weight count "
        "codes, scales, salient channels and padding of the quantized layers. KL is the mean over "
        "tokens of KL(16-bit model || quantized model) in nats, top-1 the share of tokens where "
        "both hold the same next token most likely. Tokens/s are of the forward passes alone.",
    ]
    if any(row.is_other_method for row in rows):
        lines += [
            "",
            "Methods other than the recipes of MixedQuant are simulated in floating point, "
            "re-implemented from their papers (run_experiments/peers.py says how); their bits per "
            "weight are computed from codes and scales.",
        ]
    return "\n".join(lines) + "\n"


def _use(calibrations: Sequence[dict], calibration: dict, cells: Sequence[Cell]) -> str:
    """Whose calibration it is, where there are several."""
    if len(calibrations) == 1:
        return ""
    of = (cell.config for cell in cells if cell.config and cell.calibration == calibration)
    names = dict.fromkeys(c.get("method") or c["recipe"] for c in of)
    return f" of {', '.join(names)}"


def _layers_title(settings: str, result: dict[str, Any]) -> str:
    windows = windows_text(result["windows"], result["seqlen"])
    return f"Signal over error in dB, {settings}, int4, {windows}"
