"""Shapes and dtypes of packed weights (docs/format.md)."""

from __future__ import annotations

import torch

PANEL = 16
QUAD = 4
BLOCK_BYTES = 64
SEGMENT_QUADS = 128
PACKED = ("qweight", "scales", "salient_weight", "salient_scales")  # of a packed weight


def num_groups(cols: int, group_size: int) -> int:
    return -(-cols // group_size)


def num_quads(k4: int, group_size: int) -> tuple[int, int, int]:
    """Groups of k4 channels, quads of a whole group, quads of the last one."""
    groups = num_groups(k4, group_size)
    last = k4 - (groups - 1) * group_size
    return groups, -(-min(group_size, k4) // QUAD), -(-last // QUAD)


def packed_shapes(
    out_features: int, in_features: int, num_salient: int, group_size: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shapes of (qweight, scales, salient_weight, salient_scales) for a linear
    [out_features, in_features]; the last one only beside an int8 salient_weight."""
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
    """Dtypes of the same four; None where there is no such tensor."""
    of_scales = torch.bfloat16 if salient_dtype == torch.int8 else None
    return torch.uint8, torch.bfloat16, salient_dtype, of_scales
