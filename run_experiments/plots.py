"""The contents of a sweep's figures, as data for `drawing` and `page`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .rows import Row, front, is_packed, percent, windows_text

FRONT_HEADROOM = 2.0  # a Pareto figure ends at this multiple of the front's largest perplexity


@dataclass(frozen=True)
class Series:
    """A named line of a figure.

    Args:
        label: its name.
        points: (x, y), in ascending x.
        texts: a label for each point, or ().
        style: (index of colour and marker, index of dashes); None: the line's position.
        joined: draw a line through the points.
        rows: the model behind each point, or ().
    """

    label: str
    points: tuple[tuple[float, float], ...]
    texts: tuple[str, ...] = ()
    style: tuple[int, int] | None = None
    joined: bool = True
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Plot:
    """A figure.

    Args:
        title, about: heading and subheading.
        x_name, y_name: axis labels.
        x_scale, y_scale: "linear" or "log".
        series: its lines.
        level: (name, height) of a horizontal reference line.
    """

    title: str
    about: str
    x_name: str
    y_name: str
    x_scale: str
    y_scale: str
    series: tuple[Series, ...]
    level: tuple[str, float] | None = None

    @property
    def heights(self) -> list[float]:
        """Every y in the figure."""
        ys = [y for line in self.series for _, y in line.points]
        return ys + [self.level[1]] if self.level else ys

    @property
    def is_log(self) -> bool:
        """Whether the y axis is logarithmic. Over a short range it would have only one tick."""
        ys = self.heights
        return bool(ys) and self.y_scale == "log" and min(ys) > 0 and max(ys) > 4 * min(ys)


def plots_of(all_rows: Sequence[Row], name: str, dtype: str) -> dict[str, Plot]:
    """Return the figures for which there are enough rows; none without a MixedQuant row.

    Args:
        all_rows: every evaluated model.
        name: the model's name, for titles.
        dtype: dtype of unquantized tensors.

    Returns:
        {suffix of the file name: figure}.
    """
    rows = _main_rows(all_rows)
    if not rows:
        return {}
    reference = next((row for row in all_rows if row.config is None), None)
    config, result = rows[0].settings, rows[0].result
    recipes = _methods(rows)
    act_bits = config.get("act_bits") or config["num_bits"]
    method = f"W{config['num_bits']}A{act_bits}, sort {config['sort']}"
    method += f", recipe {recipes[0]}" if len(recipes) == 1 else ""
    if config["backend"] != "int4":
        method += ", simulated"
    windows = f"WikiText-2 test, {windows_text(result['windows'], result['seqlen'])}"
    quality = f"{method}. {windows}."
    size = f"{method}. Bytes of all tensors; unquantized tensors stay {dtype}."
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
    others = [row for row in all_rows if row.is_other_method and row.result["perplexity"]]
    sort_series, sort_about = _sort_series(all_rows)
    with_kl = [row for row in rows if row.result.get("kl")]
    plots = {
        "ppl_vs_group_size": Plot(
            f"{name}: perplexity by group size", quality, *by_group,
            _lines(rows, lambda row: (row.settings["group_size"], row.result["perplexity"])),
            ppl_level,
        ),
        "size_vs_group_size": Plot(
            # all recipes give the same size
            f"{name}: model size by group size", size, *size_by_group,
            _lines(
                [row for row in rows if row.method == recipes[0]],
                lambda row: (row.settings["group_size"], row.size_mib),
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
            f"{name}: perplexity by sort key", f"{sort_about} {windows}.",
            *by_group, sort_series, ppl_level,
        ),
    }  # fmt: skip
    best = front(all_rows)
    if len(best) > 2:
        plots["pareto"] = _pareto(best, all_rows, name, windows, ppl_level)
    has_group_sizes = len({row.settings["group_size"] for row in rows}) > 1
    has_data = {
        "kl_vs_bits": bool(with_kl),
        "ppl_by_sort": bool(sort_series),
        "ppl_vs_group_size": has_group_sizes,
        "size_vs_group_size": has_group_sizes,
    }
    return {name: plot for name, plot in plots.items() if has_data.get(name, True)}


def _main_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows for most figures: MixedQuant with one backend and the sort key with most cells."""
    quantized = [row for row in rows if row.config and not row.is_other_method]
    quantized = [row for row in quantized if row.result["perplexity"]]
    kinds = Counter((row.settings["backend"] == "int4", row.settings["sort"]) for row in quantized)
    if not kinds:
        return []
    # Prefer real kernels to simulation; on a tie, the sort key that came first.
    real, sort = max(kinds, key=lambda kind: (kind[0], kinds[kind]))
    return [
        row
        for row in quantized
        if (row.settings["backend"] == "int4") == real and row.settings["sort"] == sort
    ]


