"""What quantizing a model will cost: memory by a count, time by a count and a trial of each kind of
work on a small matrix."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from . import gptq
from .calibration import CALIBRATION_BLOCK
from .config import MixedQuantConfig
from .families import decoder_layers
from .hessian import SAMPLE_BATCHES, SAMPLE_ROWS
from .linear import layer_group_size, linear_class, quantized_input
from .quantize import checked_groups
from .search import ACT_CLIPS, ALPHAS
from .sorting import ChannelPlan, ChannelStats

TRIAL = 512  # rows and columns of a matrix that is timed
TRIAL_SECONDS = 0.1
# In float32, of a weight that is packed; with GPTQ: as it was, as it is rounded, and what is left.
MATRIX_COPIES = {"nearest": 2, "gptq": 3}
BATCH_COPIES = 4  # of the widest activation of a batch


class Cost(NamedTuple):
    """memory: {what for: bytes}, held together at the worst, beside what imports take. seconds: on
    this machine as busy as it is now, meant to be right to a factor of two; the disk's is not in
    it."""

    memory: dict[str, int]
    seconds: float


class _Input(NamedTuple):
    """A layer input of k channels; n rows read it, in matrices the largest of which has n_largest.
    layer: the decoder layer that holds them. share: of the tokens, what part reaches them."""

    k: int
    n: int
    n_largest: int
    layer: str
    share: float


def planned_cost(
    model: nn.Module,
    config: MixedQuantConfig,
    quantized_bytes: int,
    tokens: int = 0,
    stats: Mapping[str, ChannelStats] | None = None,
    *,
    by_layer: bool = False,
    spill: bool = False,
) -> Cost:
    """What quantizing a float model, whose tensors may be without memory, would take.

    Args:
        quantized_bytes: of the quantized model, as `smoothquant.inspection.planned_bytes` has them.
        tokens: that it is calibrated on; 0 for none, or where statistics are there already.
        stats: as for `planned_bytes`; tokens > 0 counts as its stats_to_come.
        by_layer, spill: by `smoothquant.convert` and its `spill`, not by `quantize`.
    """
    layers = decoder_layers(model)
    inputs = []
    smoothed: Counter[str] = Counter()  # bytes of the weights that are, by layer
    for group in checked_groups(model, config, stats, stats_to_come=tokens > 0)[1]:
        weights = [weight for weight, _ in group.matrices(model)]
        rows, k = [len(weight) for weight in weights], weights[0].shape[1]
        layer = next((name for name in layers if group.name.startswith(name + ".")), "")
        share = 1.0
        if group.expert:
            experts = model.get_submodule(group.expert[0])
            share = min(1.0, model.config.num_experts_per_tok / len(experts.gate_up_proj))
        inputs.append(_Input(k, sum(rows), max(rows), layer, share))
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
    seconds = _planned_seconds(inputs, config, dtype, tokens)
    return Cost({part: size for part, size in memory.items() if size}, seconds)


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


def _planned_seconds(
    inputs: Sequence[_Input], config: MixedQuantConfig, dtype: torch.dtype, tokens: int
) -> float:
    fixed = config.settled()
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(TRIAL, TRIAL, generator=generator)
    x, plan = square.to(dtype), ChannelPlan(torch.randperm(TRIAL, generator=generator).int(), 0)

    def pack(of_input: gptq.Curvature | None = None) -> None:
        linear_class(fixed).from_weight(square, None, fixed, plan, curvature=of_input)

    def decompose() -> gptq.Curvature:
        return gptq.curvature(gptq.inverse_factor(square.T @ square, gptq.DAMPING), TRIAL)

    def read() -> None:
        quantized_input(square, plan.perm, 0, layer_group_size(fixed, TRIAL), fixed)

    packing = _seconds(pack) / TRIAL**2
    multiplying = _seconds(lambda: square @ square) / TRIAL**3
    running = _seconds(lambda: x @ x) / TRIAL**3
    weights = sum(each.n * each.k for each in inputs)
    # what a token takes in the model: its products with weights, and in attention with other tokens
    layers = len({each.layer for each in inputs})
    products = sum(each.share * each.n * each.k for each in inputs)
    products += layers * 2 * min(tokens, CALIBRATION_BLOCK) * inputs[0].k
    # for statistics; where layers are calibrated on those before them, once more to go on
    passes = 1 + bool(config.needs_tokens)
    seconds = weights * packing + passes * tokens * products * running
    trials = 0
    if config.searches:
        trials += 2 + len(ACT_CLIPS)  # with the output to come near to
    if config.smooth_alpha == "search":
        trials += 2 + len(ALPHAS)
        seconds += weights * packing * (1 + len(ALPHAS))
    is_gptq = config.weight_rounding == "gptq"
    if trials or is_gptq:
        reading = _seconds(read) / TRIAL**2
        sampled = min(tokens, max(SAMPLE_ROWS, SAMPLE_BATCHES * CALIBRATION_BLOCK))
        for each in inputs:
            rows = trials * min(each.share * sampled, SAMPLE_ROWS)
            seconds += rows * each.k * (each.n * multiplying + reading)
    if is_gptq:
        of_square = decompose()
        by_gptq = _seconds(lambda: pack(of_square)) / TRIAL**2 - packing
        factor = _seconds(decompose) / TRIAL**3
        seconds += tokens * products * running  # for the Hessians
        for each in inputs:
            seconds += each.k * each.share * tokens * (each.k * multiplying + reading)
            seconds += each.n * each.k * by_gptq * max(each.k, TRIAL) / TRIAL
            seconds += each.k**3 * factor
    return seconds


def _seconds(work: Callable[[], object]) -> float:
    """Of a call, in the mean over TRIAL_SECONDS, so that whatever shares the machine counts; a
    first call does not."""
    work()
    calls, started = 0, time.perf_counter()
    while True:
        work()
        calls += 1
        seconds = time.perf_counter() - started
        if seconds >= TRIAL_SECONDS:
            return seconds / calls
