"""Tables and figures of a sweep, drawn from stored results alone.

The only writer of the figures folder, with `page`. Beside each picture `name.png` stand the same
for print, `name.svg`, and its data, `name.csv`.
"""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .grid import Cell
from .store import Store, write_atomically

MIB = 1024 * 1024

# Okabe and Ito's colours stay apart for colour-blind readers; markers and dashes do it in grey.
STYLES = (
    ("#0072B2", "o", "-"),
    ("#D55E00", "s", "--"),
    ("#009E73", "^", "-."),
    ("#CC79A7", "D", (0, (5, 1.5, 1, 1.5, 1, 1.5))),
    ("#E69F00", "v", (0, (1, 1))),
    ("#56B4E9", "P", (0, (6, 2))),
    ("#000000", "X", (0, (2, 1))),
)
REFERENCE_COLOUR = "#404040"
REFERENCE_DASHES = (0, (2, 2))
FRONT_HEADROOM = 2.0  # times the largest perplexity on a Pareto front: what is drawn beside it


@dataclass(frozen=True)
class Row:
    """One evaluated model: its settings (None for the unquantized one), result and run record, and
    the cell that it is of."""

    config: dict[str, Any] | None
    result: dict[str, Any]
    cell: Cell | None = None

    @property
    def method(self) -> str:
        """The recipe, or the name of another method; "" for the unquantized model."""
        return (self.config or {}).get("method") or (self.config or {}).get("recipe", "")

    @property
    def is_other_method(self) -> bool:
        return "method" in (self.config or {})

    @property
    def bits_per_weight(self) -> float:
        return 16.0 if self.config is None else self.result["bits_per_weight"]

    @property
    def size_mib(self) -> float:
        name = "model_bytes_16_bit" if self.config is None else "model_bytes"
        return self.result[name] / MIB


@dataclass(frozen=True)
class Series:
    """A named line of a figure: (x, y) points in ascending x, with an optional text at each.

    style: numbers of its colour and marker and of its dashes; None for the line's own number.
    joined: whether there is a line, or points alone.
    rows: what the points are of, where they are of single models.
    """

    label: str
    points: tuple[tuple[float, float], ...]
    texts: tuple[str, ...] = ()
    style: tuple[int, int] | None = None
    joined: bool = True
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Plot:
    """What a figure shows. level: name and height of a horizontal line of reference."""

    title: str
    about: str
    x_name: str
    y_name: str
    x_scale: str
    y_scale: str
    series: tuple[Series, ...]
    level: tuple[str, float] | None = None


def stored_rows(store: Store, cells: Iterable[Cell]) -> list[Row]:
    """The stored results of the evaluations among `cells`, in order; unfinished ones left out."""
    rows = []
    for cell in cells:
        result = store.get(cell) if cell.task in ("baseline", "quantized") else None
        if result is not None:
            rows.append(Row(None if cell.config is None else dict(cell.config), result, cell))
    return rows


def front(rows: Iterable[Row]) -> list[Row]:
    """The Pareto front of perplexity against real bytes, by size: the packed models that no other
    one beats in both."""
    best: list[Row] = []
    for row in sorted(filter(_is_packed, rows), key=lambda r: (r.size_mib, r.result["perplexity"])):
        if not best or row.result["perplexity"] < best[-1].result["perplexity"]:
            best.append(row)
    return best


def _is_packed(row: Row) -> bool:
    """Whether a row's bytes are real, and its perplexity a number."""
    return (row.config or {}).get("backend") == "int4" and row.result["perplexity"] is not None


def front_table(store: Store, cells: Iterable[Cell]) -> str:
    """`table` of the front alone, and of the unquantized model."""
    rows = stored_rows(store, cells)
    return table([*(row for row in rows if row.config is None), *front(rows)])


def table(rows: Sequence[Row]) -> str:
    """A Markdown table of the results, one line per evaluated model."""
    reference = next((r.result["perplexity"] for r in rows if r.config is None), None)
    head = (
        ["method", "group", "salient", "sort", "backend"]
        + ["bits/weight", "size MiB", "PPL", "vs 16-bit", "KL", "top-1", "tokens/s"]
    )  # fmt: skip
    body = [[*_settings(row), *_numbers(row, reference)] for row in rows]
    return _markdown(head, body)


