"""Tables and figures of a sweep, made from stored results alone.

Only this module and `page` write to the figures folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .drawing import draw, draw_layers
from .escaping import file_stem, for_markdown, short_name
from .grid import Cell
from .plots import Plot, Series, plots_of, share_label
from .rows import Row, front, stored_rows, windows_text
from .store import Store, write_atomically
from .tables import layer_table, table, write_cells


def write(
    store: Store, cells: Sequence[Cell], model_name: str, folder: str | Path, command: str
) -> tuple[str, list[Path]]:
    """Write the figures, tables and published cells of a sweep.

    These are: every figure with its data; `<model>_results.md`; `<model>_cells.jsonl`, the results
    with their specifications, which `Store.adopt` reads; and all cells as one table,
    `<model>_cells.csv` and `<model>_cells.parquet`.

    Args:
        store: where the results are.
        cells: the cells of this sweep.
        model_name: its last path component starts the file names.
        folder: created if missing.
        command: the command that produced the results, for the record.

    Returns:
        (the table as Markdown, paths of the figures, then of the other files).
    """
    rows = stored_rows(store, cells)
    text = table(rows)
    stem = file_stem(model_name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [
        draw(plot, folder / f"{stem}_{name}")
        for name, plot in plots_of(rows, short_name(model_name), cells[0].model["dtype"]).items()
    ]
    page = _results_page(rows, cells, model_name, command, text)
    for cell in cells:
        result = store.get(cell) if cell.task == "layers" else None
        if result is not None:
            paths.append(draw_layers(result, model_name, cell.settings, folder))
            title = for_markdown(_layers_title(cell.settings, result))
            page += f"\n## {title}\n\n{layer_table(result['errors'])}\n"
    results = folder / f"{stem}_results.md"
    write_atomically(results, page)
    published = folder / f"{stem}_cells.jsonl"
    store.publish(cells, published)
    tables = [folder / f"{stem}_cells.{kind}" for kind in ("csv", "parquet")]
    write_cells(store.rows(cells), *tables)
    return text, [*paths, results, published, *tables]


def plot_results(
    results: Mapping[str, Mapping[float, Sequence[float | None]]],
    group_sizes: Sequence[int],
    model_name: str,
    output_folder: str | Path = "figures",
) -> list[Path]:
    """Plot perplexity and model size against group size, one line per salient share.

    Args:
        results: {"perplexity": {share: values}, "model_size": {share: MiB}}, with one value per
            group size, None if missing.
        group_sizes: the group sizes, in the order of the values.
        model_name: appears in the titles; its last path component starts the file names.
        output_folder: created if missing.

    Returns:
        Paths of `<model>_ppl_vs_group_size.png` and `<model>_size_vs_group_size.png`. The data of
        each is next to it as CSV.

    Raises:
        ValueError: results lacks an entry, or an entry does not have one value per group size.
    """
    plots = {}
    for name, file, quantity, scale in (
        ("perplexity", "ppl_vs_group_size", "Perplexity", "log"),
        ("model_size", "size_vs_group_size", "Model size (MiB)", "linear"),
    ):
        if name not in results:
            raise ValueError(f"results must have {name!r}; got {sorted(results)}")
        series = []
        for share, values in results[name].items():
            if len(values) != len(group_sizes):
                raise ValueError(
                    f"results[{name!r}][{share!r}] must have {len(group_sizes)} values, one per "
                    f"group size; got {len(values)}"
                )
            pairs = zip(group_sizes, values, strict=True)
            points = tuple(sorted((g, y) for g, y in pairs if y is not None))
            series.append(Series(share_label(share), points))
        title = f"{model_name}: {quantity.split(' (')[0].lower()} by group size"
        plots[file] = Plot(title, "", "Group size", quantity, "log", scale, tuple(series))
    folder = Path(output_folder)
    folder.mkdir(parents=True, exist_ok=True)
    stem = file_stem(model_name)
    paths = [draw(plot, folder / f"{stem}_{name}") for name, plot in plots.items()]
    print("Figures:", *(f"  {path.resolve()}" for path in paths), sep="\n")
    return paths


def front_table(store: Store, cells: Iterable[Cell]) -> str:
    """Return a Markdown table of the unquantized model and the Pareto front."""
    rows = stored_rows(store, cells)
    return table([*(row for row in rows if row.config is None), *front(rows)])


def _results_page(
    rows: Sequence[Row], cells: Sequence[Cell], model_name: str, command: str, text: str
) -> str:
    first = cells[0]
    dtype = for_markdown(first.model["dtype"])
    runs = [row.result["run"] for row in rows if row.result["run"]]
    evaluation: Mapping[str, Any] = next((c.evaluation for c in cells if c.evaluation), {})
    windows = rows[0].result["windows"] if rows else evaluation["windows"]
    calibrations = [c.calibration for c in cells if c.task == "calibration" and c.calibration]
    lines = [
        f"# {for_markdown(model_name)}: perplexity and size",
        "",
        f"    {command}",
        "",
        f"- Evaluation: WikiText-2 raw {for_markdown(str(evaluation.get('split')))}, "
        f"{windows_text(windows, evaluation['seqlen'])}, exp(mean token NLL)",
    ]
    for calibration in calibrations:
        lines.append(
            f"- Calibration{_used_by(calibrations, calibration, cells)}: WikiText-2 raw "
            f"{for_markdown(calibration['split'])}, {calibration['blocks']} blocks of "
            f"{calibration['block_size']:,} tokens, seed {calibration['seed']}"
        )
    for name, title in (("chip", "Chip"), ("isa", "Instruction set"), ("threads", "Threads")):
        values = sorted({str(run[name]) for run in runs if name in run})
        lines.append(f"- {title}: {for_markdown(', '.join(values))}")
    dates = sorted({for_markdown(str(run["date"])[:10]) for run in runs if "date" in run})
    lines.append(f"- Date: {' to '.join(dict.fromkeys([*dates[:1], *dates[-1:]]))}")
    lines.append(
        "- Packages: "
        + for_markdown(", ".join(f"{name} {v}" for name, v in sorted(first.versions.items())))
    )
    lines += [
        "",
        text,
        "",
        f"The 16-bit model is the unquantized model, evaluated in {dtype}; its size "
        "counts 16 bits per element. The size of a quantized model is the size of its tensors in "
        "memory, which equals the payload of the saved file to the byte; embeddings and the "
        f"language head stay {dtype} unless the settings quantize them. Bits per weight include "
        "the codes, scales, salient channels and padding of the quantized layers. KL is the mean "
        "over tokens of KL(16-bit model || quantized model) in nats; top-1 is the share of tokens "
        "for which both models rank the same next token first. Tokens/s counts only the time of "
        "the forward passes.",
    ]
    if any(row.is_other_method for row in rows):
        lines += [
            "",
            "Methods other than the MixedQuant recipes are re-implemented from their papers and "
            "simulated in floating point (see run_experiments/peers.py); their bits per weight "
            "include codes and scales.",
        ]
    return "\n".join(lines) + "\n"


def _used_by(
    calibrations: Sequence[Mapping[str, Any]], calibration: Mapping[str, Any], cells: Sequence[Cell]
) -> str:
    """Name the recipes and methods that use this calibration, if there are several calibrations."""
    if len(calibrations) == 1:
        return ""
    configs = (cell.config for cell in cells if cell.config and cell.calibration == calibration)
    names = dict.fromkeys(config.get("method") or config["recipe"] for config in configs)
    return f" for {for_markdown(', '.join(names))}"


def _layers_title(settings: str, result: dict[str, Any]) -> str:
    windows = windows_text(result["windows"], result["seqlen"])
    return f"Signal-to-error ratio in dB, {settings}, int4, {windows}"
