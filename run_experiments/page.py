"""A sweep as one HTML page that works offline.

It has the curves, the Pareto front, the errors by layer, and a table of all numbers with their
specifications.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoothquant.core.version import install_command

from .drawing import REFERENCE_COLOUR, STYLES, colour_range, styles
from .escaping import file_stem, for_html, for_script, short_name
from .grid import Cell
from .plots import Plot, plots_of
from .rows import Row, by_layer_and_kind, layer_name, stored_rows
from .store import Store, write_atomically

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

SYMBOLS = {
    "o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down",
    "P": "cross", "X": "x",
}  # fmt: skip
DASHES = {"-": "solid", "--": "dash", "-.": "dashdot"}
# for the dash patterns in drawing.STYLES, in order
LONG_DASHES = ("longdashdot", "dot", "longdash", "5px,2px")
CONFIG = {"responsive": True, "displaylogo": False, "displayModeBar": False}
NUMBERS = ("perplexity", "kl", "top1", "bits_per_weight", "model_bytes")
SETTINGS = ("method", "group_size", "salient_prop", "sort", "backend")


def write(
    store: Store, cells: Sequence[Cell], model_name: str, folder: str | Path, command: str
) -> Path:
    """Write `<model>_report.html` from the store and return its path. Arguments as `report.write`.

    Raises:
        RuntimeError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise RuntimeError(
            f"the HTML page needs a package that is not installed ({error}): "
            f"{install_command('experiments')}"
        ) from error
    rows = stored_rows(store, cells)
    name = short_name(model_name)
    plots = plots_of(rows, name, cells[0].model["dtype"])
    sections = [
        f"<section><h2>{for_html(plot.title)}</h2><p>{for_html(plot.about)}</p>"
        f"{_html(_chart(plot), suffix)}</section>"
        for suffix, plot in plots.items()
    ]
    layers = [(cell, result) for cell in cells if cell.task == "layers"
              if (result := store.get(cell)) is not None]  # fmt: skip
    if layers:
        sections.append(
            "<section><h2>Error of each layer</h2><p>Signal-to-error ratio in dB: higher is better."
            f"</p>{_html(_heat_maps(layers), 'layers')}</section>"
        )
    parts = {
        "TITLE": for_html(f"{name}: perplexity and size"),
        "COMMAND": for_html(command),
        "SECTIONS": "\n".join(sections),
        "MODELS": for_script([_model(row) for row in rows]),
        "PLOTLY": get_plotlyjs(),
    }
    page = _PAGE.read_text(encoding="utf-8")
    page = re.sub(r"<!-- ([A-Z]+) -->", lambda match: parts[match[1]], page)
    path = Path(folder) / f"{file_stem(model_name)}_report.html"
    write_atomically(path, page)
    return path


_PAGE = Path(__file__).with_name("page.html")


def _html(figure: Figure, name: str) -> str:
    return figure.to_html(
        full_html=False, include_plotlyjs=False, config=CONFIG, div_id=f"chart-{name}"
    )


def _model(row: Row) -> dict[str, Any]:
    """A row of the table."""
    assert row.cell is not None
    config = row.config or {}
    settings = {name: config.get(name) for name in SETTINGS}
    settings["method"] = row.method or "16-bit model"
    numbers = {name: row.result.get(name) for name in NUMBERS}
    if row.is_other_method:
        settings["backend"] = "fake"
    if row.config is None:
        numbers |= {"bits_per_weight": 16, "model_bytes": row.result["model_bytes_16_bit"]}
    elif settings["backend"] != "int4":
        numbers["model_bytes"] = None  # a simulation keeps float weights
        if not row.is_other_method:
            numbers["bits_per_weight"] = None
    run = row.result["run"]
    return {
        **settings,
        **numbers,
        "tokens_per_s": run.get("tokens_per_s"),
        "key": row.cell.key,
        "spec": json.loads(row.cell.to_json()),
        "run": run,
    }


