"""Quantize a model that is in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .calibration.stats_files import given_stats
from .channels.statistics import ChannelStats
from .checkpoints.attachment import finish
from .core.config import MixedQuantConfig
from .quantization.engine import Plan
from .quantization.records import LinearRecord


def quantize(
    model: nn.Module,
    config: MixedQuantConfig,
    stats: Mapping[str, ChannelStats] | str | os.PathLike | None = None,
    batches: Sequence[Tensor] | None = None,
    *,
    tokenizer: Any = None,
    progress: bool = True,
) -> list[LinearRecord]:
    """Quantize a float model in place, freeing each float weight as soon as it is packed (those of
    fused experts together, block by block).

    Linears that share an input (q/k/v, gate/up) share one permutation and salient set. Output
    heads and embeddings stay as they are, and so do routers where the table of families knows
    them. An expert without statistics is quantized by those of its weights.

    Args:
        model: a float model (float32, float16 or bfloat16); see `smoothquant.models.families`.
        config: all choices.
        stats: {name of a linear: statistics of its input}, as `smoothquant.collect_stats` gives
            it, or a file that `smoothquant.load_stats` reads; None takes them from batches, and
            without batches the weights alone choose salient channels and order.
        batches: int64 [B, T] tensors of token ids, without padding, for
            ``weight_rounding="gptq"`` (tens of thousands of tokens), ``act_clip="search"`` and
            ``act_format="auto"`` (thousands). The model runs over them one decoder layer at a time,
            each on what the quantized layers before it give. None draws them from
            ``config.calibration``, if that is given and they are needed.
        tokenizer: the model's, for ``config.calibration``.
        progress: show progress bars.

    Returns:
        A record for every parameter, the quantized ones first, as `quantization_report` has them.

    Raises:
        ValueError: a missing or unfit entry of stats, a weight that is not finite, a model that is
            quantized already. TypeError: an argument or weight of a wrong type. CheckpointError: a
            broken file of statistics. Nothing has been changed then.
    """
    plan = Plan(model, config, given_stats(stats), batches, tokenizer=tokenizer, progress=progress)
    plan.pack_all()
    return finish(plan)
