"""Searched options: simulate each candidate on sample rows of a layer's input, and take the one
whose output is closest to the float output.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..channels.sorting import ChannelPlan
from ..core.config import MixedQuantConfig
from ..layers.linear import FakeW4A4Linear, QuantizedLinear

ACT_CLIPS = (1.0, 0.98, 0.96, 0.94, 0.92, 0.9, 0.88, 0.85, 0.8)
ALPHAS = (0.25, 0.5, 0.75)


class Trial:
    """Simulates all linears that read one layer input, on sample rows.

    Args:
        x: float32 [t, K], sample rows of the input.
        weight: [N, K], the weights of all its readers, concatenated.
        target: float32 [t, N], the output to approximate.
        plan: the channel plan.
    """

    def __init__(self, x: Tensor, weight: Tensor, target: Tensor, plan: ChannelPlan) -> None:
        self.x, self.weight, self.target, self.plan = x, weight, target, plan
        self._layer: QuantizedLinear | None = None

    @torch.no_grad()
    def error(self, config: MixedQuantConfig) -> float:
        """Squared distance between output and target, for a config without "search" or "auto"."""
        config = dataclasses.replace(config, backend="fake", quantize_output=False)
        layer = self._layer
        if layer is None or layer.config.rotation != config.rotation:
            layer = self._layer = None  # free the old layer before building the new one
            layer = FakeW4A4Linear.from_weight(self.weight.float(), None, config, self.plan)
            self._layer = layer
        layer.config = config  # of the options tried, only rotation changes the weight
        return float(layer(self.x).sub_(self.target).square_().sum())


def resolve(
    config: MixedQuantConfig,
    x: Tensor | None,
    weight: Tensor,
    plan: ChannelPlan,
    never_negative: bool,
) -> MixedQuantConfig:
    """Replace act_format="auto" and act_clip="search" by the best format and ratio.

    Args:
        x: float32 [t, K], sample rows; None for an input that no token reached, which gives
            `MixedQuantConfig.settled`.
        weight: [N, K], the weights of all readers of the input, concatenated.
        never_negative: calibration saw no negative value, which makes unsigned codes without
            rotation a candidate.
    """
    if x is None:
        return config.settled()
    formats: list[dict[str, Any]] = [{"act_format": config.act_format}]
    if config.act_format == "auto":
        formats = [{"act_format": "zero_point"}]
        if never_negative:
            formats.append({"act_format": "unsigned", "rotation": 0})
    ratios = ACT_CLIPS if config.act_clip == "search" else (config.act_clip,)
    clips = [{"act_clip": ratio} for ratio in ratios]
    trial = Trial(x, weight, x @ weight.float().T, plan)

    def best(base: dict[str, Any], candidates: list[dict[str, Any]]) -> dict[str, Any]:
        if len(candidates) == 1:
            return base | candidates[0]
        tried = [base | candidate for candidate in candidates]
        return min(tried, key=lambda fields: trial.error(dataclasses.replace(config, **fields)))

    return dataclasses.replace(config, **best(best(clips[0], formats), clips))
