"""From channel statistics to the salient set and the one permutation of a layer input.

Data in, data out: nothing here knows a model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .config import SALIENT_METRICS, SORTS, check_real

STAT_DTYPES = {
    "count": torch.int64,
    "abs_max": torch.float32,
    "minimum": torch.float32,
    "abs_sum": torch.float64,
    "sq_sum": torch.float64,
    "argmax": torch.int64,
}
NEVER_NEGATIVE = ("count", "abs_max", "abs_sum", "sq_sum")


class ChannelStats:
    """Per-channel statistics of the K channels of one layer input, streamed row by row.

    Attributes (CPU tensors):
        count: int64 [], rows seen.
        abs_max: float32 [K], max|x|.
        minimum: float32 [K], min x (a channel that is never negative may use unsigned codes).
        abs_sum: float64 [K], sum|x|.
        sq_sum: float64 [K], sum x^2.
        argmax: int64 [K], the row (counted over all updates) that holds the first max|x|.
        mean_only: only ``abs_sum`` is known (statistics published as a mean per channel).
    """

    def __init__(self, fields: dict[str, Tensor], mean_only: bool = False) -> None:
        k = fields["abs_max"].numel()
        for name, dtype in STAT_DTYPES.items():
            tensor = fields[name]
            shape = () if name == "count" else (k,)
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ValueError(
                    f"statistic {name} must be {dtype} of shape {shape}; "
                    f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
                )
            if name in NEVER_NEGATIVE and not (torch.isfinite(tensor) & (tensor >= 0)).all():
                raise ValueError(f"statistic {name} holds a negative or non-finite value")
            setattr(self, name, tensor)
        self.mean_only = mean_only

    @classmethod
    def empty(cls, num_channels: int) -> ChannelStats:
        """Statistics of zero rows."""
        fields = {
            name: torch.zeros(() if name == "count" else num_channels, dtype=dtype)
            for name, dtype in STAT_DTYPES.items()
        }
        fields["minimum"].fill_(float("inf"))
        return cls(fields)

    @classmethod
    def from_mean(cls, mean: Tensor) -> ChannelStats:
        """Statistics of which only the mean absolute value per channel, [K], is known."""
        mean = torch.as_tensor(mean)
        if mean.ndim != 1 or not torch.isfinite(mean).all() or (mean < 0).any():
            raise ValueError(
                f"mean must be a finite, non-negative vector; got shape {tuple(mean.shape)}"
            )
        stats = cls.empty(mean.numel())
        stats.count.fill_(1)
        stats.abs_sum.copy_(mean)
        stats.mean_only = True
        return stats

    def update(self, x: Tensor) -> None:
        """Add the rows of x: [..., K], float32, float16 or bfloat16."""
        if x.ndim < 1 or x.shape[-1] != self.num_channels:
            raise ValueError(
                f"x must end in {self.num_channels} channels; got shape {tuple(x.shape)}"
            )
        ops.channel_stats_update(x.detach().cpu(), *self.to_dict().values())

    @property
    def num_channels(self) -> int:
        """K."""
        return self.abs_max.numel()

    @property
    def mean(self) -> Tensor:
        """E|x| per channel, float64 [K]; 0 for no rows."""
        return self.abs_sum / self.count.clamp(min=1)

    @property
    def rms(self) -> Tensor:
        """sqrt(E x^2) per channel, float64 [K]; 0 for no rows."""
        return (self.sq_sum / self.count.clamp(min=1)).sqrt()

    @property
    def std(self) -> Tensor:
        """Population standard deviation of |x| per channel, float64 [K]; 0 for no rows."""
        return (self.sq_sum / self.count.clamp(min=1) - self.mean.square()).clamp(min=0).sqrt()

    def is_finite(self) -> bool:
        """Whether no NaN or Inf has been seen."""
        return bool(torch.isfinite(self.abs_sum).all())

    def to_dict(self) -> dict[str, Tensor]:
        """The statistics by name, ready for safetensors."""
        return {name: getattr(self, name) for name in STAT_DTYPES}


class ChannelPlan(NamedTuple):
    """The order of a layer input's channels.

    perm: int32 [K], the INT4 channels in sorted order, then the salient channels, ascending.
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


def choose_channels(
    stats: ChannelStats,
    *,
    salient_prop: float,
    salient_metric: str = "rms",
    sort: str = "rms",
    sort_stats: ChannelStats | None = None,
) -> ChannelPlan:
    """Choose the salient channels of a layer input and the order of the others.

    Args:
        stats: statistics that score the channels' salience.
        salient_prop: share of channels that stay in 16 bits, in [0, 1].
        salient_metric: "mean", "max" or "rms"; statistics that know only the mean use it.
        sort: "none", "max", "mean3std" (mean + 3 STD of |x|), "argmax" (the row that holds the
            channel's maximum) or "rms"; largest key first, ties in channel order.
        sort_stats: statistics that the sort key is computed from, `stats` by default.

    Raises:
        ValueError: an unknown metric or sort, a share outside [0, 1], or a sort key that
            mean-only statistics cannot give.
    """
    if salient_metric not in SALIENT_METRICS:
        raise ValueError(f"salient_metric must be one of {SALIENT_METRICS}; got {salient_metric!r}")
    if sort not in SORTS:
        raise ValueError(f"sort must be one of {SORTS}; got {sort!r}")
    sort_stats = sort_stats or stats
    k = stats.num_channels
    if sort_stats.num_channels != k:
        raise ValueError(f"sort_stats must have {k} channels; got {sort_stats.num_channels}")
    num_salient = num_salient_channels(k, salient_prop)
    metric = "mean" if stats.mean_only else salient_metric
    score = {"mean": stats.mean, "max": stats.abs_max.double(), "rms": stats.rms}[metric]
    salient = ops.argsort(score, descending=True)[:num_salient].sort().values

    order = torch.arange(k)
    if sort != "none":
        if sort_stats.mean_only:
            raise ValueError(f"sort={sort!r} needs more than a mean per channel; pass sort_stats")
        order = ops.argsort(ops.sort_keys(sort_stats, sort), descending=True)
    is_salient = torch.zeros(k, dtype=torch.bool)
    is_salient[salient] = True
    perm = torch.cat([order[~is_salient[order]], salient])
    return ChannelPlan(perm.to(torch.int32), num_salient)
