"""Choosing the salient channels of a layer input and the permutation that sorts the others.

Pure functions of data; nothing here depends on a model.
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

    perm: int32 [K], the INT4 channels in sorted order, then the salient channels in ascending
        order. With several blocks: the sorted INT4 channels of block 0, block 1, ..., then the
        salient channels of block 0, block 1, ...
    num_salient: number of salient channels at the end of perm.
    """

    perm: Tensor
    num_salient: int


def num_salient_channels(num_channels: int, salient_prop: float) -> int:
    """max(1, floor(p K)) for p > 0, as in the published code; 0 for p = 0."""
    check_real("salient_prop", salient_prop, 0.0, 1.0)
    if salient_prop == 0 or num_channels == 0:
        return 0
    return max(1, int(salient_prop * num_channels))


def salient_per_block(num_salient: int, blocks: int) -> int:
    """Salient channels per block: num_salient / blocks rounded half up, but at least 1 if
    num_salient > 0."""
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

    Channels with massive activations (`is_massive`) become salient first.

    With tp_blocks > 1 the channels are split into equal blocks, and each block is handled like a
    separate layer input: it gets K4 / tp_blocks INT4 channels and K_s / tp_blocks salient channels
    of perm, so tensor parallelism can slice the layer. A group of g channels stays within one block
    only if K4 / tp_blocks is a multiple of g.

    Args:
        stats: statistics that rank the channels for salience.
        salient_prop: share of channels that become salient, in [0, 1].
        salient_metric: "mean", "max", "rms", or "output" (sum x^2 times the column norm, the
            channel's contribution to the squared outputs). Mean-only statistics always use the
            mean.
        sort: "none", "max", "mean3std" (mean + 3 STD of |x|), "argmax" (index of the row with the
            channel's maximum) or "rms"; largest key first, ties in channel order.
        sort_stats: statistics for the sort key; `stats` by default.
        column_norms: float64 [K], sum w^2 over all weights that read the channel; for "output".
        num_salient: number of salient channels; overrides salient_prop.
        tp_blocks: number of equal blocks, >= 1; each gets `salient_per_block` salient channels.

    Raises:
        ValueError: an unknown metric or sort; a share outside [0, 1]; tp_blocks does not divide K;
            column_norms missing or malformed for "output"; a sort key that needs more than
            mean-only statistics.
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
    """Raise ValueError unless tp_blocks divides num_channels."""
    check_integer("tp_blocks", tp_blocks, 1)
    if num_channels % tp_blocks:
        raise ValueError(
            f"tp_blocks must divide the {num_channels} channels of {name}; got {tp_blocks}"
        )


def _salience(stats: ChannelStats, metric: str, column_norms: Tensor | None) -> Tensor:
    """The score that ranks channels for salience, float64 [K]."""
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
    """Which channels have massive activations (Sun et al., 2024): bool [K].

    A magnitude is massive if it exceeds MASSIVE_RATIO times the median magnitude; here, the median
    over the block of the channels' mean magnitudes. The paper also requires a magnitude above 100;
    that depends on the model's scale and is omitted. All False for mean-only statistics.
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
    salient_metric: str = "rms",
    sort: str = "rms",
) -> ChannelPlan:
    """`choose_channels` for an attention output, with one block per head.

    Consecutive heads that share a head of v get the same order and the same salient channels, so
    that `smoothquant.fold_permutations` can move the order into the rows of v. Both are chosen from
    the combined statistics of these heads.

    Args:
        stats, sort_stats, column_norms: as in `choose_channels`, over the K channels of all heads,
            head after head.
        num_heads: heads of the attention output; divides K.
        num_values: heads of v; divides num_heads.
        salient_prop, num_salient, salient_metric, sort: as in `choose_channels`.
    """
    k = stats.num_channels
    if num_salient is None:
        num_salient = num_salient_channels(k, salient_prop)
    check_integer("num_salient", num_salient, 0, k)
    shared, size = num_heads // num_values, k // num_heads
    if column_norms is not None:
        # The combined score must be the sum of the heads' scores sq_sum * column_norms.
        products = _by_value_head(stats.sq_sum * column_norms, num_values, size).sum(1)
        squares = _by_value_head(stats.sq_sum, num_values, size).sum(1)
        column_norms = torch.where(squares > 0, products / squares, 0).view(-1)
    plan = choose_channels(
        _combine_heads(stats, num_values, size),
        num_salient=num_values * salient_per_block(num_salient, num_heads),
        sort_stats=sort_stats and _combine_heads(sort_stats, num_values, size),
        column_norms=column_norms,
        tp_blocks=num_values,
        salient_metric=salient_metric,
        sort=sort,
    )
    heads = torch.arange(num_heads, dtype=torch.int32)
    offsets = (heads - heads // shared)[:, None] * size  # from a head of v to the heads sharing it
    k4 = len(plan.perm) - plan.num_salient
    parts = plan.perm[:k4], plan.perm[k4:]
    spread = [p.view(num_values, -1).repeat_interleave(shared, 0) + offsets for p in parts]
    return ChannelPlan(torch.cat([p.flatten() for p in spread]), shared * plan.num_salient)


def _by_value_head(x: Tensor, num_values: int, size: int) -> Tensor:
    """[K] -> [heads of v, heads that share one, channels per head]."""
    return x.reshape(num_values, -1, size)


def _combine_heads(stats: ChannelStats, num_values: int, size: int) -> ChannelStats:
    """Statistics of v's channels, combined over the heads that share each head of v."""
    by_head = {
        name: _by_value_head(tensor, num_values, size)
        for name, tensor in stats.to_dict().items()
        if name != "count"
    }
    abs_max, largest = by_head["abs_max"].max(1, keepdim=True)
    combined = {
        "abs_max": abs_max,
        "minimum": by_head["minimum"].amin(1),
        "abs_sum": by_head["abs_sum"].sum(1),
        "sq_sum": by_head["sq_sum"].sum(1),
        "argmax": by_head["argmax"].gather(1, largest),
    }
    fields = {name: tensor.reshape(-1) for name, tensor in combined.items()}
    count = stats.count * by_head["abs_max"].shape[1]
    return ChannelStats({"count": count, **fields}, stats.mean_only)
