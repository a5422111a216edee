"""Draws figures and heat maps of errors by layer.

Each is written three times: `name.png`, `name.svg` for print, and its data as `name.csv`.

Labels are placed by hand, not by adjustText: that keeps every label, so labels overlap each other
and run over the axes where points are close together (72 points in figures/grid). Here, a label
without room is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .escaping import file_name, file_stem, short_name, visible
from .plots import Plot, Series
from .rows import by_layer_and_kind, layer_name
from .tables import write_csv

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Style = tuple[str, str, Any]  # colour, marker, dashes

# Okabe and Ito's colours are distinct for colour-blind readers; markers and dashes work in grey.
STYLES: tuple[Style, ...] = (
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


def draw(plot: Plot, path: Path) -> Path:
    """Draw `path`.png and `path`.svg, write the points to `path`.csv, and return the PNG's path."""
    with _plain_text(path.name):
        picture = _draw(plot, path)
    _write_points(path.with_name(path.name + ".csv"), plot)
    return picture


def _draw(plot: Plot, path: Path) -> Path:
    # Figure without pyplot: no global state, no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), dpi=170, layout="constrained")
    axes = figure.add_subplot()
    for (colour, marker, dashes), line in zip(styles(plot.series), plot.series, strict=True):
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
    axes.set_xlabel(visible(plot.x_name))
    axes.set_ylabel(visible(plot.y_name))
    axes.set_title(
        visible(plot.title), loc="left", fontsize=12, fontweight="bold", pad=22 if plot.about else 8
    )
    axes.text(
        0, 1.025, visible(plot.about), transform=axes.transAxes, fontsize=8.5, color="#404040"
    )
    axes.grid(True, which="major", color="#D9D9D9", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _label_ends(figure, axes, plot)
    # Point labels are placed in pixels, so the layout must not change from here on.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    _label_points(axes, plot)
    return _save(figure, path)


def draw_stacks(
    title: str, about: str, x_name: str, bars: Mapping[str, Mapping[str, float]], path: Path
) -> Path:
    """Draw `path`.png and `path`.svg, write the parts to `path`.csv, and return the PNG's path.

    Args:
        title, about: heading and subheading.
        x_name: label of the x axis.
        bars: {label of a horizontal bar: {name of a part: its length}}, from top to bottom and
            from left to right.
        path: the files' path without suffix.
    """
    with _plain_text(path.name):
        picture = _draw_stacks(title, about, x_name, bars, path)
    rows = [[bar, part, length] for bar, parts in bars.items() for part, length in parts.items()]
    write_csv(path.with_name(path.name + ".csv"), ["bar", "part", x_name], rows)
    return picture


def _draw_stacks(
    title: str, about: str, x_name: str, bars: Mapping[str, Mapping[str, float]], path: Path
) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 1.9 + 0.42 * len(bars)), dpi=170, layout="constrained")
    axes = figure.add_subplot()
    colours: dict[str, str] = {}
    for height, parts in enumerate(bars.values()):
        left = 0.0
        for part, length in parts.items():
            name = None if part in colours else visible(part)
            colour = colours.setdefault(part, STYLES[len(colours) % len(STYLES)][0])
            axes.barh(height, length, 0.7, left, color=colour, edgecolor="white", label=name)
            left += length
        axes.annotate(
            f"{left:.3g}", (left, height), (3, 0), textcoords="offset points",
            va="center", fontsize=8,
        )  # fmt: skip
    axes.set_yticks(range(len(bars)), map(visible, bars), fontsize=8.5)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set_xlabel(visible(x_name))
    axes.set_title(visible(title), loc="left", fontsize=12, fontweight="bold", pad=22)
    axes.text(0, 1.0, visible(about) + "\n", transform=axes.transAxes, fontsize=7, color="#404040")
    axes.grid(True, axis="x", color="#D9D9D9", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return _save(figure, path)


def draw_layers(result: dict[str, Any], model_name: str, settings: str, folder: Path) -> Path:
    """Draw the errors by layer and kind, one panel per comparison, and write them as CSV."""
    slug = file_name(settings.translate(str.maketrans(" ", "_", "=%")))
    path = folder / f"{file_stem(model_name)}_layers_{slug}"
    with _plain_text(path.name):
        picture = _draw_layers(result, short_name(model_name), settings, path)
    errors, names = result["errors"], result["compared"]
    rows = [[e["layer"], e["kind"], *(e["decibels"][name] for name in names)] for e in errors]
    write_csv(path.with_name(path.name + ".csv"), ["layer", "kind", *names], rows)
    return picture


def _draw_layers(result: dict[str, Any], name: str, settings: str, path: Path) -> Path:
    from matplotlib.figure import Figure

    errors, names = result["errors"], result["compared"]
    kinds, layers, _ = by_layer_and_kind(errors, names[0])
    figure = Figure(
        figsize=(max(7.2, 2.2 + 0.26 * len(layers)), 0.9 + len(names) * (0.7 + 0.21 * len(kinds))),
        dpi=170,
        layout="constrained",
    )
    figure.suptitle(
        visible(f"{name}: error of each layer ({settings})"),
        x=0.01, ha="left", fontsize=12, fontweight="bold",
    )  # fmt: skip
    panels = figure.subplots(len(names), 1, squeeze=False)[:, 0]
    for axes, compared in zip(panels, names, strict=True):
        _draw_heat_map(figure, axes, errors, compared)
    axes.set_xlabel("Decoder layer", fontsize=9)
    return _save(figure, path)


def _draw_heat_map(figure: Figure, axes: Axes, errors: Sequence[dict[str, Any]], name: str) -> None:
    kinds, layers, decibels = by_layer_and_kind(errors, name)
    values = [[decibels.get((layer, kind)) for layer in layers] for kind in kinds]
    numbers = [[math.nan if v is None else v for v in row] for row in values]
    low, high = colour_range(values)
    # cividis works for colour-blind readers and in grey: its lightness rises throughout
    image = axes.imshow(numbers, cmap="cividis", aspect="auto", vmin=low, vmax=high)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            dark = value is not None and value < (low + high) / 2
            axes.text(
                x, y, "-" if value is None else f"{value:.0f}",
                ha="center", va="center", fontsize=6, color="white" if dark else "black",
            )  # fmt: skip
    axes.set_xticks(range(len(layers)), map(layer_name, layers), fontsize=7)
    axes.set_yticks(range(len(kinds)), map(visible, kinds), fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if "hidden" in kinds:  # separates the accumulated error from the errors of single layers
        axes.axhline(kinds.index("hidden") - 0.5, color="white", linewidth=3)
    one, _, other = name.partition(" - ")
    against = other or "the 16-bit model"
    axes.set_title(visible(f"{one} against {against}"), loc="left", fontsize=9.5)
    bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03, extend="both")
    bar.set_label("dB", fontsize=8)
    bar.ax.tick_params(labelsize=7)


def colour_range(values: Sequence[Sequence[float | None]]) -> tuple[float, float]:
    """Return the range of the middle 90 % of the values, so that outliers do not hide the rest."""
    known = sorted(v for row in values for v in row if v is not None) or [0.0]
    cut = len(known) // 20
    return known[cut], known[-1 - cut]


def styles(series: Sequence[Series]) -> list[Style]:
    """Return (colour, marker, dashes) for each line."""
    result = []
    for index, line in enumerate(series):
        first, second = (number % len(STYLES) for number in line.style or (index, index))
        colour, marker, _ = STYLES[first]
        result.append((colour, marker, STYLES[second][2]))
    return result


def _save(figure: Figure, path: Path) -> Path:
    """Write `path`.png and `path`.svg, always with the same bytes, and return the PNG's path."""
    picture = path.with_name(path.name + ".png")
    figure.savefig(picture, metadata={"Software": None})
    figure.savefig(picture.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
    return picture


def _plain_text(name: str) -> AbstractContextManager:
    """Settings to draw with: a "$" is a dollar, not math; `name` makes the bytes of the SVG."""
    import matplotlib

    return matplotlib.rc_context(
        {"text.parse_math": False, "text.usetex": False, "svg.hashsalt": name}
    )


def _set_scales(axes: Axes, plot: Plot) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    xs = sorted({x for line in plot.series for x, _ in line.points})
    ys = plot.heights
    if plot.x_scale == "log":
        axes.set_xscale("log", base=2)
        axes.set_xticks(xs, [f"{x:g}" for x in xs])
        axes.xaxis.set_minor_locator(NullLocator())
    if plot.is_log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif plot.y_scale == "linear" and ys:
        axes.set_ylim(0, 1.08 * max(ys))


def _label_ends(figure: Figure, axes: Axes, plot: Plot) -> None:
    """Write each line's name to the right of the axes, near the height of its last point."""
    named: list[tuple[float, str, str, dict[str, Any]]] = [
        (
            line.points[-1][1],
            line.label,
            colour,
            {"marker": marker, "linestyle": dashes if line.joined else "none"},
        )
        for line, (colour, marker, dashes) in zip(plot.series, styles(plot.series), strict=True)
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
    outside: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False, "linewidth": 1.4}
    for (_, text, colour, style), end, place in zip(named, heights, places, strict=True):
        # Lines over group sizes end at the edge of the axes; connect those to their names.
        if plot.x_scale == "log":
            axes.plot([1, 1.03], [end, place], color=colour, **(outside | {"linewidth": 0.7}))
        axes.plot(
            [1.03, 1.06, 1.09],
            [place] * 3,
            color=colour,
            markevery=[1],
            markersize=5,
            **style,
            **outside,
        )
        axes.annotate(
            visible(text),
            (1.105, place),
            xycoords="axes fraction",
            color=colour,
            fontsize=9,
            va="center",
        )


def spread(wanted: Sequence[float], spacing: float, low: float, high: float) -> list[float]:
    """Move ascending positions just enough to be `spacing` apart and within [low, high]."""
    # Clusters of touching labels, each centred on the mean of its members' wanted positions.
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


def _label_points(axes: Axes, plot: Plot) -> None:
    """Write the text of each point next to it if there is room."""
    to_pixels = axes.transData.transform
    em = 7.5 * axes.figure.dpi / 72
    drawn: list[Any] = [
        to_pixels(line.points) for line in plot.series if line.points and line.joined
    ]
    drawn += [[p] for line in plot.series if not line.joined for p in to_pixels(line.points)]
    if plot.level:
        drawn.append(to_pixels([(x, plot.level[1]) for x in axes.get_xlim()]))
    taken = [
        (x - 0.35 * em, y - 0.35 * em, x + 0.35 * em, y + 0.35 * em)
        for line in drawn
        for x, y in _along(line, 0.5 * em)
    ]
    inside, points = axes.bbox, 72 / axes.figure.dpi
    for line, (colour, _, _) in zip(plot.series, styles(plot.series), strict=True):
        # not strict: a line may have no texts
        for point, text in zip(line.points, map(visible, line.texts), strict=False):
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
    """Positions along a polyline, at most `step` apart, including its corners."""
    for index, (x, y) in enumerate(points):
        yield x, y
        if index + 1 < len(points):
            x1, y1 = points[index + 1]
            count = int(math.hypot(x1 - x, y1 - y) / step) + 1
            for k in range(1, count):
                yield x + (x1 - x) * k / count, y + (y1 - y) * k / count


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two boxes (left, bottom, right, top) overlap."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _write_points(path: Path, plot: Plot) -> None:
    rows: list[list[Any]] = []
    for line in plot.series:
        pairs = zip(line.points, line.texts or ("",) * len(line.points), strict=True)
        rows += [[line.label, x, y, t] for (x, y), t in pairs]
    if plot.level:
        rows.append([plot.level[0], "", plot.level[1], ""])
    write_csv(path, ["series", plot.x_name, plot.y_name, "point"], rows)
