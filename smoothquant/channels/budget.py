"""How many salient channels each layer input gets, under one budget for the whole model.

Data in, data out: nothing here knows a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.config import MixedQuantConfig, layer_group_size
from ..kernels import ops
from .sorting import num_salient_channels, salient_per_block

SEARCH_STEPS = 30  # halvings of the share that a budget in bits is met by


class Demand(NamedTuple):
    """One layer input.

    rows: output channels of each matrix that reads it.
    channels: K.
    score: float64 [K], the part of the squared outputs that a channel makes; None: it takes the
        model's average share.
    blocks: equal parts of the channels that get equally many salient ones.
    """

    rows: tuple[int, ...]
    channels: int
    score: Tensor | None = None
    blocks: int = 1

    def in_blocks(self, num_salient: int) -> int:
        """What equal counts in all blocks make of num_salient."""
        return self.blocks * salient_per_block(num_salient, self.blocks)


def share_out(demands: Sequence[Demand], config: MixedQuantConfig) -> list[int]:
    """Salient channels of every layer input.

    With ``salient_allocation="uniform"`` each gets the same share of its channels; with "output"
    the channels of the whole model compete: what a channel makes of its layer's squared outputs,
    against the weights that would stay in 16 bits. The average share, weighted by weights, is that
    of "uniform". With ``config.bits`` it is the largest whose packed tensors keep to that many bits
    per weight.

    Raises:
        ValueError: not even without salient channels are the layers within ``config.bits``.
    """
    if config.bits is None:
        return _with_share(demands, config, config.salient_prop)
    none = _with_share(demands, config, 0.0)
    least = bits_per_weight(demands, none, config)
    if least > config.bits:
        raise ValueError(
            f"bits must be at least {least:.3f}, what these layers take without salient channels; "
            f"got {config.bits:g}"
        )
    low, high, best = 0.0, 1.0, none
    share = high
    for _ in range(SEARCH_STEPS):
        shares = _with_share(demands, config, share)
        if bits_per_weight(demands, shares, config) <= config.bits:
            low, best = share, shares
        else:
            high = share
        share = (low + high) / 2
    return best


def bits_per_weight(
    demands: Sequence[Demand], shares: Sequence[int], config: MixedQuantConfig
) -> float:
    """Bits of the packed tensors of all layers, permutations included, over their weights."""
    held = weights = 0
    salient_dtype = torch.int8 if config.salient_format == "int8" else torch.bfloat16
    dtypes = ops.packed_dtypes(salient_dtype)
    for demand, num_salient in zip(demands, shares, strict=True):
        for n in demand.rows:
            group_size = layer_group_size(config, demand.channels - num_salient)
            shapes = ops.packed_shapes(n, demand.channels, num_salient, group_size)
            held += 4 * demand.channels + sum(
                math.prod(shape) * dtype.itemsize
                for shape, dtype in zip(shapes, dtypes, strict=True)
                if dtype is not None
            )
            weights += n * demand.channels
    return 8 * held / max(1, weights)


def _with_share(demands: Sequence[Demand], config: MixedQuantConfig, share: float) -> list[int]:
    uniform = [d.in_blocks(num_salient_channels(d.channels, share)) for d in demands]
    competing = [i for i, demand in enumerate(demands) if demand.score is not None]
    if config.salient_allocation == "uniform" or share == 0 or not competing:
        return uniform
    worth, cost, owner = [], [], []
    for i in competing:
        rows, channels, score, _ = demands[i]
        gain = (score / score.sum().clamp(min=1e-300)).sort(descending=True).values / sum(rows)
        gain[:1] = math.inf  # every layer input has one
        worth.append(gain)
        cost.append(torch.full((channels,), sum(rows), dtype=torch.float64))
        owner.append(torch.full((channels,), i))
    order = torch.cat(worth).argsort(descending=True, stable=True)
    spent = torch.cat(cost)[order].cumsum(0)
    budget = sum(uniform[i] * sum(demands[i].rows) for i in competing)
    chosen = torch.cat(owner)[order[spent <= budget]]
    counts = torch.bincount(chosen, minlength=len(demands))
    return [
        demands[i].in_blocks(int(counts[i])) if i in competing else n for i, n in enumerate(uniform)
    ]
