"""Progress bars for terminals and notebooks; logs get none."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm


def progress_bar(*args: Any, shown: bool = True, **settings: Any) -> tqdm:
    """A `tqdm` bar in a terminal or a notebook; hidden elsewhere and with shown=False."""
    # tqdm takes a notebook without ipywidgets for a log file
    ipython = sys.modules.get("IPython")
    in_notebook = ipython is not None and hasattr(ipython.get_ipython(), "kernel")
    return tqdm(*args, disable=not shown or (False if in_notebook else None), **settings)