def _settings(row: Row) -> list[str]:
    if row.config is None:
        return ["16-bit model", "-", "-", "-", "-"]
    c = row.config
    group = "-" if c["group_size"] is None else str(c["group_size"])
    if row.is_other_method:
        return [row.method, group, "-", "-", "fake"]
    return [row.method, group, _percent(c["salient_prop"]), c["sort"], c["backend"]]


def _numbers(row: Row, reference: float | None) -> list[str]:
    result = row.result
    perplexity = result["perplexity"]
    # The simulation holds float weights: its bytes say nothing about the method, and its bits only
    # where they were computed.
    real = row.config is None or row.config.get("backend") == "int4"
    bits = f"{row.bits_per_weight:.3f}" if real or row.is_other_method else "-"
    size = f"{row.size_mib:.1f}" if real else "-"
    delta = "-"
    if perplexity is not None and row.config is not None and reference is not None:
        delta = f"{perplexity - reference:+.2f}"
    kl, top1 = result.get("kl"), result.get("top1")
    return [
        bits,
        size,
        "not finite" if perplexity is None else _number(perplexity),
        delta,
        "-" if kl is None else f"{kl:.4f}",
        "-" if top1 is None else f"{100 * top1:.1f} %",
        f"{speed:,.0f}" if (speed := result["run"].get("tokens_per_s")) else "-",
    ]


def _number(value: float) -> str:
    return f"{value:,.2f}" if value < 1e5 else f"{value:.2e}"


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def _markdown(head: list[str], body: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    # Words to the left, numbers to the right.
    left = {"method", "sort", "backend"}

    def line(fields: list[str]) -> str:
        padded = (
            f.ljust(w) if h in left else f.rjust(w)
            for f, w, h in zip(fields, widths, head, strict=True)
        )
        return "| " + " | ".join(padded) + " |"

    rule = [
        ("-" * w) if h in left else ("-" * (w - 1) + ":") for w, h in zip(widths, head, strict=True)
    ]
    return "\n".join([line(head), line(rule), *map(line, body)])


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
        _draw(plot, folder / f"{stem}_{name}")
        for name, plot in _plots(rows, stem, cells[0].model["dtype"]).items()
    ]
    page = _results_page(rows, cells, model_name, command, text)
    for cell in cells:
        result = store.get(cell) if cell.task == "layers" else None
        if result is not None:
            paths.append(_draw_layers(result, stem, cell.settings, folder))
            page += (
                f"\n## {_layers_title(cell.settings, result)}\n\n{layer_table(result['errors'])}\n"
            )
    results = folder / f"{stem}_results.md"
    write_atomically(results, page)
    published = folder / f"{stem}_cells.jsonl"
    store.publish(cells, published)
    tables = [folder / f"{stem}_cells.{kind}" for kind in ("csv", "parquet")]
    _write_cells(store.rows(cells), *tables)
    return text, [*paths, results, published, *tables]


def _write_cells(rows: Sequence[dict[str, Any]], csv_path: Path, parquet_path: Path) -> None:
    """The store in one table, for other programs."""
    import pyarrow
    from pyarrow import parquet

    columns = list(dict.fromkeys(name for row in rows for name in row))
    _write_csv(csv_path, columns, ([row.get(name) for name in columns] for row in rows))
    table = pyarrow.table({name: _one_type([r.get(name) for r in rows]) for name in columns})
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(table, sink)
    write_atomically(parquet_path, sink.getvalue().to_pybytes())


def _one_type(values: list) -> list:
    """The values, as text where some of them are: a clip may be 0.9 or "search"."""
    if any(isinstance(value, str) for value in values):
        return [None if value is None else str(value) for value in values]
    return values


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
            series.append(Series(_share_label(share), points))
        title = f"{model_name}: {quantity.split(' (')[0].lower()} by group size"
        plots[file] = Plot(title, "", "Group size", quantity, "log", scale, tuple(series))
    folder = Path(output_folder)
    folder.mkdir(parents=True, exist_ok=True)
    stem = _stem(model_name)
    paths = [_draw(plot, folder / f"{stem}_{name}") for name, plot in plots.items()]
    print("Figures:", *(f"  {path.resolve()}" for path in paths), sep="\n")
    return paths


