"""Large tensors that may lie on the disk: mapped from files, which the system writes out, and
forgets where memory is short."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


def scratch(shape: Sequence[int], dtype: torch.dtype, folder: Path | None) -> Tensor:
    """A tensor on the CPU, its values unset: in memory, or in a file of its own that goes when the
    tensor does.

    Args:
        folder: for the file, made if it is not there; None for memory.

    Raises:
        OSError: the disk has no room for it, where the system can reserve room.
    """
    size = math.prod(shape)
    if folder is None or not size:
        return torch.empty(shape, dtype=dtype)
    folder.mkdir(exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=folder)
    try:
        # a page that finds the disk full when it is written to would end the process
        if hasattr(os, "posix_fallocate"):
            _reserve(descriptor, size * dtype.itemsize, folder)
        return torch.from_file(name, shared=True, size=size, dtype=dtype).view(shape)
    finally:
        os.close(descriptor)
        os.unlink(name)


def _reserve(descriptor: int, size: int, folder: Path) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        words = f"{os.strerror(error.errno)} for {size:,} bytes"
        raise OSError(error.errno, words, str(folder)) from error
