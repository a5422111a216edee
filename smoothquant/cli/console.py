"""Error reporting and output shared by the commands."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ..core.messages import REPORTED_ERRORS, in_words, one_line, option_words, shortened
from ..core.progress import without_bars

# Not exported by Typer. Its other subclasses stand for unknown commands and options.
UsageError: Any = typer.BadParameter.__base__

NUMERIC = set("0123456789,.")
INTERRUPTED = 130  # 128 + SIGINT, as shells report it

# The options that every command has which does not pass its arguments on.
OUTPUT_OPTIONS = {
    "as_json": typer.Option("--json", help="Print only the result, as JSON, to stdout."),
    "quiet": typer.Option("--quiet", "-q", help="Print no progress, notes or warnings."),
    "verbose": typer.Option("--verbose", help="Print log messages, and tracebacks of errors."),
}


@contextlib.contextmanager
def errors_as_exit_codes(words: Mapping[str, str], *, traceback: bool = False) -> Iterator[None]:
    """Turn an error into one line on stderr and exit code 1, and Ctrl-C into exit code 130.

    Args:
        words: what the command calls the arguments of Python functions, from `option_words`.
        traceback: let errors through, as with MIXEDQUANT_TRACEBACK.
    """
    try:
        yield
    except (typer.Exit, UsageError, BrokenPipeError):  # typer handles these
        raise
    except KeyboardInterrupt:
        typer.echo("\nsmoothquant: interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except REPORTED_ERRORS as error:
        if traceback or os.environ.get("MIXEDQUANT_TRACEBACK"):
            raise
        typer.echo(f"smoothquant: error: {one_line(error, words)}", err=True)
        raise typer.Exit(1) from None


class Command(TyperCommand):
    """A command that reports errors as one line on stderr and an exit code; with --json, also as
    JSON on stdout."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        words = option_words(self.params)
        with errors_as_exit_codes(words, traceback=bool(ctx.params.get("verbose"))):
            try:
                return super().invoke(ctx)
            except REPORTED_ERRORS as error:
                if ctx.params.get("as_json"):
                    print_json({"ok": False, "error": in_words(str(error), words)})
                raise


def with_output_options(function: Callable, *, prints_result: bool) -> Callable:
    """Give a command the options in `OUTPUT_OPTIONS`.

    Args:
        function: the command. It prints text, and returns its result for --json.
        prints_result: the text is what one runs the command for, so --quiet does not hide it.
    """

    @functools.wraps(function)
    def command(
        *args: Any,
        as_json: bool = False,
        quiet: bool = False,
        verbose: bool = False,
        **kwargs: Any,
    ) -> None:
        if quiet and verbose:
            raise typer.BadParameter("--quiet cannot be combined with --verbose")
        with contextlib.ExitStack() as stack:
            if quiet:
                stack.enter_context(_quiet())
            if verbose:
                stack.enter_context(_verbose())
            if as_json or (quiet and not prints_result):
                stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            result = function(*args, **kwargs)
        if as_json:
            print_json(result)

    signature = inspect.signature(function, eval_str=True)
    added = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option]
        )
        for name, option in OUTPUT_OPTIONS.items()
    ]
    command.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), *added]
    )
    return command


@contextlib.contextmanager
def _log_level(level: int) -> Iterator[None]:
    logger = logging.getLogger("smoothquant")
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Variables that packages read when they are imported, which is later; unless they are set."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    bars = _environment(HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error")
    with bars, without_bars(), _log_level(logging.ERROR), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _verbose() -> Iterator[None]:
    logging.basicConfig(format="%(name)s: %(message)s")
    with _environment(TRANSFORMERS_VERBOSITY="info"), _log_level(logging.DEBUG):
        yield


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