def _stem(model_name: str) -> str:
    return Path(model_name).name


def _main_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows that a figure compares: MixedQuant's by one backend and the sort with most cells."""
    quantized = [row for row in rows if row.config and not row.is_other_method]
    quantized = [row for row in quantized if row.result["perplexity"]]
    kinds = Counter((row.config["backend"] == "int4", row.config["sort"]) for row in quantized)
    if not kinds:
        return []
    # Real kernels before simulation; among equals the sort that came first.
    real, sort = max(kinds, key=lambda kind: (kind[0], kinds[kind]))
    return [
        row
        for row in quantized
        if (row.config["backend"] == "int4") == real and row.config["sort"] == sort
    ]


def _share_label(share: float) -> str:
    return f"{_percent(share)} salient"


def _plots(every: Sequence[Row], name: str, dtype: str) -> dict[str, Plot]:
    """The figures of a sweep by the ends of their names; none without a row of MixedQuant."""
    rows = _main_rows(every)
    if not rows:
        return {}
    reference = next((row for row in every if row.config is None), None)
    config, result = rows[0].config, rows[0].result
    recipes = _recipes(rows)
    method = f"W{config['num_bits']}A{config['num_bits']}, sort {config['sort']}"
    method += f", recipe {recipes[0]}" if len(recipes) == 1 else ""
    if config["backend"] != "int4":
        method += ", simulated"
    windows = f"WikiText-2 test, {_windows(result['windows'], result['seqlen'])}"
    quality = f"{method}. {windows}."
    size = f"{method}. Bytes of all tensors; what is not quantized stays {dtype}."
    ppl_level = size_level = None
    if reference:
        size_level = "16-bit model", reference.size_mib
        if reference.result["perplexity"]:
            ppl_level = "16-bit model", reference.result["perplexity"]
    by_group = ("Group size", "Perplexity", "log", "log")
    size_by_group = ("Group size", "Model size (MiB)", "log", "linear")
    bits = "Bits per weight (codes, scales and salient channels)"
    by_bits = (bits, "Perplexity", "linear", "log")
    kl_by_bits = (bits, "KL divergence from the 16-bit model (nats)", "linear", "log")
    others = [row for row in every if row.is_other_method and row.result["perplexity"]]
    of_sorts, sort_about = _sort_rows(every)
    with_kl = [row for row in rows if row.result.get("kl")]
    plots = {
        "ppl_vs_group_size": Plot(
            f"{name}: perplexity by group size", quality, *by_group,
            _lines(rows, lambda row: (row.config["group_size"], row.result["perplexity"])),
            ppl_level,
        ),
        "size_vs_group_size": Plot(
            # recipes differ in values, not in bytes
            f"{name}: model size by group size", size, *size_by_group,
            _lines(
                [row for row in rows if row.method == recipes[0]],
                lambda row: (row.config["group_size"], row.size_mib),
            ),
            size_level,
        ),
        "ppl_vs_bits": Plot(
            f"{name}: perplexity by size of the weights", f"{quality} g: group size.", *by_bits,
            _lines(
                rows, lambda row: (row.bits_per_weight, row.result["perplexity"]), _group, others
            ),
            ppl_level,
        ),
        "kl_vs_bits": Plot(
            f"{name}: KL divergence by size of the weights", f"{quality} g: group size.",
            *kl_by_bits,
            _lines(
                with_kl,
                lambda row: (row.bits_per_weight, row.result["kl"]),
                _group,
                [row for row in others if row.result.get("kl")],
            ),
        ),
        "ppl_by_sort": Plot(
            f"{name}: perplexity by the key that sorts channels", f"{sort_about} {windows}.",
            *by_group, of_sorts, ppl_level,
        ),
    }  # fmt: skip
    best = front(every)
    if len(best) > 2:
        beaten = [row for row in every if _is_packed(row) and row not in best]
        # the front would lie flat under models that are useless
        highest = FRONT_HEADROOM * max(row.result["perplexity"] for row in best)
        rest = [row for row in beaten if row.result["perplexity"] <= highest]
        left_out = len(beaten) - len(rest)
        above = f"; {left_out} beyond {highest:,.3g} left out" if left_out else ""
        plots["pareto"] = Plot(
            f"{name}: perplexity by real bytes", f"Each point a packed model{above}. {windows}.",
            "Model size (MiB)", "Perplexity", "linear", "log",
            (
                Series(
                    "other models", _sizes(rest), (), (5, 0), joined=False, rows=tuple(rest)
                ),
                Series(
                    "Pareto front", _sizes(best), tuple(map(_front_label, best)), (1, 0),
                    rows=tuple(best),
                ),
            )[0 if rest else 1 :],
            ppl_level,
        )  # fmt: skip
    drawn = {"kl_vs_bits": with_kl, "ppl_by_sort": of_sorts}
    return {name: plot for name, plot in plots.items() if drawn.get(name, True)}


