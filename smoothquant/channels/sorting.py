"""From channel statistics to the salient set and the one permutation of a layer input.

Data in, data out: nothing here knows a model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.config import SALIENT_METRICS, SORTS, check_integer, check_real
from ..kernels import ops
from .statistics import ChannelStats

MASSIVE_RATIO = 1000.0


class ChannelPlan(NamedTuple):
    """The order of a layer input's channels.

    perm: int32 [K], the INT4 channels in sorted order, then the salient channels, ascending. Of a
        plan in blocks: the INT4 channels of block 0, of block 1, ..., then the salient ones of
        block 0, of block 1, ..., each part in such an order.
    num_salient: how many channels at the end of perm stay in 16 bits.
    """

    perm: Tensor
    num_salient: int


def num_salient_channels(num_channels: int, salient_prop: float) -> int:
    """max(1, floor(p K)) channels for p > 0 (the published rule), none for p = 0."""
    check_real("salient_prop", salient_prop, 0.0, 1.0)
    if salient_prop == 0 or num_channels == 0:
        return 0
    return max(1, int(salient_prop * num_channels))


def salient_per_block(num_salient: int, blocks: int) -> int:
    """Salient channels in each of some blocks, for a total as near to num_salient as equal counts
    come: num_salient / blocks, rounded (halves up), but not to none if num_salient > 0."""
    return max(min(1, num_salient), (2 * num_salient + blocks) // (2 * blocks))


def choose_channels(
    stats: ChannelStats,
    *,
    salient_prop: float = 0.0,
    salient_metric: str = "rms",
    sort: str = "rms",
    sort_stats: ChannelStats | None = None,
    column_norms: Tensor | None = None,
    num_salient: int | None = None,
    tp_blocks: int = 1,
) -> ChannelPlan:
    """Choose the salient channels of a layer input and the order of the others.

    Channels with massive activations (`is_massive`) are salient before all others. In blocks, the
    salient channels are chosen and the others sorted inside each of `tp_blocks` equal parts of the
    channels, as if it were a layer input of its own: K4 / tp_blocks INT4 and K_s / tp_blocks
    salient channels of perm belong to each, so that tensor parallelism can slice the layer. A
    group of g channels lies inside one block only where K4 / tp_blocks is a multiple of g.

    Args:
        stats: statistics that score the channels' salience.
        salient_prop: share of channels that stay in 16 bits, in [0, 1].
        salient_metric: "mean", "max", "rms", or "output" (sum x^2 times the column norm: what the
            channel adds to the squared outputs); statistics that know only the mean use it.
        sort: "none", "max", "mean3std" (mean + 3 STD of |x|), "argmax" (the row that holds the
            channel's maximum) or "rms"; largest key first, ties in channel order.
        sort_stats: statistics that the sort key is computed from, `stats` by default.
        column_norms: float64 [K], sum w^2 over the weights that read the channel, for "output".
        num_salient: how many channels stay in 16 bits, in place of salient_prop.
        tp_blocks: equal parts of the channels, >= 1; each has `salient_per_block` salient ones.

    Raises:
        ValueError: an unknown metric or sort, a share outside [0, 1], a number of blocks that does
            not divide K, no or unfit column norms for "output", or a sort key that mean-only
            statistics cannot give.
    """
    if salient_metric not in SALIENT_METRICS:
        raise ValueError(f"salient_metric must be one of {SALIENT_METRICS}; got {salient_metric!r}")
    if sort not in SORTS:
        raise ValueError(f"sort must be one of {SORTS}; got {sort!r}")
    sort_stats = sort_stats or stats
    k = stats.num_channels
    if sort_stats.num_channels != k:
        raise ValueError(f"sort_stats must have {k} channels; got {sort_stats.num_channels}")
    if sort != "none" and sort_stats.mean_only:
        raise ValueError(f"sort={sort!r} needs more than a mean per channel; pass sort_stats")
    check_blocks(k, tp_blocks)
    if num_salient is None:
        num_salient = num_salient_channels(k, salient_prop)
    check_integer("num_salient", num_salient, 0, k)
    size, salient = k // tp_blocks, salient_per_block(num_salient, tp_blocks)

    score = _salience(stats, salient_metric, column_norms)
    massive = is_massive(stats, tp_blocks)
    key = torch.zeros(k, dtype=torch.float64) if sort == "none" else ops.sort_keys(sort_stats, sort)
    int4_parts, salient_parts = [], []
    for start in range(0, k, size or 1):
        block = slice(start, start + size)
        by_score = ops.argsort(score[block], descending=True)
        first = massive[block][by_score]
        chosen = torch.cat([by_score[first], by_score[~first]])[:salient].sort().values
        order = ops.argsort(key[block], descending=True)
        int4_parts.append(order[~torch.isin(order, chosen)] + start)
        salient_parts.append(chosen + start)
    perm = torch.cat([*int4_parts, *salient_parts, torch.arange(0)])
    return ChannelPlan(perm.to(torch.int32), salient * tp_blocks)


def check_blocks(num_channels: int, tp_blocks: int, name: str = "the input") -> None:
    """Raise ValueError unless num_channels can be cut into tp_blocks equal parts."""
    check_integer("tp_blocks", tp_blocks, 1)
    if num_channels % tp_blocks:
        raise ValueError(
            f"tp_blocks must divide the {num_channels} channels of {name}; got {tp_blocks}"
        )


def _salience(stats: ChannelStats, metric: str, column_norms: Tensor | None) -> Tensor:
    """The score [K] that makes a channel salient, float64."""
    if stats.mean_only or metric == "mean":
        return stats.mean
    if metric == "max":
        return stats.abs_max.double()
    if metric == "rms":
        return stats.rms
    k = stats.num_channels
    if column_norms is None or column_norms.dtype != torch.float64 or column_norms.shape != (k,):
        raise ValueError(
            f"salient_metric='output' needs column_norms, float64 ({k},); got {column_norms!r:.80}"
        )
    return stats.sq_sum * column_norms


def is_massive(stats: ChannelStats, tp_blocks: int = 1) -> Tensor:
    """Which channels hold a massive activation (Sun et al., 2024): bool [K].

    A magnitude is massive above MASSIVE_RATIO times the median magnitude; here that is the median
    of the mean magnitudes of the channels, of those in the same block. The paper also wants it
    above 100, which depends on the scale of a model and is left out. False for all channels where
    the statistics know only the mean.
    """
    if stats.mean_only or stats.num_channels == 0:
        return torch.zeros(stats.num_channels, dtype=torch.bool)
    median = stats.mean.reshape(tp_blocks, -1).median(1, keepdim=True).values
    return (stats.abs_max.reshape(tp_blocks, -1) > MASSIVE_RATIO * median).view(-1)


def choose_within_heads(
    stats: ChannelStats,
    num_heads: int,
    num_values: int,
    *,
    salient_prop: float = 0.0,
    num_salient: int | None = None,
    sort_stats: ChannelStats | None = None,
    column_norms: Tensor | None = None,
    **choices,
) -> ChannelPlan:
    """`choose_channels` of an output of attention, in blocks of one head each.

    Heads in a row that share a head of v have one order and one salient set of their channels, so
    that the order can be moved into the rows of v (`smoothquant.fold_permutations`). It is chosen
    by their statistics taken together.

    Args:
        stats, sort_stats, column_norms: of the K channels of all heads, head after head.
        num_heads: of the input; divides K.
        num_values: heads of v; divides num_heads.
        salient_prop, num_salient, choices: as in `choose_channels`, without tp_blocks.
    """
    k = stats.num_channels
    if num_salient is None:
        num_salient = num_salient_channels(k, salient_prop)
    check_integer("num_salient", num_salient, 0, k)
    shared, size = num_heads // num_values, k // num_heads
    if column_norms is not None:
        # times the sum of squares of all these heads it must be the sum of their products
        products = _together(stats.sq_sum * column_norms, num_values, size).sum(1)
        squares = _together(stats.sq_sum, num_values, size).sum(1)
        column_norms = torch.where(squares > 0, products / squares, 0).view(-1)
    of_values = choose_channels(
        _heads_together(stats, num_values, size),
        num_salient=num_values * salient_per_block(num_salient, num_heads),
        sort_stats=sort_stats and _heads_together(sort_stats, num_values, size),
        column_norms=column_norms,
        tp_blocks=num_values,
        **choices,
    )
    heads = torch.arange(num_heads, dtype=torch.int32)
    moved = (heads - heads // shared)[:, None] * size  # from a head of v to the heads it serves
    k4 = len(of_values.perm) - of_values.num_salient
    parts = of_values.perm[:k4], of_values.perm[k4:]
    spread = [p.view(num_values, -1).repeat_interleave(shared, 0) + moved for p in parts]
    return ChannelPlan(torch.cat([p.flatten() for p in spread]), shared * of_values.num_salient)


def _together(x: Tensor, num_values: int, size: int) -> Tensor:
    """[K] as [heads of v, heads that share it, channels of a head]."""
    return x.reshape(num_values, -1, size)


def _heads_together(stats: ChannelStats, num_values: int, size: int) -> ChannelStats:
    """Statistics of the channels of v's heads: of the rows of all heads that share them."""
    of_heads = {
        name: _together(tensor, num_values, size)
        for name, tensor in stats.to_dict().items()
        if name != "count"
    }
    abs_max, largest = of_heads["abs_max"].max(1, keepdim=True)
    combined = {
        "abs_max": abs_max,
        "minimum": of_heads["minimum"].amin(1),
        "abs_sum": of_heads["abs_sum"].sum(1),
        "sq_sum": of_heads["sq_sum"].sum(1),
        "argmax": of_heads["argmax"].gather(1, largest),
    }
    fields = {name: tensor.reshape(-1) for name, tensor in combined.items()}
    count = stats.count * of_heads["abs_max"].shape[1]
    return ChannelStats({"count": count, **fields}, stats.mean_only)
