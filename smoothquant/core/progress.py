"""Progress bars for terminals and notebooks; logs get none."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from tqdm.auto import tqdm

_hidden = False


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Hide all bars of this process."""
    global _hidden
    before, _hidden = _hidden, True
    try:
        yield
    finally:
        _hidden = before


def progress_bar(*args: Any, shown: bool = True, **settings: Any) -> tqdm:
    """A `tqdm` bar in a terminal or a notebook; hidden elsewhere and with shown=False."""
    # tqdm takes a notebook without ipywidgets for a log file
    ipython = sys.modules.get("IPython")
    in_notebook = ipython is not None and hasattr(ipython.get_ipython(), "kernel")
    hidden = _hidden or not shown
    return tqdm(*args, disable=hidden or (False if in_notebook else None), **settings)
