"""The memory that quantizing a model will take, by a count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..calibration.hessian import SAMPLE_ROWS
from ..calibration.tokens import CALIBRATION_BLOCK
from ..channels.statistics import ChannelStats
from ..core.config import MixedQuantConfig
from ..layers import gptq
from ..models.families import decoder_layers
from .checks import checked_groups

# In float32, of a weight that is packed; with GPTQ: as it was, as it is rounded, and what is left.
MATRIX_COPIES = {"nearest": 2, "gptq": 3}
BATCH_COPIES = 4  # of the widest activation of a batch


class _Input(NamedTuple):
    """A layer input of k channels, read by matrices with n rows in all and n_largest rows at most.
    layer: the decoder layer that holds them."""

    k: int
    n: int
    n_largest: int
    layer: str


def planned_memory(
    model: nn.Module,
    config: MixedQuantConfig,
    quantized_bytes: int,
    tokens: int = 0,
    stats: Mapping[str, ChannelStats] | None = None,
    *,
    by_layer: bool = False,
    spill: bool = False,
) -> dict[str, int]:
    """The peak of memory while a float model is quantized, beside what imports take.

    Args:
        quantized_bytes: of the quantized model, as `checkpoints.sizes.planned_bytes` counts them.
        tokens: that it is calibrated on; 0 for none, or where statistics are there already.
        stats: as for `planned_bytes`; tokens > 0 counts as its stats_to_come.
        by_layer, spill: by `smoothquant.convert` and its `spill`, not by `quantize`.
    """
    layers = decoder_layers(model)
    inputs = []
    smoothed: Counter[str] = Counter()  # bytes of the weights that are, by layer
    for group in checked_groups(model, config, stats, stats_to_come=tokens > 0):
        weights = [weight for weight, _ in group.matrices(model)]
        rows, k = [len(weight) for weight in weights], weights[0].shape[1]
        layer = next((name for name in layers if group.name.startswith(name + ".")), "")
        inputs.append(_Input(k, sum(rows), max(rows), layer))
        if config.smooth_alpha is not None and group.reads_norm:
            smoothed[layer] += sum(weight.nbytes for weight in weights)
    dtype = next(model.parameters()).dtype
    waiting = (by_layer or config.needs_tokens) and not spill
    batch = min(tokens, CALIBRATION_BLOCK) * max(each.n_largest for each in inputs)
    memory = {
        "float model": 0 if by_layer else sum(p.nbytes for p in model.parameters()),
        "a packed layer": quantized_bytes // len(layers) if by_layer else 0,
        "smoothed weights": max(smoothed.values(), default=0) if by_layer else 0,
        "weights at work": _weight_bytes(inputs, config, dtype, spill),
        "Hessians": _hessian_bytes(inputs) if config.weight_rounding == "gptq" and not spill else 0,
        "hidden states": tokens * inputs[0].k * dtype.itemsize if waiting else 0,
        "activations of a batch": BATCH_COPIES * batch * dtype.itemsize,
    }
    return {part: size for part, size in memory.items() if size}


def _weight_bytes(
    inputs: Sequence[_Input], config: MixedQuantConfig, dtype: torch.dtype, spill: bool
) -> int:
    """Of a matrix that is packed, of all that read an input where choices are tried on them, or the
    room that a factor in float64 takes before that."""
    held = (
        4 * MATRIX_COPIES[config.weight_rounding] * max(each.n_largest * each.k for each in inputs)
    )
    if config.searches:
        # weights as they are, in float32, and in packed order; three outputs of sampled rows
        copies, outputs = dtype.itemsize + 8, 12 * SAMPLE_ROWS
        held = max(held, *(each.n * (copies * each.k + outputs) for each in inputs))
    if config.smooth_alpha == "search":  # in float32: as they are, smoothed, in packed order
        held = max(held, 12 * max(each.n * each.k for each in inputs))
    if config.weight_rounding == "gptq" and not spill:
        held = max(held, 4 * max(each.k for each in inputs) ** 2)
    return held


def _hessian_bytes(inputs: Sequence[_Input]) -> int:
    """Of those that are collected at a time and, as the largest becomes a `gptq.Curvature`, of one
    more like it. (Its factor takes another in float64 for a while, but then no weight is at work.)
    """
    squares: dict[str, int] = {}
    for each in inputs:
        squares[each.layer] = squares.get(each.layer, 0) + 4 * each.k**2
    largest = 4 * max(each.k for each in inputs) ** 2
    return max(largest, min(gptq.HESSIAN_BYTES, max(squares.values()))) + largest