def _chart(plot: Plot) -> Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    for style, line in zip(styles(plot.series), plot.series, strict=True):
        colour, marker, dashes = style
        figure.add_scatter(
            x=[x for x, _ in line.points],
            y=[y for _, y in line.points],
            name=for_html(line.label),
            mode="lines+markers" if line.joined else "markers",
            line={"color": colour, "width": 2, "dash": _dash(dashes)},
            marker={"symbol": SYMBOLS[marker], "size": 9},
            customdata=[row.cell.key for row in line.rows if row.cell] or None,
            text=[for_html(row.cell.settings) for row in line.rows if row.cell] or None,
            hovertemplate="%{text}<br>%{x}: <b>%{y:.6g}</b>" if line.rows else None,
        )
    if plot.level:
        name, height = plot.level
        figure.add_hline(height, line={"color": REFERENCE_COLOUR, "dash": "dot"})
        figure.add_annotation(
            text=for_html(f"{name} ({height:,.4g})"), x=0, xref="paper", xanchor="left", yshift=-9,
            y=math.log10(height) if plot.is_log else height, showarrow=False,
            font={"color": REFERENCE_COLOUR},
        )  # fmt: skip
    figure.update_xaxes(title=_wrapped(for_html(plot.x_name)), type=plot.x_scale)
    if plot.x_scale == "log":
        xs = sorted({x for line in plot.series for x, _ in line.points})
        figure.update_xaxes(tickvals=xs, ticktext=[f"{x:g}" for x in xs])
    figure.update_yaxes(
        title=_wrapped(for_html(plot.y_name)), type="log" if plot.is_log else "linear"
    )
    if plot.is_log:
        ticks = [m * 10.0**e for e in range(-6, 12) for m in (1, 2, 5)]
        figure.update_yaxes(tickvals=ticks, ticktext=[f"{tick:,g}" for tick in ticks])
    _set_layout(figure, 440)
    return figure


def _wrapped(name: str) -> str:
    """Break a long name into two lines, to fit a phone."""
    for end in (" (", " from "):
        if len(name) > 24 and end in name:
            return name.replace(end, f"<br>{end.lstrip()}", 1)
    return name


def _dash(dashes: Any) -> str:
    if isinstance(dashes, str):
        return DASHES[dashes]
    others = [style[2] for style in STYLES if not isinstance(style[2], str)]
    return LONG_DASHES[others.index(dashes)]


def _heat_maps(layers: Sequence[tuple[Cell, dict[str, Any]]]) -> Figure:
    """A heat map per cell and comparison, with a menu to choose the visible one."""
    import plotly.graph_objects as go

    figure, names = go.Figure(), []
    for cell, result in layers:
        for compared in result["compared"]:
            kinds, numbers, decibels = by_layer_and_kind(result["errors"], compared)
            values = [[decibels.get((layer, kind)) for layer in numbers] for kind in kinds]
            low, high = colour_range(values)
            one, _, other = compared.partition(" - ")
            against = other or "the 16-bit model"
            names.append(for_html(f"{cell.settings}: {one} against {against}"))
            figure.add_heatmap(
                x=[layer_name(layer) for layer in numbers],
                y=list(map(for_html, kinds)),
                z=values,
                zmin=low,
                zmax=high,
                colorscale="Cividis",
                colorbar={"title": "dB", "thickness": 12},
                texttemplate="%{z:.0f}",
                hovertemplate="layer %{x}, %{y}: <b>%{z:.2f} dB</b><extra></extra>",
                customdata=[[cell.key] * len(numbers)] * len(kinds),
                visible=len(names) == 1,
            )
    buttons = [
        {"label": name, "method": "update", "args": [{"visible": [n == name for n in names]}]}
        for name in names
    ]
    menu = {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}
    figure.update_layout(updatemenus=[menu | {"font": {"size": 11}, "pad": {"l": -50}}])
    figure.update_xaxes(title="Decoder layer", type="category")
    figure.update_yaxes(autorange="reversed")
    _set_layout(figure, 420)
    return figure


def _set_layout(figure: Figure, height: int) -> None:
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 70, "r": 12, "t": 40, "b": 50},
        font={"family": "system-ui, sans-serif", "size": 13},
        legend={"orientation": "h", "y": -0.26, "yanchor": "top", "itemwidth": 50},
        hoverlabel={"align": "left"},
    )
