"""Shapes and dtypes of packed weights (format: docs/format.md), and limits of the kernels."""

from __future__ import annotations

import torch

PANEL = 16
QUAD = 4
BLOCK_BYTES = 64
SEGMENT_QUADS = 128
MIN_CLIP = 2.0**-10  # smallest ratio that activations may be clipped by
PACKED = ("qweight", "scales", "salient_weight", "salient_scales")  # tensors of a packed weight


def num_groups(cols: int, group_size: int) -> int:
    """ceil(cols / group_size)."""
    return -(-cols // group_size)


def num_quads(k4: int, group_size: int) -> tuple[int, int, int]:
    """(groups, quads per full group, quads in the last group) of k4 INT4 channels."""
    groups = num_groups(k4, group_size)
    last = k4 - (groups - 1) * group_size
    return groups, -(-min(group_size, k4) // QUAD), -(-last // QUAD)


def divides_evenly(k4: int, group_size: int, parts: int) -> bool:
    """Whether each of `parts` slices of k4 INT4 channels has whole groups in whole blocks."""
    size, remainder = divmod(k4, parts)
    groups, rest = divmod(size, group_size)
    return not (remainder or rest or groups * -(-group_size // QUAD) % 2)


def packed_shapes(
    out_features: int, in_features: int, num_salient: int, group_size: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shapes of the tensors in `PACKED`; salient_scales exists only for int8 salient weights."""
    panels = -(-out_features // PANEL)
    groups, group_quads, last_quads = num_quads(in_features - num_salient, group_size)
    quads = (groups - 1) * group_quads + last_quads if groups else 0
    return (
        (panels, -(-quads // 2), BLOCK_BYTES),
        (panels, groups, PANEL),
        (panels, num_salient, PANEL),
        (panels, PANEL),
    )


def packed_dtypes(
    salient_dtype: torch.dtype,
) -> tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype | None]:
    """Dtypes of the tensors in `PACKED`; None for a missing salient_scales."""
    salient_scales = torch.bfloat16 if salient_dtype == torch.int8 else None
    return torch.uint8, torch.bfloat16, salient_dtype, salient_scales
