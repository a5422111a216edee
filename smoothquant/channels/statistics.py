"""Per-channel statistics of a layer input."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import ops

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
    """Running statistics of the K channels of one layer input.

    Attributes (CPU tensors):
        count: int64 [], rows seen.
        abs_max: float32 [K], max|x|.
        minimum: float32 [K], min x (a channel that is never negative may use unsigned codes).
        abs_sum: float64 [K], sum|x|.
        sq_sum: float64 [K], sum x^2.
        argmax: int64 [K], index of the first row with max|x|, counted over all updates.
        mean_only: only ``abs_sum`` is known (statistics published as one mean per channel).
    """

    count: Tensor
    abs_max: Tensor
    minimum: Tensor
    abs_sum: Tensor
    sq_sum: Tensor
    argmax: Tensor

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
        """Statistics that know only the mean absolute value of each channel, [K]."""
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

    @classmethod
    def from_max(cls, abs_max: Tensor) -> ChannelStats:
        """Statistics that know only max|x| of each channel, [K].

        They are those of a single row with these values, of unknown sign, so that mean, max and rms
        all rank the channels alike.
        """
        stats = cls.from_mean(abs_max)
        stats.mean_only = False
        stats.abs_max.copy_(abs_max)
        stats.minimum.copy_(-stats.abs_max)
        stats.sq_sum.copy_(stats.abs_sum.square())
        return stats

    def update(self, x: Tensor) -> None:
        """Add the rows of x [..., K], float32, float16 or bfloat16."""
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

    def divided(self, factor: Tensor) -> ChannelStats:
        """The statistics that the same rows have after division by factor, [K], positive."""
        factor = factor.double().cpu()
        scaled = {
            "abs_max": (self.abs_max / factor).float(),
            "minimum": (self.minimum / factor).float(),
            "abs_sum": self.abs_sum / factor,
            "sq_sum": self.sq_sum / factor.square(),
        }
        return ChannelStats(self.to_dict() | scaled, self.mean_only)

    def is_finite(self) -> bool:
        """Whether no NaN or Inf was seen."""
        return bool(torch.isfinite(self.abs_sum).all())

    def to_dict(self) -> dict[str, Tensor]:
        """The statistics by name, ready for safetensors."""
        return {name: getattr(self, name) for name in STAT_DTYPES}
