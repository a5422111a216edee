"""GPTQ (Frantar et al., 2022) on a weight in packed order: round columns one after the other, each
rounding error made good by the columns still to come.

The salient columns come last and are never rounded to 4 bits, so they absorb what is left. Scales
are chosen before the loop ("static groups"), so groups need not follow the loop's order.
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

BLOCK = 128  # columns between two matrix products

# Of the mean diagonal. More than the published 0.01: with tens of thousands of tokens less damping
# follows the calibration text too closely and the model moves away from the 16-bit one.
DAMPING = 0.05
HESSIAN_BYTES = 1 << 30  # of Hessians held at a time
DAMPING_STEPS = (1, 10, 100)
SWEEPS = 4  # of the descent over all columns


class Curvature(NamedTuple):
    """What :func:`gptq` and :func:`descend` ask of a layer input with K channels, K4 of them INT4.

    factor: float32 [K, K], from :func:`inverse_factor`. hessian: float32 [K4, K4], the inverse of
    U^T U for the factor's first K4 rows and columns U. follow: float32 [K4, K - K4], what the
    salient columns take on of errors in the others.
    """

    factor: Tensor
    hessian: Tensor
    follow: Tensor


def inverse_factor(hessian: Tensor, damping: float, spill: Path | None = None) -> Tensor | None:
    """The upper Cholesky factor U of the inverse of a damped Hessian (inverse = U^T U), put into
    the Hessian's place; None where no damping up to a hundred times the given one makes it positive
    definite. Holds a float64 [K, K] beside it.

    Args:
        hessian: float32 [K, K] on the CPU, sum of x x^T over the calibration tokens.
        damping: share of the mean diagonal that is added to the diagonal.
        spill: a folder for the float64 matrix's file; None: memory.
    """
    diagonal = hessian.diagonal().double()
    unused = diagonal <= 0  # a channel that is always 0 says nothing about its weights
    mean = diagonal[~unused].mean() if (~unused).any() else torch.tensor(1.0)
    matrix = scratch(hessian.shape, torch.float64, spill)
    failed = torch.empty((), dtype=torch.int32)
    for step in DAMPING_STEPS:
        # Turned by 180 degrees it is L L^T with a lower L; turned back, the inverse of L is U. All
        # in one place, for K may be large.
        _turn(hessian, matrix)
        matrix.diagonal()[:] += step * damping * mean
        matrix.diagonal()[unused.flip(0)] = mean
        torch.linalg.cholesky_ex(matrix.mT, upper=True, out=(matrix.mT, failed))
        if failed == 0:
            _invert_lower(matrix)
            if not len(matrix) or all(b.float().isfinite() for b in torch.aminmax(matrix)):
                _turn(matrix, hessian)
                return hessian
    return None


def curvature(factor: Tensor, k4: int, spill: Path | None = None) -> Curvature:
    """All that rounding needs, from a factor that may be forgotten: its copy and the Hessian lie in
    what was a float64 [K, K] while the latter was computed. spill: as for `inverse_factor`."""
    k = len(factor)
    doubles = scratch((k * k,), torch.float64, spill)
    floats = doubles.view(torch.float32)
    # transposed, as LAPACK has matrices, so nothing is copied
    corner = floats[: k4 * k4].view(k4, k4).mT.copy_(factor[:k4, :k4])
    follow = torch.linalg.solve_triangular(corner, factor[:k4, k4:], upper=True)
    inverse = doubles[: k4 * k4].view(k4, k4).mT
    inverse.copy_(factor[:k4, :k4])
    torch.cholesky_inverse(inverse, upper=True, out=inverse)
    # no value moves over one that is still to come
    for part in _blocks(k4 * k4, max(1, BLOCK * k)):
        floats[part] = doubles[part].float()
    kept = floats[k * k :].view(k, k).copy_(factor)
    return Curvature(kept, floats[: k4 * k4].view(k4, k4).mT, follow)


def _turn(source: Tensor, target: Tensor) -> None:
    """Copy a matrix [K, K], turned by 180 degrees, a few rows at a time."""
    k = len(source)
    for rows in _blocks(k, BLOCK):
        target[rows] = source[k - rows.stop : k - rows.start].flip(0, 1)


def _invert_lower(matrix: Tensor) -> None:
    """Put the inverse of a lower triangular matrix [K, K] into its place."""
    for rows in _blocks(len(matrix), BLOCK):
        eye = torch.eye(rows.stop - rows.start, dtype=matrix.dtype)
        corner = torch.linalg.solve_triangular(matrix[rows, rows], eye, upper=False)
        before = slice(0, rows.start)
        matrix[rows, before] = -corner @ (matrix[rows, before] @ matrix[before, before])
        matrix[rows, rows] = corner


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
    of_input: Curvature,
    scales: Tensor,
    group_size: int,
    num_bits: int,
    *,
    own_scales: bool = True,
) -> None:
    """Bring what GPTQ rounded nearer to the weight, by coordinate descent.

    GPTQ rounds every column once, when the later ones are still to come. Here each column, and each
    group's scale, moves to the best place that all the others leave it (as in QuantEase, Behdin et
    al., 2023), SWEEPS times over, the salient columns being at their optimum all along.

    Args:
        weight: float32 [N, K], the weight that was rounded.
        rounded: float32 [N, K], what :func:`gptq` made of it; in place.
        of_input: what :func:`curvature` made of the factor that it was rounded by.
        scales: float32 [N, G], as there; in place.
        group_size, num_bits: as there.
        own_scales: whether every scale may move; not where groups share one.
    """
    # With the salient columns at their optimum, the error of the outputs is tr(left hessian left^T)
    hessian = of_input.hessian
    k4 = len(hessian)
    left = weight[:, :k4] - rounded[:, :k4]
    for _ in range(SWEEPS if k4 else 0):
        if own_scales:
            _descend_scales(rounded, left, hessian, scales, k4, group_size)
        for columns in _blocks(k4, BLOCK):
            block = rounded[:, columns].contiguous()
            h = hessian[columns, columns].contiguous()
            gradient = left @ hessian[:, columns]
            ops.descend_block(block, gradient, h, scales, columns.start, group_size, num_bits)
            rounded[:, columns] = block
            left[:, columns] = weight[:, columns] - block
    rounded[:, k4:] = weight[:, k4:] - left @ of_input.follow


def _blocks(columns: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, columns)) for start in range(0, columns, size))


def _descend_scales(
    rounded: Tensor, left: Tensor, hessian: Tensor, scales: Tensor, k4: int, group_size: int
) -> None:
    """Move each group's scale to its best place, codes as they are; all but hessian in place."""
    for group, columns in enumerate(_blocks(k4, group_size)):
        scale = scales[:, group]
        codes = rounded[:, columns] / torch.where(scale > 0, scale, 1).unsqueeze(1)
        bend = ((codes @ hessian[columns, columns]) * codes).sum(1)
        slope = ((left @ hessian[:, columns]) * codes).sum(1)
        best = scale + torch.where(bend > 0, slope / bend, 0)
        stored = stored_scale(best)
        # as it is stored, a scale may be further off than the one before
        better = (stored > 0) & ((stored - best).abs() < (scale - best).abs())
        scales[:, group] = torch.where(better, stored, scale)
        moved = codes.round() * scales[:, group].unsqueeze(1)
        left[:, columns] -= moved - rounded[:, columns]
        rounded[:, columns] = moved