def _sizes(rows: Iterable[Row]) -> tuple[tuple[float, float], ...]:
    return tuple((row.size_mib, row.result["perplexity"]) for row in rows)


def _front_label(row: Row) -> str:
    return f"g {row.config['group_size']}, {_percent(row.config['salient_prop'])}"


def _sort_rows(rows: Iterable[Row]) -> tuple[tuple[Series, ...], str]:
    """A line over group sizes for each sort key, and what they have in common: of the recipe and
    salient share that most keys were tried with. Nothing where no two keys can be compared."""
    by_choice: dict[tuple, dict[str, dict[int, float]]] = {}
    for row in rows:
        c = row.config
        if c and not row.is_other_method and c["backend"] == "int4" and row.result["perplexity"]:
            of_choice = by_choice.setdefault((row.method, c["salient_prop"]), {})
            line = of_choice.setdefault(c["sort"], {})
            line[c["group_size"]] = row.result["perplexity"]
    if not by_choice:
        return (), ""
    # among equals the largest share: the others' errors hide what the order does
    choice = max(by_choice, key=lambda key: (sum(map(len, by_choice[key].values())), key[1]))
    lines = by_choice[choice]
    if len(lines) < 2 or min(map(len, lines.values())) < 2:
        return (), ""
    series = tuple(
        Series("unsorted" if sort == "none" else sort, tuple(sorted(line.items())))
        for sort, line in lines.items()
    )
    return series, f"Recipe {choice[0]}, {_share_label(choice[1])}."


def _windows(count: int, seqlen: int) -> str:
    return f"{count} window{'' if count == 1 else 's'} of {seqlen:,} tokens"


def _recipes(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row.method for row in rows))


def _group(row: Row) -> str:
    return "" if row.config["group_size"] is None else f"g {row.config['group_size']}"


def _lines(rows: Sequence[Row], point, text=None, others: Sequence[Row] = ()) -> tuple[Series, ...]:
    """A line per recipe and salient share, then one per other method, through `point(row)` =
    (x, y), with `text(row)` at each point. Several recipes differ in colour, shares in dashes."""
    recipes = _recipes(rows)
    shares = sorted({row.config["salient_prop"] for row in rows})
    lines = []

    def add(label: str, line: list[Row], style: tuple[int, int]) -> None:
        line.sort(key=point)
        texts = tuple(map(text, line)) if text else ()
        lines.append(Series(label, tuple(map(point, line)), texts, style, rows=tuple(line)))

    for i, recipe in enumerate(recipes):
        for j, share in enumerate(shares):
            line = [r for r in rows if (r.method, r.config["salient_prop"]) == (recipe, share)]
            several = len(recipes) > 1
            label = _share_label(share)
            if line:
                add(f"{recipe}, {label}" if several else label, line, (i, j) if several else (j, j))
    colours = len(recipes) if len(recipes) > 1 else len(shares)
    for i, method in enumerate(_recipes(others)):
        add(method, [row for row in others if row.method == method], (colours + i, 1))
    return tuple(lines)


