"""What the figures of a sweep show, as data: `drawing` and `page` draw it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .rows import Row, front, is_packed, percent, windows_text

FRONT_HEADROOM = 2.0  # times the largest perplexity on a Pareto front: what is drawn beside it


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

    @property
    def heights(self) -> list[float]:
        """All y that are drawn."""
        ys = [y for line in self.series for _, y in line.points]
        return ys + [self.level[1]] if self.level else ys

    @property
    def is_log(self) -> bool:
        """Of the y axis: with one tick on it, a logarithmic one tells less than a plain one."""
        ys = self.heights
        return bool(ys) and self.y_scale == "log" and min(ys) > 0 and max(ys) > 4 * min(ys)


def plots_of(every: Sequence[Row], name: str, dtype: str) -> dict[str, Plot]:
    """The figures of a sweep that its rows fill, by the ends of their names; none without a row
    of MixedQuant."""
    rows = _main_rows(every)
    if not rows:
        return {}
    reference = next((row for row in every if row.config is None), None)
    config, result = rows[0].config, rows[0].result
    recipes = _methods(rows)
    method = f"W{config['num_bits']}A{config['num_bits']}, sort {config['sort']}"
    method += f", recipe {recipes[0]}" if len(recipes) == 1 else ""
    if config["backend"] != "int4":
        method += ", simulated"
    windows = f"WikiText-2 test, {windows_text(result['windows'], result['seqlen'])}"
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
        plots["pareto"] = _pareto(best, every, name, windows, ppl_level)
    by_size = len({row.config["group_size"] for row in rows}) > 1
    drawn = {"kl_vs_bits": with_kl, "ppl_by_sort": of_sorts}
    drawn |= {"ppl_vs_group_size": by_size, "size_vs_group_size": by_size}
    return {name: plot for name, plot in plots.items() if drawn.get(name, True)}


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


def share_label(share: float) -> str:
    return f"{percent(share)} salient"


def _pareto(
    best: Sequence[Row],
    every: Sequence[Row],
    name: str,
    windows: str,
    level: tuple[str, float] | None,
) -> Plot:
    """The front and what it beats, without what is so far above that the front would lie flat."""
    beaten = [row for row in every if is_packed(row) and row not in best]
    highest = FRONT_HEADROOM * max(row.result["perplexity"] for row in best)
    rest = [row for row in beaten if row.result["perplexity"] <= highest]
    left_out = len(beaten) - len(rest)
    above = f"; {left_out} beyond {highest:,.3g} left out" if left_out else ""
    texts = tuple(map(_front_label, best))
    series = [Series("Pareto front", _sizes(best), texts, (1, 0), rows=tuple(best))]
    if rest:
        others = Series("other models", _sizes(rest), (), (5, 0), joined=False, rows=tuple(rest))
        series.insert(0, others)
    return Plot(
        f"{name}: perplexity by real bytes", f"Each point a packed model{above}. {windows}.",
        "Model size (MiB)", "Perplexity", "linear", "log", tuple(series), level,
    )  # fmt: skip


def _sizes(rows: Iterable[Row]) -> tuple[tuple[float, float], ...]:
    return tuple((row.size_mib, row.result["perplexity"]) for row in rows)


def _front_label(row: Row) -> str:
    return f"g {row.config['group_size']}, {percent(row.config['salient_prop'])}"


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
    return series, f"Recipe {choice[0]}, {share_label(choice[1])}."


def _group(row: Row) -> str:
    return "" if row.config["group_size"] is None else f"g {row.config['group_size']}"


def _lines(rows: Sequence[Row], point, text=None, others: Sequence[Row] = ()) -> tuple[Series, ...]:
    """A line per recipe and salient share, then one per other method, through `point(row)` =
    (x, y), with `text(row)` at each point. Several recipes differ in colour, shares in dashes."""
    recipes = _methods(rows)
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
            label = share_label(share)
            if line:
                add(f"{recipe}, {label}" if several else label, line, (i, j) if several else (j, j))
    colours = len(recipes) if len(recipes) > 1 else len(shares)
    for i, method in enumerate(_methods(others)):
        add(method, [row for row in others if row.method == method], (colours + i, 1))
    return tuple(lines)


def _methods(rows: Iterable[Row]) -> list[str]:
    """Those of the rows, each once, in order."""
    return list(dict.fromkeys(row.method for row in rows))
