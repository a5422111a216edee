"""Stored results as rows, one per evaluated model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .grid import Cell
from .store import Store

MIB = 1024 * 1024


@dataclass(frozen=True)
class Row:
    """An evaluated model.

    Args:
        config: its settings; None for the unquantized model.
        result: its result, with the run record under "run".
        cell: the cell that produced it.
    """

    config: dict[str, Any] | None
    result: dict[str, Any]
    cell: Cell | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """`config`, of a row that is not the unquantized model."""
        assert self.config is not None
        return self.config

    @property
    def method(self) -> str:
        """The recipe, or the name of the other method; "" for the unquantized model."""
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
    """Return a row for every finished evaluation among `cells`, in order."""
    rows = []
    for cell in cells:
        result = store.get(cell) if cell.task in ("baseline", "quantized") else None
        if result is not None:
            rows.append(Row(None if cell.config is None else dict(cell.config), result, cell))
    return rows


def front(rows: Iterable[Row]) -> list[Row]:
    """Return the Pareto front of perplexity against model size, smallest model first.

    These are the packed models for which no other model is as small and better.
    """
    best: list[Row] = []
    for row in sorted(filter(is_packed, rows), key=lambda r: (r.size_mib, r.result["perplexity"])):
        if not best or row.result["perplexity"] < best[-1].result["perplexity"]:
            best.append(row)
    return best


def is_packed(row: Row) -> bool:
    """Whether the model has packed weights (so its size is real) and a finite perplexity."""
    return (row.config or {}).get("backend") == "int4" and row.result["perplexity"] is not None


def percent(share: float) -> str:
    return f"{100 * share:g} %"


def windows_text(count: int, seqlen: int) -> str:
    return f"{count} window{'' if count == 1 else 's'} of {seqlen:,} tokens"


def by_layer_and_kind(
    errors: Sequence[dict[str, Any]], comparison: str
) -> tuple[list[str], list[int | None], dict[tuple[int | None, str], float | None]]:
    """Arrange the errors of a "layers" cell for one comparison.

    Returns:
        (kinds, layers, {(layer, kind): decibels or None}).
    """
    kinds = list(dict.fromkeys(error["kind"] for error in errors))
    layers = list(dict.fromkeys(error["layer"] for error in errors))
    return kinds, layers, {(e["layer"], e["kind"]): e["decibels"][comparison] for e in errors}


def layer_name(layer: int | None) -> str:
    return "-" if layer is None else str(layer)
