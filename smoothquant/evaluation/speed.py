"""Small speed checks, on whatever machine this is: of one layer, and of a whole model.

benchmarks/ has the careful ones.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..channels.sorting import ChannelPlan
from ..core.config import MixedQuantConfig
from ..layers.linear import W4A4Linear
from ..models.modules import module_copy
from ..quantization.undo import dequantize

TOKENS = (1, 64, 512)  # of a layer's input
LEAST_SECONDS = 0.02  # that a layer is called for, again and again


class TokenTimes:
    """A streamer that keeps the time at which each new token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, ids: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate_times(model, prompt: Tensor, new: int) -> tuple[float, float]:
    """Seconds to the first of `new` tokens, seconds per token after it; prompt: int64 [1, T]."""
    streamer = TokenTimes()
    start = time.perf_counter()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        min_new_tokens=new,
        max_new_tokens=new,
        do_sample=False,
        streamer=streamer,
        pad_token_id=0,
    )
    first, last = streamer.times[1], streamer.times[-1]  # times[0]: the prompt itself
    return first - start, (last - first) / (new - 1)


@torch.no_grad()
def layer_speeds(
    config: MixedQuantConfig, k: int = 1024, n: int = 1024, turns: int = 5
) -> list[dict[str, Any]]:
    """A W4A4Linear of random weights beside torch's fp32 linear, for some numbers of tokens.

    Returns {"tokens", "int4_tokens_per_second", "fp32_tokens_per_second", "ratio"} of each: medians
    of `turns` turns that both take one after the other.
    """
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(k, n, bias=False)
    linear.weight.copy_(torch.randn(n, k, generator=generator))
    plan = ChannelPlan(torch.arange(k, dtype=torch.int32), int(config.salient_prop * k))
    layer = W4A4Linear.from_weight(linear.weight, None, config, plan)
    rows = []
    for tokens in TOKENS:
        x = torch.randn(tokens, k, generator=generator)
        int4, fp32 = _medians([lambda: _seconds(layer, x), lambda: _seconds(linear, x)], turns)  # noqa: B023
        rows.append(_row(tokens=tokens, int4=tokens / int4, fp32=tokens / fp32))
    return rows


@torch.no_grad()
def model_speeds(
    model: nn.Module, prompt: Tensor, new: int = 16, turns: int = 3
) -> list[dict[str, Any]]:
    """A quantized model beside itself with float weights, in plain `generate`.

    Args:
        model: quantized.
        prompt: int64 [1, T].
        new: tokens to generate after it, >= 2.

    Returns {"phase", "int4_tokens_per_second", "float_tokens_per_second", "ratio"} of prefill (all
    until the first new token) and decode (those after it): medians of `turns` turns.
    """
    plain = module_copy(model)
    dequantize(plain)
    times = _medians(
        [lambda: generate_times(model, prompt, new), lambda: generate_times(plain, prompt, new)],
        turns,
    )
    (prefill, decode), (plain_prefill, plain_decode) = times
    count = prompt.shape[1]
    return [
        _row(phase="prefill", int4=count / prefill, float=count / plain_prefill),
        _row(phase="decode", int4=1 / decode, float=1 / plain_decode),
    ]


def _row(**values: Any) -> dict[str, Any]:
    key, ours, other = values
    return {
        key: values[key],
        f"{ours}_tokens_per_second": values[ours],
        f"{other}_tokens_per_second": values[other],
        "ratio": values[ours] / values[other],
    }


def _seconds(layer: nn.Module, x: Tensor) -> float:
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < LEAST_SECONDS:
        layer(x)
        calls += 1
    return (time.perf_counter() - start) / calls


def _medians(contenders: Sequence[Callable], turns: int) -> list:
    """What each gives, number by number the median of its turns; a first turn does not count."""
    results: list[list] = [[] for _ in contenders]
    for turn in range(-1, turns):
        for contender, found in zip(contenders, results, strict=True):
            result = contender()
            if turn >= 0:
                found.append(result)
    return [
        tuple(map(statistics.median, zip(*found, strict=True)))
        if isinstance(found[0], tuple)
        else statistics.median(found)
        for found in results
    ]
