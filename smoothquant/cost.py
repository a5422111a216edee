"""What quantizing a model will cost: memory by a count, time by a trial on small matrices."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from . import gptq
from .calibration import CALIBRATION_BLOCK
from .config import MixedQuantConfig
from .families import decoder_layers
from .linear import linear_class
from .quantize import checked_groups
from .sorting import ChannelPlan

TRIAL = 512  # rows and columns of a matrix that is timed
MATRIX_COPIES = {"nearest": 2, "gptq": 5}  # in float32, of a weight that is packed
HESSIAN_COPIES = 3  # in float32, of a Hessian whose factor is computed, in float64
RUNS_WITH_TOKENS = 3  # through the model: to see a layer's inputs, for its Hessians, to go on
BATCH_COPIES = 4  # of the widest activation of a batch


class Cost(NamedTuple):
    """memory: {what for: bytes}, held together at the worst, beside what imports take. seconds: on
    this machine with nothing else to do, right to about a factor of two."""

    memory: dict[str, int]
    seconds: float


def planned_cost(
    model: nn.Module,
    config: MixedQuantConfig,
    quantized_bytes: int,
    tokens: int = 0,
    *,
    by_layer: bool = False,
    spill: bool = False,
) -> Cost:
    """What quantizing a float model, whose tensors may be without memory, would take.

    Args:
        quantized_bytes: of the quantized model, as `smoothquant.inspection.planned_bytes` has them.
        tokens: that it is calibrated on; 0 for none, or where statistics are there already.
        by_layer, spill: by `smoothquant.convert` and its `spill`, not by `quantize`.
    """
    groups = checked_groups(model, config, None)[1]
    shapes = [weight.shape for group in groups for weight, _ in group.matrices(model)]
    dtype = next(model.parameters()).dtype
    columns = [group.matrices(model)[0][0].shape[1] for group in groups]
    runs = RUNS_WITH_TOKENS if config.needs_tokens else 1
    is_gptq = config.weight_rounding == "gptq"
    waiting = (by_layer or config.needs_tokens) and not spill
    batch = min(tokens, CALIBRATION_BLOCK) * max(map(max, shapes))
    memory = {
        "float model": 0 if by_layer else sum(p.nbytes for p in model.parameters()),
        "a packed layer": quantized_bytes // len(decoder_layers(model)) if by_layer else 0,
        "a matrix": 4 * MATRIX_COPIES[config.weight_rounding] * max(s.numel() for s in shapes),
        "Hessians": _hessian_bytes(columns) if is_gptq else 0,
        "hidden states": tokens * columns[0] * dtype.itemsize if waiting else 0,
        "activations of a batch": BATCH_COPIES * batch * dtype.itemsize,
    }
    pack = _packing_seconds(config)
    seconds = runs * tokens * sum(s.numel() for s in shapes) * _multiplying_seconds(dtype)
    for n, k in shapes:
        seconds += n * k * pack * (max(k, TRIAL) / TRIAL if is_gptq else 1)
    if is_gptq:
        factor = _seconds(lambda: gptq.inverse_factor(torch.eye(TRIAL), gptq.DAMPING))
        seconds += sum(factor * (k / TRIAL) ** 3 for k in columns)
        seconds += tokens * sum(k * k for k in columns) * _multiplying_seconds(torch.float32)
    return Cost({part: size for part, size in memory.items() if size}, seconds)


def _hessian_bytes(columns: Sequence[int]) -> int:
    largest = 4 * max(columns) ** 2
    collected = min(gptq.HESSIAN_BYTES, 4 * sum(k * k for k in columns))
    return max(largest, collected) + HESSIAN_COPIES * largest


def _packing_seconds(config: MixedQuantConfig) -> float:
    """Seconds to pack one weight of a matrix of TRIAL columns."""
    if config.searches:
        config = dataclasses.replace(config, act_clip=1.0, act_format="symmetric")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(TRIAL, TRIAL, generator=generator)
    plan = ChannelPlan(torch.arange(TRIAL, dtype=torch.int32), TRIAL // 20)
    factor = torch.eye(TRIAL) if config.weight_rounding == "gptq" else None
    layer = linear_class(config)
    return _seconds(lambda: layer.from_weight(weight, None, config, plan, factor=factor)) / TRIAL**2


def _multiplying_seconds(dtype: torch.dtype) -> float:
    """Seconds for one weight and one token."""
    x, weight = torch.ones(2, TRIAL, TRIAL, dtype=dtype)
    return _seconds(lambda: x @ weight) / TRIAL**3


def _seconds(work: Callable[[], object]) -> float:
    """The best of three calls, after one that does not count."""
    times = []
    for _ in range(4):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times[1:])
