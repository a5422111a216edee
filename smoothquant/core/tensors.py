"""Checks on tensors, and the names of dtypes."""

from __future__ import annotations

import torch
from torch import Tensor


def largest_magnitude(tensor: Tensor) -> Tensor:
    """max|t|, 0-d; NaN if any value is NaN, 0 for an empty tensor.

    Allocates no temporary of the tensor's size, as isfinite would.
    """
    if tensor.numel() == 0:
        return tensor.new_zeros(())
    return torch.stack(torch.aminmax(tensor.detach())).abs().max()


def is_finite(tensor: Tensor) -> bool:
    """Whether the tensor holds neither NaN nor Inf."""
    return bool(largest_magnitude(tensor).isfinite())


def is_permutation(perm: Tensor, k: int) -> bool:
    """Whether perm holds each of 0 ... k-1 once."""
    return perm.shape == (k,) and torch.equal(perm.sort().values.long().cpu(), torch.arange(k))


DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}

FLOATS = {torch.float32, torch.float16, torch.bfloat16}


def dtype_name(dtype: torch.dtype) -> str:
    """The name without "torch.", a key of `DTYPES`."""
    return str(dtype).removeprefix("torch.")
