"""The grid that a weight is rounded to: its scales as they are stored, and its codes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.config import MixedQuantConfig

SMALLEST_NORMAL = torch.finfo(torch.float32).tiny  # smaller scales count as 0

# What weight_scale="mse" tries besides the scale that covers the largest weight: shares of it.
MSE_RATIOS = [1 - step / 40 for step in range(1, 21)]


def weight_group_scales(w4: Tensor, config: MixedQuantConfig, group_size: int) -> Tensor:
    """The scales of w4 [N, K4] as they are stored, rounded to bfloat16: fp32 [N, G].

    The largest scale is max|w| / q_max over the group, the row or all of w4, by
    ``config.weight_quant``; "mse" takes the share of it that gives the least squared error there.
    """
    n, k4 = w4.shape
    groups = -(-k4 // group_size)
    if n == 0 or k4 == 0:
        return torch.zeros(n, groups)
    q_max = 2 ** (config.num_bits - 1) - 1
    padded = F.pad(w4.float(), (0, groups * group_size - k4)).unflatten(1, (groups, group_size))
    shared = {"per_group": (), "per_channel": (1,), "per_tensor": (0, 1)}[config.weight_quant]
    largest = padded.abs().amax(-1)
    if shared:
        largest = largest.amax(shared, keepdim=True)

    def error(scale: Tensor) -> Tensor:
        rounded = round_to_grid(padded, scale.unsqueeze(-1), q_max)
        by_group = (padded - rounded).square().sum(-1)
        return by_group.sum(shared, keepdim=True) if shared else by_group

    best = stored_scale(largest / q_max)
    if config.weight_scale == "mse":
        least = error(best)
        for ratio in MSE_RATIOS:
            scale = stored_scale(largest * ratio / q_max)
            of_scale = error(scale)
            best = torch.where(of_scale < least, scale, best)
            least = torch.minimum(of_scale, least)
    return best.expand(n, groups).contiguous()


def stored_scale(scale: Tensor) -> Tensor:
    """A scale as it is stored: rounded to bfloat16, 0 below the smallest normal number; fp32."""
    return torch.where(scale < SMALLEST_NORMAL, 0, scale).bfloat16().float()


def round_to_grid(w: Tensor, scale: Tensor, q_max: int) -> Tensor:
    """code * scale for the nearest code in [-q_max, q_max], as the kernels compute it; fp32."""
    inverse = torch.where(scale >= SMALLEST_NORMAL, 1 / scale, 0)
    return (w * inverse).round_().clamp_(-q_max, q_max).mul_(scale)
