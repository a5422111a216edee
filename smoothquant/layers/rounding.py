"""Rounding weights: the scales in their stored precision, and rounding to the grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.config import MixedQuantConfig

SMALLEST_NORMAL = torch.finfo(torch.float32).tiny  # smaller scales become 0

# weight_scale="mse" also tries these multiples of the scale that covers the largest weight.
MSE_RATIOS = [1 - step / 40 for step in range(1, 21)]


def weight_group_scales(w4: Tensor, config: MixedQuantConfig, group_size: int) -> Tensor:
    """The scales of w4 [N, K4], rounded to their stored precision (bfloat16): fp32 [N, G].

    The scale is max|w| / q_max over the group, the row or all of w4, as ``config.weight_quant``
    says. ``weight_scale="mse"`` instead picks the multiple of it with the least squared error.
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
        per_group = (padded - rounded).square().sum(-1)
        return per_group.sum(shared, keepdim=True) if shared else per_group

    best = stored_scale(largest / q_max)
    if config.weight_scale == "mse":
        least = error(best)
        for ratio in MSE_RATIOS:
            scale = stored_scale(largest * ratio / q_max)
            scale_error = error(scale)
            best = torch.where(scale_error < least, scale, best)
            least = torch.minimum(scale_error, least)
    return best.expand(n, groups).contiguous()


def stored_scale(scale: Tensor) -> Tensor:
    """A scale rounded to its stored precision, bfloat16, as fp32; 0 if it is subnormal."""
    return torch.where(scale < SMALLEST_NORMAL, 0, scale).bfloat16().float()


def round_to_grid(w: Tensor, scale: Tensor, q_max: int) -> Tensor:
    """code * scale with the nearest code in [-q_max, q_max], in the kernels' fp32 arithmetic."""
    inverse = torch.where(scale >= SMALLEST_NORMAL, 1 / scale, 0)
    return (w * inverse).round_().clamp_(-q_max, q_max).mul_(scale)
