"""Facts about tensors and dtypes."""

from __future__ import annotations

import torch
from torch import Tensor


def largest_magnitude(tensor: Tensor) -> Tensor:
    """max|t|, 0-d; NaN where there is one, 0 of nothing. Unlike isfinite, it takes no memory."""
    if tensor.numel() == 0:
        return tensor.new_zeros(())
    return torch.stack(torch.aminmax(tensor.detach())).abs().max()


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are."""
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
    return str(dtype).removeprefix("torch.")
