"""Distributing one model-wide budget of salient channels over the layer inputs.

Pure functions of data; nothing here depends on a model.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.config import MixedQuantConfig, layer_group_size
from ..kernels import ops
from ..kernels.layout import divides_evenly
from .sorting import num_salient_channels, salient_per_block

SEARCH_STEPS = 30  # bisection steps for the largest share that fits a budget in bits


class Demand(NamedTuple):
    """One layer input that needs salient channels.

    rows: output channels of each matrix that reads the input.
    channels: K.
    score: float64 [K], each channel's contribution to the squared outputs; None gives the input the
        model's average share.
    blocks: number of equal blocks of channels; all get the same number of salient channels.
    parts: number of equal parts, of whole blocks each, that tensor parallelism cuts the packed
        tensors into; divides `blocks`.
    """

    rows: tuple[int, ...]
    channels: int
    score: Tensor | None = None
    blocks: int = 1
    parts: int = 1

    def in_blocks(self, num_salient: int, group_size: int) -> int:
        """num_salient, rounded so that all blocks get the same number, and parts whole groups if
        any number above 0 does that."""
        each = salient_per_block(num_salient, self.blocks)
        if self.parts > 1 and each:
            whole = _whole_cuts(self.channels, self.blocks, self.parts, group_size)
            each = min(whole, key=lambda count: abs(count - each), default=each)
        return self.blocks * each


@functools.cache
def _whole_cuts(channels: int, blocks: int, parts: int, group_size: int) -> list[int]:
    """Numbers of salient channels per block with which every part has whole groups."""
    return [
        each
        for each in range(1, channels // blocks)
        if divides_evenly(channels - blocks * each, group_size, parts)
    ]


def share_out(demands: Sequence[Demand], config: MixedQuantConfig) -> list[int]:
    """The number of salient channels for every layer input.

    ``salient_allocation="uniform"`` gives every input the same share of its channels. "output" lets
    the channels of the whole model compete: the winners contribute most to their layer's squared
    outputs per weight that has to stay in 16 bits. Both have the same average share, weighted by
    the number of weights. It is ``config.salient_prop`` or, with ``config.bits``, the largest share
    whose packed tensors fit in that many bits per weight.

    Raises:
        ValueError: the layers exceed ``config.bits`` even without salient channels.
    """
    if config.bits is None:
        assert config.salient_prop is not None  # the config sets one of the two
        return _with_share(demands, config, config.salient_prop)
    none = _with_share(demands, config, 0.0)
    least = bits_per_weight(demands, none, config)
    if least > config.bits:
        raise ValueError(
            f"bits must be at least {least:.3f}, the size of these layers without salient "
            f"channels; got {config.bits:g}"
        )
    low, high, best = 0.0, 1.0, none
    share = high
    for _ in range(SEARCH_STEPS):
        counts = _with_share(demands, config, share)
        if bits_per_weight(demands, counts, config) <= config.bits:
            low, best = share, counts
        else:
            high = share
        share = (low + high) / 2
    return best


def bits_per_weight(
    demands: Sequence[Demand], counts: Sequence[int], config: MixedQuantConfig
) -> float:
    """Average size of the packed layers in bits per weight, including permutations.

    Args:
        counts: number of salient channels of each demand.
    """
    num_bytes = weights = 0
    salient_dtype = torch.int8 if config.salient_format == "int8" else torch.bfloat16
    dtypes = ops.packed_dtypes(salient_dtype)
    for demand, num_salient in zip(demands, counts, strict=True):
        for n in demand.rows:
            group_size = layer_group_size(config, demand.channels - num_salient)
            shapes = ops.packed_shapes(n, demand.channels, num_salient, group_size)
            num_bytes += 4 * demand.channels + sum(
                math.prod(shape) * dtype.itemsize
                for shape, dtype in zip(shapes, dtypes, strict=True)
                if dtype is not None
            )
            weights += n * demand.channels
    return 8 * num_bytes / max(1, weights)


def _with_share(demands: Sequence[Demand], config: MixedQuantConfig, share: float) -> list[int]:
    size = config.group_size
    uniform = [d.in_blocks(num_salient_channels(d.channels, share), size) for d in demands]
    competing = [i for i, demand in enumerate(demands) if demand.score is not None]
    if config.salient_allocation == "uniform" or share == 0 or not competing:
        return uniform
    gains, costs, owners = [], [], []
    for i in competing:
        rows, channels, score = demands[i][:3]
        assert score is not None
        gain = (score / score.sum().clamp(min=1e-300)).sort(descending=True).values / sum(rows)
        gain[:1] = math.inf  # every layer input gets at least one
        gains.append(gain)
        costs.append(torch.full((channels,), sum(rows), dtype=torch.float64))
        owners.append(torch.full((channels,), i))
    order = torch.cat(gains).argsort(descending=True, stable=True)
    spent = torch.cat(costs)[order].cumsum(0)
    budget = sum(uniform[i] * sum(demands[i].rows) for i in competing)
    chosen = torch.cat(owners)[order[spent <= budget]]
    counts = torch.bincount(chosen, minlength=len(demands))
    return [
        demands[i].in_blocks(int(counts[i]), size) if i in competing else n
        for i, n in enumerate(uniform)
    ]
