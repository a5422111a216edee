"""Large tensors that may lie on the disk: mapped from files, which the system writes out and
forgets where memory is short."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor


def empty(shape: Sequence[int], dtype: torch.dtype, folder: Path | None) -> Tensor:
    """A tensor on the CPU, its values unset: in memory, or in a file of its own that goes when the
    tensor does.

    Args:
        folder: for the file, made if it is not there; None for memory.

    Raises:
        OSError: the disk has no room for it.
    """
    size = math.prod(shape)
    if folder is None or not size:
        return torch.empty(shape, dtype=dtype)
    folder.mkdir(exist_ok=True)
    descriptor, name = tempfile.mkstemp(suffix=".bin", dir=folder)
    try:
        # a page that finds the disk full when it is written to would end the process
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size * dtype.itemsize)
        return torch.from_file(name, shared=True, size=size, dtype=dtype).view(*shape)
    finally:
        os.close(descriptor)
        with suppress(OSError):  # Windows keeps a mapped file, until its folder goes
            os.unlink(name)
