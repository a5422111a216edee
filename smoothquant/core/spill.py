"""Large scratch tensors, optionally in memory-mapped files that the system can page out."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


def scratch(shape: Sequence[int], dtype: torch.dtype, folder: Path | None) -> Tensor:
    """An uninitialized CPU tensor, in memory or in a temporary file.

    Args:
        folder: where the file goes, created if missing; None for memory. The file is deleted with
            the tensor.

    Raises:
        OSError: the disk is too full (detected only on systems that can reserve space).
    """
    size = math.prod(shape)
    if folder is None or not size:
        return torch.empty(shape, dtype=dtype)
    folder.mkdir(exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=folder)
    try:
        # Writing to a mapped page when the disk is full would kill the process.
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
        message = f"{error.strerror} for {size:,} bytes"
        raise OSError(error.errno, message, str(folder)) from error
