"""Choices that calibration makes by trial: each candidate is simulated on sample rows of a layer's
input, and the one whose output is nearest to the float output is taken.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..channels.sorting import ChannelPlan
from ..core.config import MixedQuantConfig
from ..layers.linear import FakeW4A4Linear

ACT_CLIPS = (1.0, 0.98, 0.96, 0.94, 0.92, 0.9, 0.88, 0.85, 0.8)
ALPHAS = (0.25, 0.5, 0.75)


class Trial:
    """A layer input's readers, simulated on rows of it.

    Args:
        x: float32 [t, K], rows of the input.
        weight: [N, K], of all linears that read it.
        target: float32 [t, N], the output to come near to.
    """

    def __init__(self, x: Tensor, weight: Tensor, target: Tensor, plan: ChannelPlan) -> None:
        self.x, self.weight, self.target, self.plan = x, weight, target, plan
        self._layer: FakeW4A4Linear | None = None

    @torch.no_grad()
    def error(self, config: MixedQuantConfig) -> float:
        """Squared distance of the output from the target; config with numbers where it may say
        "search" or "auto"."""
        config = dataclasses.replace(config, backend="fake", quantize_output=False)
        layer = self._layer
        if layer is None or layer.config.rotation != config.rotation:
            self._layer = layer = None  # not two of them at a time
            layer = FakeW4A4Linear.from_weight(self.weight.float(), None, config, self.plan)
            self._layer = layer
        layer.config = config  # the weight depends on no other choice
        return float(layer(self.x).sub_(self.target).square_().sum())


def resolve(
    config: MixedQuantConfig,
    x: Tensor | None,
    weight: Tensor,
    plan: ChannelPlan,
    never_negative: bool,
) -> MixedQuantConfig:
    """The config with the best format in place of act_format="auto" and the best ratio in place of
    act_clip="search".

    Args:
        x: float32 [t, K], rows to try on; None, for an input that no token reached, gives
            `MixedQuantConfig.settled`.
        never_negative: whether calibration saw no negative value, so that unsigned codes without
            rotation are a candidate.
    """
    if x is None:
        return config.settled()
    formats = [{"act_format": config.act_format}]
    if config.act_format == "auto":
        formats = [{"act_format": "zero_point"}]
        if never_negative:
            formats.append({"act_format": "unsigned", "rotation": 0})
    ratios = ACT_CLIPS if config.act_clip == "search" else (config.act_clip,)
    clips = [{"act_clip": ratio} for ratio in ratios]
    trial = Trial(x, weight, x @ weight.float().T, plan)

    def best(base: dict, candidates: list[dict]) -> dict:
        if len(candidates) == 1:
            return base | candidates[0]
        tried = [base | candidate for candidate in candidates]
        return min(tried, key=lambda fields: trial.error(dataclasses.replace(config, **fields)))

    return dataclasses.replace(config, **best(best(clips[0], formats), clips))
