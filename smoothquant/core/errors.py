"""The exception class that this package defines."""

from __future__ import annotations


class CheckpointError(Exception):
    """A file is damaged or not what it claims to be; the message names the file and the tensor."""