def share_label(share: float) -> str:
    return f"{percent(share)} salient"


def _pareto(
    best: Sequence[Row],
    all_rows: Sequence[Row],
    name: str,
    windows: str,
    level: tuple[str, float] | None,
) -> Plot:
    """The front and the other packed models, without outliers that would flatten the front."""
    beaten = [row for row in all_rows if is_packed(row) and row not in best]
    highest = FRONT_HEADROOM * max(row.result["perplexity"] for row in best)
    rest = [row for row in beaten if row.result["perplexity"] <= highest]
    hidden = len(beaten) - len(rest)
    above = f"; {hidden} above {highest:,.3g} not shown" if hidden else ""
    texts = tuple(map(_front_label, best))
    series = [Series("Pareto front", _sizes(best), texts, (1, 0), rows=tuple(best))]
    if rest:
        others = Series("other models", _sizes(rest), (), (5, 0), joined=False, rows=tuple(rest))
        series.insert(0, others)
    return Plot(
        f"{name}: perplexity by model size", f"Each point is a packed model{above}. {windows}.",
        "Model size (MiB)", "Perplexity", "linear", "log", tuple(series), level,
    )  # fmt: skip


def _sizes(rows: Iterable[Row]) -> tuple[tuple[float, float], ...]:
    return tuple((row.size_mib, row.result["perplexity"]) for row in rows)


def _front_label(row: Row) -> str:
    return f"g {row.settings['group_size']}, {percent(row.settings['salient_prop'])}"


def _sort_series(rows: Iterable[Row]) -> tuple[tuple[Series, ...], str]:
    """A line over group sizes for every sort key, and a description of what they share.

    All lines have the recipe and salient share with the most cells. Returns ((), "") if no two sort
    keys can be compared.
    """
    by_choice: dict[tuple[str, float], dict[str, dict[int, float]]] = {}
    for row in rows:
        c = row.config
        if c and not row.is_other_method and c["backend"] == "int4" and row.result["perplexity"]:
            by_sort = by_choice.setdefault((row.method, c["salient_prop"]), {})
            line = by_sort.setdefault(c["sort"], {})
            line[c["group_size"]] = row.result["perplexity"]
    if not by_choice:
        return (), ""
    # on a tie, the largest share: with a smaller one, large errors hide the effect of the order
    choice = max(by_choice, key=lambda key: (sum(map(len, by_choice[key].values())), key[1]))
    lines = by_choice[choice]
    if len(lines) < 2 or min(map(len, lines.values())) < 2:
        return (), ""
    series = tuple(
        Series("unsorted" if sort == "none" else sort, tuple(sorted(line.items())))
        for sort, line in lines.items()
    )
    return series, f"Recipe {choice[0]}, {share_label(choice[1])}."


def _group(row: Row) -> str:
    return "" if row.settings["group_size"] is None else f"g {row.settings['group_size']}"


def _lines(
    rows: Sequence[Row],
    point: Callable[[Row], tuple[float, float]],
    text: Callable[[Row], str] | None = None,
    others: Sequence[Row] = (),
) -> tuple[Series, ...]:
    """A line per recipe and salient share, then a line per other method.

    A line goes through `point(row)` = (x, y), with the label `text(row)`. With several recipes,
    colours stand for recipes and dashes for shares.
    """
    recipes = _methods(rows)
    shares = sorted({row.settings["salient_prop"] for row in rows})
    lines = []

    def add(label: str, line: list[Row], style: tuple[int, int]) -> None:
        line.sort(key=point)
        texts = tuple(map(text, line)) if text else ()
        lines.append(Series(label, tuple(map(point, line)), texts, style, rows=tuple(line)))

    for i, recipe in enumerate(recipes):
        for j, share in enumerate(shares):
            line = [r for r in rows if (r.method, r.settings["salient_prop"]) == (recipe, share)]
            several = len(recipes) > 1
            label = share_label(share)
            if line:
                add(f"{recipe}, {label}" if several else label, line, (i, j) if several else (j, j))
    colours = len(recipes) if len(recipes) > 1 else len(shares)
    for i, method in enumerate(_methods(others)):
        add(method, [row for row in others if row.method == method], (colours + i, 1))
    return tuple(lines)


def _methods(rows: Iterable[Row]) -> list[str]:
    """The distinct methods of the rows, in order."""
    return list(dict.fromkeys(row.method for row in rows))
