"""Progress bars: in a terminal and in notebooks, but not in logs."""

from __future__ import annotations

from tqdm.auto import tqdm


def progress_bar(*args, shown: bool = True, **settings) -> tqdm:
    """A `tqdm` bar. Where stderr is no terminal, or with shown=False, there is none."""
    return tqdm(*args, disable=None if shown else True, **settings)
