"""GPTQ (Frantar et al., 2022) on a weight in packed order.

Columns are rounded one by one; the columns after each one compensate for its rounding error. The
salient columns come last and are never rounded to 4 bits, so they absorb the remaining error. The
scales are chosen before the loop ("static groups"), so the loop need not follow the groups' order.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.spill import scratch
from ..kernels import ops
from .rounding import stored_scale

BLOCK = 128  # columns rounded between two matrix products

# Relative to the mean of the diagonal. Higher than the published 0.01: with tens of thousands of
# tokens, less damping overfits the calibration text and moves the model away from the 16-bit one.
DAMPING = 0.05
HESSIAN_BYTES = 1 << 30  # limit for all Hessians in memory together
DAMPING_STEPS = (1, 10, 100)  # factors on the damping, tried in turn
SWEEPS = 4  # passes of the descent over all columns


class Curvature(NamedTuple):
    """The second-order information that :func:`gptq` and :func:`descend` need about a layer input
    with K channels, K4 of them INT4.

    factor: float32 [K, K], from :func:`inverse_factor`.
    hessian: float32 [K4, K4], the inverse of U^T U, where U is the leading K4 x K4 block of factor.
    follow: float32 [K4, K - K4], maps errors in the INT4 columns to the correction of the salient
        columns.
    """

    factor: Tensor
    hessian: Tensor
    follow: Tensor


def inverse_factor(hessian: Tensor, damping: float, spill: Path | None = None) -> Tensor | None:
    """The upper Cholesky factor U of the inverse of a damped Hessian: inverse = U^T U.

    Overwrites the Hessian and needs a temporary float64 [K, K].

    Args:
        hessian: float32 [K, K] on the CPU, sum of x x^T over the calibration tokens.
        damping: multiple of the mean of the diagonal that is added to the diagonal.
        spill: folder for the temporary matrix; None keeps it in memory.

    Returns:
        float32 [K, K], in the memory of `hessian`; None if not even a hundred times the damping
        makes the Hessian positive definite.
    """
    diagonal = hessian.diagonal().double()
    unused = diagonal <= 0  # channels that are always 0
    mean = diagonal[~unused].mean() if (~unused).any() else torch.tensor(1.0)
    matrix = scratch(hessian.shape, torch.float64, spill)
    failed = torch.empty((), dtype=torch.int32)
    for step in DAMPING_STEPS:
        # Rotated by 180 degrees, the Hessian is L L^T; U is the inverse of L, rotated back. All in
        # place, because K may be large.
        _rotate(hessian, matrix)
        matrix.diagonal()[:] += step * damping * mean
        matrix.diagonal()[unused.flip(0)] = mean
        torch.linalg.cholesky_ex(matrix.mT, upper=True, out=(matrix.mT, failed))
        if failed == 0:
            _invert_lower(matrix)
            if not len(matrix) or all(b.float().isfinite() for b in torch.aminmax(matrix)):
                _rotate(matrix, hessian)
                return hessian
    return None


def curvature(factor: Tensor, k4: int, spill: Path | None = None) -> Curvature:
    """The `Curvature` of a layer input with k4 INT4 channels.

    The result holds a copy of the factor. Copy and Hessian reuse the memory of the float64 [K, K]
    in which the Hessian is computed.

    Args:
        factor: float32 [K, K], from `inverse_factor`.
        spill: folder for that memory; None keeps it in memory.
    """
    k = len(factor)
    doubles = scratch((k * k,), torch.float64, spill)
    floats = doubles.view(torch.float32)
    # Transposed, LAPACK's layout, so that torch makes no copy.
    corner = floats[: k4 * k4].view(k4, k4).mT.copy_(factor[:k4, :k4])
    follow = torch.linalg.solve_triangular(corner, factor[:k4, k4:], upper=True)
    inverse = doubles[: k4 * k4].view(k4, k4).mT
    inverse.copy_(factor[:k4, :k4])
    torch.cholesky_inverse(inverse, upper=True, out=inverse)
    # In ascending order: no float overwrites a double that is still to be read.
    for part in _blocks(k4 * k4, max(1, BLOCK * k)):
        floats[part] = doubles[part].float()
    factor_copy = floats[k * k :].view(k, k).copy_(factor)
    return Curvature(factor_copy, floats[: k4 * k4].view(k4, k4).mT, follow)


def _rotate(source: Tensor, target: Tensor) -> None:
    """Copy a matrix [K, K], rotated by 180 degrees, in blocks of rows."""
    k = len(source)
    for rows in _blocks(k, BLOCK):
        target[rows] = source[k - rows.stop : k - rows.start].flip(0, 1)


def _invert_lower(matrix: Tensor) -> None:
    """Invert a lower triangular matrix [K, K] in place."""
    for rows in _blocks(len(matrix), BLOCK):
        eye = torch.eye(rows.stop - rows.start, dtype=matrix.dtype)
        corner = torch.linalg.solve_triangular(matrix[rows, rows], eye, upper=False)
        before = slice(0, rows.start)
        matrix[rows, before] = -corner @ (matrix[rows, before] @ matrix[before, before])
        matrix[rows, rows] = corner


def gptq(
    weight: Tensor, factor: Tensor, scales: Tensor, k4: int, group_size: int, num_bits: int
) -> Tensor:
    """Round the first k4 columns of a weight to their grids by GPTQ.

    Args:
        weight: float32 [N, K] in packed order, with the INT4 part rotated if the layer rotates.
        factor: [K, K] from :func:`inverse_factor`, for inputs in the same order and rotation.
        scales: float32 [N, G], the stored scales of the INT4 groups.
        k4: number of INT4 columns.

    Returns:
        float32 [N, K]: code * scale in the first k4 columns; the salient columns compensate.
    """
    weight = weight.clone()
    for columns in _blocks(k4, BLOCK):
        block = weight[:, columns].contiguous()
        u = factor[columns, columns].contiguous()
        errors = ops.gptq_block(block, u, scales, columns.start, group_size, num_bits)
        weight[:, columns] = block
        weight[:, columns.stop :] -= errors @ factor[columns, columns.stop :]
    return weight


def descend(
    weight: Tensor,
    rounded: Tensor,
    input_curvature: Curvature,
    scales: Tensor,
    group_size: int,
    num_bits: int,
    *,
    move_scales: bool = True,
) -> None:
    """Reduce the output error of a weight rounded by GPTQ, by coordinate descent.

    GPTQ rounds each column once, before the later columns are known. Here each column and each
    group's scale moves to its optimum given all others (as in QuantEase, Behdin et al., 2023),
    SWEEPS times. The salient columns are always at their optimum.

    Args:
        weight: float32 [N, K], the weight before rounding.
        rounded: float32 [N, K], the result of :func:`gptq`; updated in place.
        input_curvature: the result of :func:`curvature` for the factor given to `gptq`.
        scales: float32 [N, G], those given to `gptq`; updated in place.
        group_size, num_bits: as in `gptq`.
        move_scales: also optimize the scales; must be False if several groups share a scale.
    """
    # With the salient columns at their optimum, the output error is tr(error hessian error^T).
    hessian = input_curvature.hessian
    k4 = len(hessian)
    error = weight[:, :k4] - rounded[:, :k4]
    for _ in range(SWEEPS if k4 else 0):
        if move_scales:
            _descend_scales(rounded, error, hessian, scales, k4, group_size)
        for columns in _blocks(k4, BLOCK):
            block = rounded[:, columns].contiguous()
            h = hessian[columns, columns].contiguous()
            gradient = error @ hessian[:, columns]
            ops.descend_block(block, gradient, h, scales, columns.start, group_size, num_bits)
            rounded[:, columns] = block
            error[:, columns] = weight[:, columns] - block
    rounded[:, k4:] = weight[:, k4:] - error @ input_curvature.follow


def _blocks(columns: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, columns)) for start in range(0, columns, size))


def _descend_scales(
    rounded: Tensor, error: Tensor, hessian: Tensor, scales: Tensor, k4: int, group_size: int
) -> None:
    """Move each group's scale to its optimum for the current codes.

    Updates rounded, error and scales in place.
    """
    for group, columns in enumerate(_blocks(k4, group_size)):
        scale = scales[:, group]
        codes = rounded[:, columns] / torch.where(scale > 0, scale, 1).unsqueeze(1)
        second_derivative = ((codes @ hessian[columns, columns]) * codes).sum(1)
        slope = ((error @ hessian[:, columns]) * codes).sum(1)
        step = torch.where(second_derivative > 0, slope / second_derivative, 0)
        best = scale + step
        stored = stored_scale(best)
        # Rounded to its stored precision, the new scale may be further from the optimum.
        better = (stored > 0) & ((stored - best).abs() < (scale - best).abs())
        scales[:, group] = torch.where(better, stored, scale)
        moved = codes.round() * scales[:, group].unsqueeze(1)
        error[:, columns] -= moved - rounded[:, columns]
        rounded[:, columns] = moved
