"""GPTQ (Frantar et al., 2022) on a weight in packed order: round columns one after the other, each
rounding error made good by the columns still to come.

The salient columns come last and are never rounded to 4 bits, so they absorb what is left. Scales
are chosen before the loop ("static groups"), so groups need not follow the loop's order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops

BLOCK = 128  # columns between two matrix products
# Of the mean diagonal. More than the published 0.01: with tens of thousands of tokens less damping
# follows the calibration text too closely and the model moves away from the 16-bit one.
DAMPING = 0.05
HESSIAN_BYTES = 1 << 30  # of Hessians held at a time
DAMPING_STEPS = (1, 10, 100)


def inverse_factor(hessian: Tensor, damping: float) -> Tensor | None:
    """The upper Cholesky factor U of the inverse of a damped Hessian (inverse = U^T U), float32
    [K, K]; None where no damping up to a hundred times the given one makes it positive definite.

    Args:
        hessian: float64 or float32 [K, K], sum of x x^T over the calibration tokens.
        damping: share of the mean diagonal that is added to the diagonal.
    """
    hessian = hessian.double()
    diagonal = hessian.diagonal()
    unused = diagonal <= 0  # a channel that is always 0 says nothing about its weights
    mean = diagonal[~unused].mean() if (~unused).any() else torch.tensor(1.0)
    for step in DAMPING_STEPS:
        damped = hessian.clone()
        damped.diagonal()[:] += step * damping * mean
        damped.diagonal()[unused] = mean
        factor, failed = torch.linalg.cholesky_ex(damped)
        if failed == 0:
            inverse = torch.cholesky_inverse(factor)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if failed == 0 and torch.isfinite(upper).all():
                return upper.float()
    return None


def gptq(
    weight: Tensor, factor: Tensor, scales: Tensor, k4: int, group_size: int, num_bits: int
) -> Tensor:
    """Round the first k4 columns of a weight to their grids, by GPTQ.

    Args:
        weight: float32 [N, K] in packed order, its INT4 part rotated if the layer rotates.
        factor: [K, K] from :func:`inverse_factor`, of inputs in the same order and rotation.
        scales: float32 [N, G] of the INT4 groups, as they will be stored.
        k4: number of INT4 columns.

    Returns:
        float32 [N, K]: code * scale in the first k4 columns; the others make good for them.
    """
    weight = weight.clone()
    for start in range(0, k4, BLOCK):
        end = min(start + BLOCK, k4)
        block = weight[:, start:end].contiguous()
        u = factor[start:end, start:end].contiguous()
        errors = ops.gptq_block(block, u, scales, start, group_size, num_bits)
        weight[:, start:end] = block
        weight[:, end:] -= errors @ factor[start:end, end:]
    return weight
