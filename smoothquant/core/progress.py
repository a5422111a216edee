"""Progress bars for terminals and notebooks; logs get none."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm


def progress_bar(*args: Any, shown: bool = True, **settings: Any) -> tqdm:
    """A `tqdm` bar, hidden if stderr is not a terminal or `shown` is False."""
    return tqdm(*args, disable=None if shown else True, **settings)
