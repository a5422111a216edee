"""Results as tables: Markdown for readers, CSV and Parquet for programs.

Plain Python, because pandas is no shorter here: its `to_markdown` needs tabulate and lays out
columns differently from the published tables, and its `to_csv` writes the integers of a column with
gaps as floats.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .escaping import encodable, for_csv, for_markdown
from .rows import Row, by_layer_and_kind, layer_name, percent
from .store import write_atomically


def table(rows: Sequence[Row]) -> str:
    """Return a Markdown table with one line per evaluated model."""
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
    return [row.method, group, percent(c["salient_prop"]), c["sort"], c["backend"]]


def _numbers(row: Row, reference: float | None) -> list[str]:
    result = row.result
    perplexity = result["perplexity"]
    # A simulation keeps float weights, so its size means nothing. Its bits per weight are known for
    # other methods only.
    has_size = row.config is None or row.config.get("backend") == "int4"
    bits = f"{row.bits_per_weight:.3f}" if has_size or row.is_other_method else "-"
    size = f"{row.size_mib:.1f}" if has_size else "-"
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


def _markdown(head: list[str], body: list[list[str]]) -> str:
    # Align words left and numbers right.
    left = [name in ("method", "sort", "backend") for name in head]
    head, *body = [list(map(for_markdown, fields)) for fields in [head, *body]]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]

    def line(fields: list[str]) -> str:
        padded = (
            f.ljust(w) if is_left else f.rjust(w)
            for f, w, is_left in zip(fields, widths, left, strict=True)
        )
        return "| " + " | ".join(padded) + " |"

    rule = [
        "-" * w if is_left else "-" * (w - 1) + ":" for w, is_left in zip(widths, left, strict=True)
    ]
    return "\n".join([line(head), line(rule), *map(line, body)])


def layer_table(errors: Sequence[dict[str, Any]], comparison: str = "int4") -> str:
    """Return a Markdown table of decibels, with a row per decoder layer and a column per kind.

    Args:
        errors: from a "layers" cell: {"layer", "kind", "decibels": {comparison: value or None}}.
        comparison: the one to show.
    """
    kinds, layers, decibels = by_layer_and_kind(errors, comparison)
    body = [
        [layer_name(layer), *(_decibels(decibels.get((layer, kind))) for kind in kinds)]
        for layer in layers
    ]
    return _markdown(["layer", *kinds], body)


def _decibels(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def write_csv(path: Path, head: list[str], rows: Iterable[list[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [for_csv(value) for value in row] for row in [head, *rows]
    )
    write_atomically(path, text.getvalue())


def write_cells(rows: Sequence[dict[str, Any]], csv_path: Path, parquet_path: Path) -> None:
    """Write all cells as one table, for other programs."""
    import pyarrow
    from pyarrow import parquet

    columns = list(dict.fromkeys(name for row in rows for name in row))
    write_csv(csv_path, columns, ([row.get(name) for name in columns] for row in rows))
    columnar = pyarrow.table(
        {encodable(name): _one_type([row.get(name) for row in rows]) for name in columns}
    )
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(columnar, sink)
    write_atomically(parquet_path, sink.getvalue().to_pybytes())


def _one_type(values: list[Any]) -> list[Any]:
    """Convert all values to text if any of them is text: a clip may be 0.9 or "search"."""
    if any(isinstance(value, str) for value in values):
        return [None if value is None else encodable(str(value)) for value in values]
    return values
