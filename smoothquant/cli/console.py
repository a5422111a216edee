"""Error reporting and output shared by the commands."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from ..core.messages import REPORTED_ERRORS, one_line, option_words, shortened

# Not exported by Typer. Its other subclasses stand for unknown commands and options.
UsageError: Any = typer.BadParameter.__base__

NUMERIC = set("0123456789,.")
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


@contextlib.contextmanager
def errors_as_exit_codes(words: Mapping[str, str]) -> Iterator[None]:
    """Turn an error into one line on stderr and exit code 1, and Ctrl-C into exit code 130.

    words: what the command calls the arguments of Python functions, from `option_words`.
    """
    try:
        yield
    except (typer.Exit, UsageError, BrokenPipeError):  # typer handles these
        raise
    except KeyboardInterrupt:
        typer.echo("\nsmoothquant: interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except REPORTED_ERRORS as error:
        if os.environ.get("MIXEDQUANT_TRACEBACK"):
            raise
        typer.echo(f"smoothquant: error: {one_line(error, words)}", err=True)
        raise typer.Exit(1) from None


class Command(TyperCommand):
    """A command that reports errors as one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with errors_as_exit_codes(option_words(self.params)):
            return super().invoke(ctx)


class Group(TyperGroup):
    """The program; keeps Typer's messages about wrong usage short, too."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Parse the program's own options."""
        with _short_usage_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """Parse the rest of the command line and run the command."""
        with _short_usage_errors():
            return super().invoke(ctx)


@contextlib.contextmanager
def _short_usage_errors() -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        error.message = shortened(error.message)
        raise


def prepare_streams() -> None:
    """Print characters that stdout cannot encode as escapes; keep progress bars out of logs."""
    if not sys.stderr.isatty():  # transformers' own bars, which appear in any stream
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def stdout_for_json(as_json: bool) -> contextlib.AbstractContextManager:
    """Send prints to stderr if stdout is reserved for JSON."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()


def print_json(value: Mapping[str, Any]) -> None:
    """Print strict JSON; NaN and Inf, which it cannot represent, become null."""
    typer.echo(json.dumps(_finite(value), indent=1, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print aligned columns under a header, numbers right-aligned.

    Not rich's Table, which fits columns to the terminal, or to 80 columns in a pipe.
    """
    lines = [[str(part) for part in line] for line in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        parts = [
            part.rjust(width) if set(part) <= NUMERIC else part.ljust(width)
            for part, width in zip(line, widths, strict=True)
        ]
        typer.echo("  ".join(parts).rstrip())


def print_bytes(before: Mapping[str, int], after: Mapping[str, int]) -> None:
    """Print the sizes of two models side by side, by kind of tensor."""
    kinds = dict.fromkeys([*before, *after])
    rows = [(kind, f"{before.get(kind, 0):,}", f"{after.get(kind, 0):,}") for kind in kinds]
    totals = (f"{sum(before.values()):,}", f"{sum(after.values()):,}")
    typer.echo()
    print_table(("bytes", "before", "after"), [*rows, ("total", *totals)])


def print_memory(memory: Mapping[str, int]) -> None:
    """Print the parts of the peak memory and their total."""
    rows = [(part, f"{size:,}") for part, size in memory.items()]
    typer.echo()
    print_table(("peak memory", "bytes"), [*rows, ("total", f"{sum(memory.values()):,}")])
