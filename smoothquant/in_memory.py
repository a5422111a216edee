"""Quantize a model in memory."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .calibration.stats_files import given_stats
from .channels.statistics import ChannelStats
from .checkpoints.attachment import finish_and_attach
from .core.config import MixedQuantConfig
from .layers.decoder import place_and_fuse
from .models.loading import randomly_initialized
from .quantization.engine import Plan
from .quantization.records import QuantizationReport


def quantize(
    model: nn.Module,
    config: MixedQuantConfig,
    stats: Mapping[str, ChannelStats] | str | os.PathLike | None = None,
    batches: Sequence[Tensor] | None = None,
    *,
    tokenizer: Any = None,
    tuning_state: str | os.PathLike | None = None,
    progress: bool = True,
) -> QuantizationReport:
    """Quantize a float model in place.

    Each float weight is freed as soon as it is packed; the weights of fused experts are freed
    together, block by block.

    Linears that share an input (q, k and v, or gate and up) share a permutation and a set of
    salient channels. Output heads and embeddings are quantized only if the config says so. Routers
    and modules that compute more than their weight and bias say are not
    (`smoothquant.models.kept`), nor are layers that no calibration token reached, unless the config
    has ``unreached="weights"``. An expert without statistics is quantized by its weights'
    statistics.

    Args:
        model: a float model (float32, float16 or bfloat16); see `smoothquant.models.families`.
        config: how to quantize.
        stats: {name of a linear: statistics of its input} from `smoothquant.collect_stats`, or a
            file for `smoothquant.load_stats`. None collects them from the batches.
        batches: int64 [B, T] tensors of token ids, without padding. ``weight_rounding="gptq"``
            needs tens of thousands of tokens, ``act_clip="search"`` and ``act_format="auto"``
            thousands. Each decoder layer is calibrated on the outputs of the quantized layers
            before it. None draws them from ``config.calibration`` if they are needed.
        tokenizer: the model's tokenizer, to draw calibration tokens. None looks for it where the
            model was loaded from.
        tuning_state: a file for the progress of ``tune=True``, written every few steps. The same
            call, after an interruption, quantizes again, resumes the tuning from there and gives
            the same bytes. None keeps no progress.
        progress: show progress bars.

    Returns:
        A record for every parameter, the quantized ones first, as from `quantization_report`: a
        list that prints as a summary and that notebooks show as a table.

    Raises:
        ValueError: an entry of `stats` is missing or does not fit, a weight is not finite, or the
            model is quantized already. The model is unchanged.
        TypeError: an argument or weight has the wrong type. The model is unchanged.
        CheckpointError: the statistics file is damaged. The model is unchanged.
    """
    plan = Plan(
        model,
        config,
        given_stats(stats),
        batches,
        tokenizer=tokenizer,
        tuning_state=None if tuning_state is None else Path(tuning_state),
        progress=progress,
    )
    _warn_of_random_weights(plan)
    plan.pack_all()
    records = finish_and_attach(plan)
    place_and_fuse(model)
    return records


def _warn_of_random_weights(plan: Plan) -> None:
    random = set(randomly_initialized(plan.model))
    names = [name for group in plan.groups for name in group.names if f"{name}.weight" in random]
    if names:
        warnings.warn(
            f"the checkpoint had no weights for {len(names)} linears, such as {names[0]}: "
            "transformers initialized them at random. Unless they were trained since, the "
            "quantized model is of no use",
            stacklevel=3,
        )
