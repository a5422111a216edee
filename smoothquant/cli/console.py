"""What the commands of `smoothquant.cli` have in common: how they fail, and how they print."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import typer

from ..core.errors import CheckpointError

FAULTS = (
    ValueError, TypeError, CheckpointError, RuntimeError, OSError, ImportError, MemoryError,
)  # fmt: skip

NUMERALS = set("0123456789,.")
INTERRUPTED = 130  # what shells report for Ctrl-C


@contextlib.contextmanager
def faults_as_exit_codes() -> Iterator[None]:
    """A fault inside becomes one line on stderr and exit code 1, Ctrl-C 130."""
    try:
        yield
    except (typer.Exit, typer.BadParameter, BrokenPipeError):  # typer knows what to do
        raise
    except KeyboardInterrupt:
        typer.echo("\nsmoothquant: interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except FAULTS as error:
        if os.environ.get("MIXEDQUANT_TRACEBACK"):
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        typer.echo(f"smoothquant: error: {said}", err=True)
        raise typer.Exit(1) from None


def stdout_for_json(as_json: bool) -> contextlib.AbstractContextManager:
    """Inside, what other code prints goes to stderr if stdout is to hold JSON alone."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()


def print_json(value: Mapping[str, Any]) -> None:
    """JSON that every parser reads: NaN and Inf, which JSON has not, become null."""
    typer.echo(json.dumps(_finite(value), indent=1, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Columns, numbers to the right, under a head."""
    lines = [[str(part) for part in line] for line in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        parts = [
            part.rjust(width) if set(part) <= NUMERALS else part.ljust(width)
            for part, width in zip(line, widths, strict=True)
        ]
        typer.echo("  ".join(parts).rstrip())


def print_bytes(before: Mapping[str, int], after: Mapping[str, int]) -> None:
    """A table of bytes by kind, two models beside each other."""
    kinds = dict.fromkeys([*before, *after])
    rows = [(kind, f"{before.get(kind, 0):,}", f"{after.get(kind, 0):,}") for kind in kinds]
    totals = (f"{sum(before.values()):,}", f"{sum(after.values()):,}")
    typer.echo()
    print_table(("bytes", "before", "after"), [*rows, ("all", *totals)])


def print_memory(memory: Mapping[str, int]) -> None:
    """A table of peak memory by what needs it."""
    rows = [(part, f"{size:,}") for part, size in memory.items()]
    typer.echo()
    print_table(("peak memory", "bytes"), [*rows, ("all", f"{sum(memory.values()):,}")])
