"""What a sweep measured: the stored results, a row per evaluated model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .grid import Cell
from .store import Store

MIB = 1024 * 1024


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
    for row in sorted(filter(is_packed, rows), key=lambda r: (r.size_mib, r.result["perplexity"])):
        if not best or row.result["perplexity"] < best[-1].result["perplexity"]:
            best.append(row)
    return best


def is_packed(row: Row) -> bool:
    """Whether a row's bytes are real, and its perplexity a number."""
    return (row.config or {}).get("backend") == "int4" and row.result["perplexity"] is not None


def percent(share: float) -> str:
    return f"{100 * share:g} %"


def windows_text(count: int, seqlen: int) -> str:
    return f"{count} window{'' if count == 1 else 's'} of {seqlen:,} tokens"


def by_layer_and_kind(errors: Sequence[dict[str, Any]], of: str) -> tuple[list, list, dict]:
    """(kinds, layers, {(layer, kind): decibels or None})."""
    kinds = list(dict.fromkeys(error["kind"] for error in errors))
    layers = list(dict.fromkeys(error["layer"] for error in errors))
    return kinds, layers, {(e["layer"], e["kind"]): e["decibels"][of] for e in errors}


def layer_name(layer: int | None) -> str:
    return "-" if layer is None else str(layer)
