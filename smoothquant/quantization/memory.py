"""Predict the peak memory of quantizing a model."""

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
from ..models.tables import find_tables, output_head
from .checks import checked_groups
from .tables import table_group
from .tuning import LOGIT_TOKENS, SEQUENCE

# float32 copies of a weight while it is packed. GPTQ holds the original, the rounded weight and the
# remaining error.
MATRIX_COPIES = {"nearest": 2, "gptq": 3}
BATCH_COPIES = 4  # copies of a batch's widest activation
TUNED_COPIES = 7  # fp32: value, first and best value, gradient, scaled gradient, Adam's two means
LOGIT_COPIES = 5


class _Input(NamedTuple):
    """A layer input and the matrices that read it.

    k: channels. n: rows of all matrices together. n_largest: rows of the largest matrix. layer: the
    decoder layer that holds them. trained: values per row that tuning changes.
    """

    k: int
    n: int
    n_largest: int
    layer: str
    trained: int


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
    """Predict the peak memory of quantizing a float model, without what imports take.

    Args:
        quantized_bytes: size of the quantized model, from `checkpoints.sizes.planned_bytes`.
        tokens: number of calibration tokens; 0 if there is no calibration to run.
        stats: as for `planned_bytes`; tokens > 0 implies its stats_to_come.
        by_layer: predict `smoothquant.convert`, not `smoothquant.quantize`.
        spill: the `spill` argument of `smoothquant.convert`.

    Returns:
        {what takes the memory: bytes}.
    """
    layers = decoder_layers(model)
    inputs = []
    smoothed: Counter[str] = Counter()  # {decoder layer: bytes of its smoothed weights}
    for group in checked_groups(model, config, stats, stats_to_come=tokens > 0):
        weights = [weight for weight, _ in group.matrices(model)]
        rows, k = [len(weight) for weight in weights], weights[0].shape[1]
        layer = next((name for name in layers if group.name.startswith(name + ".")), "")
        trained = group.num_salient + -(-k // config.group_size)
        inputs.append(_Input(k, sum(rows), max(rows), layer, trained))
        if config.smooth_alpha is not None and group.reads_norm:
            smoothed[layer] += sum(weight.nbytes for weight in weights)
    tables = [
        table_group(model, table, config, stats).matrix(model, table.head or table.embeddings[0])[0]
        for table in find_tables(model, config).quantized
    ]
    dtype = next(model.parameters()).dtype
    waiting = (by_layer or config.needs_tokens) and not spill
    batch = min(tokens, CALIBRATION_BLOCK) * max(x.n_largest for x in inputs)
    memory = {
        "float model": 0 if by_layer else sum(p.nbytes for p in model.parameters()),
        "a packed layer": quantized_bytes // len(layers) if by_layer else 0,
        "smoothed weights": max(smoothed.values(), default=0) if by_layer else 0,
        "weights being packed": max(
            _weight_bytes(inputs, config, dtype, spill),
            *(8 * weight.numel() for weight in tables),  # two fp32 copies
            0,
        ),
        "Hessians": _hessian_bytes(inputs) if config.weight_rounding == "gptq" and not spill else 0,
        "hidden states": tokens * inputs[0].k * dtype.itemsize if waiting else 0,
        "activations of a batch": BATCH_COPIES * batch * dtype.itemsize,
        "tuning": _tuning_bytes(model, inputs, config, tokens, dtype) if config.tune else 0,
    }
    return {part: size for part, size in memory.items() if size}


def _weight_bytes(
    inputs: Sequence[_Input], config: MixedQuantConfig, dtype: torch.dtype, spill: bool
) -> int:
    """The largest of what packing a matrix, trying choices on all readers of an input, and a
    temporary float64 Hessian factor take."""
    assert config.weight_rounding is not None
    peak = 4 * MATRIX_COPIES[config.weight_rounding] * max(x.n_largest * x.k for x in inputs)
    if config.searches:
        # weights in their dtype, in float32 and in packed order; three outputs of the sample rows
        copies, outputs = dtype.itemsize + 8, 12 * SAMPLE_ROWS
        peak = max(peak, *(x.n * (copies * x.k + outputs) for x in inputs))
    if config.smooth_alpha == "search":  # float32 weights: original, smoothed, in packed order
        peak = max(peak, 12 * max(x.n * x.k for x in inputs))
    if config.weight_rounding == "gptq" and not spill:
        peak = max(peak, 4 * max(x.k for x in inputs) ** 2)
    return peak


def _tuning_bytes(
    model: nn.Module,
    inputs: Sequence[_Input],
    config: MixedQuantConfig,
    tokens: int,
    dtype: torch.dtype,
) -> int:
    """The float model's hidden states and head, codes and trained values, the activations of a
    sequence, and the logits of a few tokens."""
    head = output_head(model)
    vocabulary, hidden = (0, 0) if head is None else head.weight.shape
    code = 1 if config.backend == "int4" else 4
    return (
        tokens * hidden * dtype.itemsize
        + vocabulary * hidden * (4 + dtype.itemsize)
        + LOGIT_COPIES * 4 * LOGIT_TOKENS * vocabulary
        + sum(x.n * (x.k * code + 4 * TUNED_COPIES * x.trained) for x in inputs)
        + 4 * MATRIX_COPIES["gptq"] * max(x.n_largest * x.k for x in inputs)
        + SEQUENCE * sum(4 * BATCH_COPIES * x.k + 8 * x.n for x in inputs)
    )


def _hessian_bytes(inputs: Sequence[_Input]) -> int:
    """The Hessians collected together, plus the `gptq.Curvature` made from the largest.

    Its factor briefly takes a float64 copy too, but no weight is being packed then.
    """
    squares: Counter[str] = Counter()
    for x in inputs:
        squares[x.layer] += 4 * x.k**2
    largest = 4 * max(x.k for x in inputs) ** 2
    return max(largest, min(gptq.HESSIAN_BYTES, max(squares.values()))) + largest
