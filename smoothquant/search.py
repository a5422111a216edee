"""Choices that calibration makes by trial: each candidate is simulated on sample rows of a layer's
input, and the one whose output is nearest to the float output is taken.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .config import MixedQuantConfig
from .linear import FakeW4A4Linear
from .sorting import ChannelPlan

ACT_CLIPS = (1.0, 0.98, 0.96, 0.94, 0.92, 0.9, 0.88, 0.85, 0.8)
ALPHAS = (0.25, 0.5, 0.75)


@torch.no_grad()
def output_error(
    x: Tensor, weight: Tensor, plan: ChannelPlan, config: MixedQuantConfig, target: Tensor
) -> float:
    """Squared distance of a layer's simulated W4A4 output from a target.

    Args:
        x: float32 [t, K], rows of its input.
        weight: [N, K], of all linears that read it.
        config: with numbers where it may say "search" or "auto".
        target: float32 [t, N].
    """
    simulated = dataclasses.replace(config, backend="fake", quantize_output=False)
    layer = FakeW4A4Linear.from_weight(weight.float(), None, simulated, plan)
    return float((layer(x) - target).square().sum())


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
            zero-points and no clip.
        never_negative: whether calibration saw no negative value, so that unsigned codes without
            rotation are a candidate.
    """
    formats = [{"act_format": config.act_format}]
    if config.act_format == "auto":
        formats = [{"act_format": "zero_point"}]
        if never_negative:
            formats.append({"act_format": "unsigned", "rotation": 0})
    clips = [
        {"act_clip": clip} for clip in ([config.act_clip], ACT_CLIPS)[config.act_clip == "search"]
    ]
    if x is None:
        return dataclasses.replace(config, **formats[0], **clips[0])
    target = x @ weight.float().T

    def best(base: dict, candidates: list[dict]) -> dict:
        if len(candidates) == 1:
            return base | candidates[0]

        def error(choice: dict) -> float:
            trial = dataclasses.replace(config, **(base | choice))
            return output_error(x, weight, plan, trial, target)

        return base | min(candidates, key=error)

    return dataclasses.replace(config, **best(best(clips[0], formats), clips))
