"""The one exception of its own that the package raises."""

from __future__ import annotations


class CheckpointError(Exception):
    """A file is broken or not what it claims to be; the message names file and tensor."""