def _draw(plot: Plot, path: Path) -> Path:
    """Draw into `path`.png and .svg and write the points to `path`.csv; the picture's path."""
    # Figure without pyplot: no global state, no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), dpi=170, layout="constrained")
    axes = figure.add_subplot()
    for (colour, marker, dashes), line in zip(_styles(plot.series), plot.series, strict=True):
        xs, ys = [x for x, _ in line.points], [y for _, y in line.points]
        dashes = dashes if line.joined else "none"
        axes.plot(
            xs, ys, color=colour, marker=marker, linestyle=dashes, linewidth=1.8, markersize=5.5
        )
    if plot.level:
        axes.axhline(
            plot.level[1], color=REFERENCE_COLOUR, linewidth=1.2, linestyle=REFERENCE_DASHES
        )
    _set_scales(axes, plot)
    axes.set_xlabel(plot.x_name)
    axes.set_ylabel(plot.y_name)
    axes.set_title(
        plot.title, loc="left", fontsize=12, fontweight="bold", pad=22 if plot.about else 8
    )
    axes.text(0, 1.025, plot.about, transform=axes.transAxes, fontsize=8.5, color="#404040")
    axes.grid(True, which="major", color="#D9D9D9", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _label_ends(figure, axes, plot)
    # Labels at points are placed by pixels, so nothing may move from here on.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    _label_points(axes, plot)
    picture = _save(figure, path)
    _write_points(path.with_name(path.name + ".csv"), plot)
    return picture


def _save(figure, path: Path) -> Path:
    """Write `path`.png and, for print, `path`.svg, the same bytes each time; the former's path."""
    import matplotlib

    picture = path.with_name(path.name + ".png")
    figure.savefig(picture, metadata={"Software": None})
    with matplotlib.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(picture.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
    return picture


def _styles(series: Sequence[Series]) -> list[tuple]:
    """(colour, marker, dashes) of each."""
    styles = []
    for index, line in enumerate(series):
        first, second = (number % len(STYLES) for number in line.style or (index, index))
        styles.append((*STYLES[first][:2], STYLES[second][2]))
    return styles


def _set_scales(axes, plot: Plot) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    xs = sorted({x for line in plot.series for x, _ in line.points})
    ys = _heights(plot)
    if plot.x_scale == "log":
        axes.set_xscale("log", base=2)
        axes.set_xticks(xs, [f"{x:g}" for x in xs])
        axes.xaxis.set_minor_locator(NullLocator())
    if is_log(plot):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif plot.y_scale == "linear" and ys:
        axes.set_ylim(0, 1.08 * max(ys))


def is_log(plot: Plot) -> bool:
    """Whether the y axis is logarithmic: with one tick on it that tells less than a plain one."""
    ys = _heights(plot)
    return bool(ys) and plot.y_scale == "log" and min(ys) > 0 and max(ys) > 4 * min(ys)


def _heights(plot: Plot) -> list[float]:
    ys = [y for line in plot.series for _, y in line.points]
    return ys + [plot.level[1]] if plot.level else ys


def _label_ends(figure, axes, plot: Plot) -> None:
    """Name each line at the right of the axes, near its last point's height, pushed apart."""
    named = [
        (
            line.points[-1][1],
            line.label,
            colour,
            {"marker": marker, "linestyle": dashes if line.joined else "none"},
        )
        for line, (colour, marker, dashes) in zip(plot.series, _styles(plot.series), strict=True)
        if line.points
    ]
    if plot.level:
        text = f"{plot.level[0]} ({plot.level[1]:,.4g})"
        named.append((plot.level[1], text, REFERENCE_COLOUR, {"linestyle": REFERENCE_DASHES}))
    named.sort(key=lambda entry: entry[0])
    figure.draw_without_rendering()
    bottom, height = axes.bbox.y0, axes.bbox.height
    heights = [(axes.transData.transform((1, y))[1] - bottom) / height for y, *_ in named]
    spacing = 1.45 * 9 * figure.dpi / 72 / height
    places = spread(heights, spacing, 0.0, 1.0)
    over = {"transform": axes.transAxes, "clip_on": False, "linewidth": 1.4}
    for (_, text, colour, style), want, place in zip(named, heights, places, strict=True):
        # Lines over group sizes all end at the edge; others end anywhere.
        if plot.x_scale == "log":
            axes.plot([1, 1.03], [want, place], color=colour, **(over | {"linewidth": 0.7}))
        axes.plot(
            [1.03, 1.06, 1.09],
            [place] * 3,
            color=colour,
            markevery=[1],
            markersize=5,
            **style,
            **over,
        )
        axes.annotate(
            text, (1.105, place), xycoords="axes fraction", color=colour, fontsize=9, va="center"
        )


def spread(wanted: Sequence[float], spacing: float, low: float, high: float) -> list[float]:
    """Move ascending positions as little as needed to be `spacing` apart, within [low, high]."""
    # Clusters of touching labels, each centred on the mean of what its members want.
    clusters: list[list[float]] = []  # [sum of (wanted - offset in cluster), count]

    def start(total: float, count: float) -> float:
        return max(low, min(total / count, high - (count - 1) * spacing))

    for position in wanted:
        clusters.append([position, 1])
        while len(clusters) > 1:
            (total, count), (next_total, next_count) = clusters[-2:]
            if start(total, count) + count * spacing <= start(next_total, next_count):
                break
            clusters[-2:] = [
                [total + next_total - next_count * count * spacing, count + next_count]
            ]
    placed = []
    for total, count in clusters:
        first = start(total, count)
        placed += [first + index * spacing for index in range(int(count))]
    return placed


def _label_points(axes, plot: Plot) -> None:
    """Write the texts of points beside them, where there is room."""
    to_pixels = axes.transData.transform
    em = 7.5 * axes.figure.dpi / 72
    drawn = [to_pixels(line.points) for line in plot.series if line.points and line.joined]
    drawn += [[p] for line in plot.series if not line.joined for p in to_pixels(line.points)]
    if plot.level:
        drawn.append(to_pixels([(x, plot.level[1]) for x in axes.get_xlim()]))
    taken = [
        (x - 0.35 * em, y - 0.35 * em, x + 0.35 * em, y + 0.35 * em)
        for line in drawn
        for x, y in _along(line, 0.5 * em)
    ]
    inside, points = axes.bbox, 72 / axes.figure.dpi
    for line, (colour, _, _) in zip(plot.series, _styles(plot.series), strict=True):
        # Lines without texts have points all the same.
        for point, text in zip(line.points, line.texts, strict=False):
            x, y = to_pixels(point)
            width, height, gap = 0.64 * em * len(text), 1.1 * em, 0.8 * em
            for left, base in (
                (x - width - gap, y - height / 2),
                (x - width - 0.6 * gap, y - height - 0.4 * gap),
                (x - width / 2, y - height - gap),
                (x + gap, y - height / 2),
                (x - width / 2, y + gap),
                (x + 0.6 * gap, y + 0.4 * gap),
            ):
                box = (left, base, left + width, base + height)
                if box[0] < inside.x0 or box[2] > inside.x1 or box[1] < inside.y0:
                    continue
                if any(_overlap(box, other) for other in taken):
                    continue
                taken.append(box)
                axes.annotate(
                    text,
                    point,
                    xytext=((left - x) * points, (base - y + 0.2 * em) * points),
                    textcoords="offset points",
                    fontsize=7.5,
                    color=colour,
                )
                break


def _along(points: Sequence[Sequence[float]], step: float) -> Iterator[tuple[float, float]]:
    """Positions along a polyline, at most `step` apart, its corners among them."""
    for index, (x, y) in enumerate(points):
        yield x, y
        if index + 1 < len(points):
            x1, y1 = points[index + 1]
            count = int(math.hypot(x1 - x, y1 - y) / step) + 1
            for k in range(1, count):
                yield x + (x1 - x) * k / count, y + (y1 - y) * k / count


def _overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _write_points(path: Path, plot: Plot) -> None:
    rows = []
    for line in plot.series:
        pairs = zip(line.points, line.texts or ("",) * len(line.points), strict=True)
        rows += [[line.label, x, y, t] for (x, y), t in pairs]
    if plot.level:
        rows.append([plot.level[0], "", plot.level[1], ""])
    _write_csv(path, ["series", plot.x_name, plot.y_name, "point"], rows)


def _write_csv(path: Path, head: list, rows: Iterable[list]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    write_atomically(path, text.getvalue())


def _use(calibrations: Sequence[dict], calibration: dict, cells: Sequence[Cell]) -> str:
    """Whose calibration it is, where there are several."""
    if len(calibrations) == 1:
        return ""
    of = (cell.config for cell in cells if cell.config and cell.calibration == calibration)
    names = dict.fromkeys(c.get("method") or c["recipe"] for c in of)
    return f" of {', '.join(names)}"


def layer_table(errors: Sequence[dict[str, Any]], of: str = "int4") -> str:
    """A Markdown table of decibels, decoder layers down, kinds of layers across.

    errors: as a "layers" cell holds them, {"layer", "kind", "decibels": {name: value or None}}.
    of: the name whose decibels are shown.
    """
    kinds, layers, decibels = _pivot(errors, of)
    body = [
        [_layer_name(layer), *(_decibels(decibels.get((layer, kind))) for kind in kinds)]
        for layer in layers
    ]
    return _markdown(["layer", *kinds], body)


def _pivot(errors: Sequence[dict[str, Any]], of: str) -> tuple[list, list, dict]:
    """(kinds, layers, {(layer, kind): decibels or None})."""
    kinds = list(dict.fromkeys(error["kind"] for error in errors))
    layers = list(dict.fromkeys(error["layer"] for error in errors))
    return kinds, layers, {(e["layer"], e["kind"]): e["decibels"][of] for e in errors}


def _layer_name(layer: int | None) -> str:
    return "-" if layer is None else str(layer)


def _decibels(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _layers_title(settings: str, result: dict[str, Any]) -> str:
    windows = _windows(result["windows"], result["seqlen"])
    return f"Signal over error in dB, {settings}, int4, {windows}"


def _draw_layers(result: dict[str, Any], stem: str, settings: str, folder: Path) -> Path:
    """Draw the errors by layer and kind, a panel per comparison, and write them as CSV."""
    from matplotlib.figure import Figure

    errors = result["errors"]
    names = result["compared"]
    kinds, layers, _ = _pivot(errors, names[0])
    figure = Figure(
        figsize=(max(7.2, 2.2 + 0.26 * len(layers)), 0.9 + len(names) * (0.7 + 0.21 * len(kinds))),
        dpi=170,
        layout="constrained",
    )
    figure.suptitle(
        f"{stem}: error of each layer ({settings})",
        x=0.01, ha="left", fontsize=12, fontweight="bold",
    )  # fmt: skip
    for axes, name in zip(figure.subplots(len(names), 1, squeeze=False)[:, 0], names, strict=True):
        _draw_heat_map(figure, axes, errors, name)
    axes.set_xlabel("Decoder layer", fontsize=9)
    slug = settings.translate(str.maketrans(" ", "_", "=%"))
    path = folder / f"{stem}_layers_{slug}"
    picture = _save(figure, path)
    rows = [[e["layer"], e["kind"], *(e["decibels"][name] for name in names)] for e in errors]
    _write_csv(path.with_name(path.name + ".csv"), ["layer", "kind", *names], rows)
    return picture


def _draw_heat_map(figure, axes, errors: Sequence[dict[str, Any]], name: str) -> None:
    kinds, layers, decibels = _pivot(errors, name)
    values = [[decibels.get((layer, kind)) for layer in layers] for kind in kinds]
    numbers = [[math.nan if v is None else v for v in row] for row in values]
    low, high = _colour_range(values)
    # cividis is told apart without colour vision, and rises in lightness, so in grey print too
    image = axes.imshow(numbers, cmap="cividis", aspect="auto", vmin=low, vmax=high)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            dark = value is not None and value < (low + high) / 2
            axes.text(
                x, y, "-" if value is None else f"{value:.0f}",
                ha="center", va="center", fontsize=6, color="white" if dark else "black",
            )  # fmt: skip
    axes.set_xticks(range(len(layers)), map(_layer_name, layers), fontsize=7)
    axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if "hidden" in kinds:  # what all layers before add up to, apart from each one's own
        axes.axhline(kinds.index("hidden") - 0.5, color="white", linewidth=3)
    one, _, other = name.partition(" - ")
    against = other or "the 16-bit model"
    axes.set_title(f"{one} against {against}", loc="left", fontsize=9.5)
    bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03, extend="both")
    bar.set_label("dB", fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _colour_range(values: Sequence[Sequence[float | None]]) -> tuple[float, float]:
    """What nine tenths of the values lie in: one layer unlike all others must not take the colours
    from them."""
    known = sorted(v for row in values for v in row if v is not None) or [0.0]
    cut = len(known) // 20
    return known[cut], known[-1 - cut]


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
        f"{_windows(windows, evaluation.get('seqlen'))}, exp(mean token NLL)",
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
