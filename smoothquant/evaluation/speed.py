"""Quick speed checks of one layer and of a whole model. benchmarks/ has the careful ones."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from ..channels.sorting import ChannelPlan
from ..core.config import MixedQuantConfig
from ..layers.linear import W4A4Linear
from ..models.generation import generate
from ..models.modules import module_copy
from ..quantization.undo import dequantize

TOKENS = (1, 64, 512)  # rows of a layer's input
LEAST_SECONDS = 0.02  # repeat a layer's call for at least this long


class TokenTimes:
    """A streamer that records when each token arrives."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, ids: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def greedy(model: Any, prompt: Tensor, new: int, streamer: Any) -> None:
    """Let `models.generation.generate` choose exactly `new` tokens, the most likely ones.

    Args:
        prompt: int64 [B, T].
        streamer: its `put` gets the prompt, then the B tokens of each step.
    """
    generate(
        model,
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,  # min_new_tokens would look through the vocabulary at every token
        pad_token_id=0,
        streamer=streamer,
    )


def generate_times(model: Any, prompt: Tensor, new: int) -> tuple[float, float]:
    """Time `model.generate`.

    Args:
        prompt: int64 [B, T].
        new: number of tokens to generate for each of the B prompts, >= 2.

    Returns:
        Seconds until the first new token, and seconds per step after it; a step is B tokens.
    """
    streamer = TokenTimes()
    start = time.perf_counter()
    greedy(model, prompt, new, streamer)
    first, last = streamer.times[1], streamer.times[-1]  # times[0] is the prompt
    return first - start, (last - first) / (new - 1)


@torch.no_grad()
def layer_speeds(
    config: MixedQuantConfig,
    k: int = 1024,
    n: int = 1024,
    turns: int = 5,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Compare a W4A4Linear with random weights and torch's linear of the same dtype.

    Args:
        dtype: float32, bfloat16 or float16, of the weights and the input.
        device: where both run.

    Returns:
        One dict for each number of tokens, with "tokens", "int4_tokens_per_second",
        "fp32_tokens_per_second" (or "bf16_...", "fp16_...") and "ratio": medians of `turns`
        alternating runs.
    """
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(k, n, bias=False, dtype=dtype)
    linear.weight.copy_(torch.randn(n, k, generator=generator))
    num_salient = int((config.salient_prop or 0) * k)
    plan = ChannelPlan(torch.arange(k, dtype=torch.int32), num_salient)
    layer = W4A4Linear.from_weight(linear.weight, None, config, plan).to(device)
    linear = linear.to(device)
    baseline = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    rows = []
    for tokens in TOKENS:
        x = torch.randn(tokens, k, generator=generator).to(device, dtype)
        ours, plain = _medians([partial(_seconds, layer, x), partial(_seconds, linear, x)], turns)
        speeds = {"int4": tokens / ours, baseline: tokens / plain}
        rows.append(_row(tokens=tokens, **speeds))
    return rows


@torch.no_grad()
def model_speeds(
    model: nn.Module, prompt: Tensor, new: int = 16, turns: int = 3
) -> list[dict[str, Any]]:
    """Compare a quantized model with its dequantized copy in `generate`.

    Args:
        model: a quantized transformers model with at least T + new positions.
        prompt: int64 [1, T].
        new: number of tokens to generate, >= 2.

    Returns:
        Two dicts with "phase", "int4_tokens_per_second", "float_tokens_per_second" and "ratio", for
        prefill (up to the first new token) and decode (after it): medians of `turns` alternating
        runs.
    """
    plain = module_copy(model)
    dequantize(plain)
    times = _medians(
        [
            partial(generate_times, model, prompt, new),
            partial(generate_times, plain, prompt, new),
        ],
        turns,
    )
    (prefill, decode), (plain_prefill, plain_decode) = times
    count = prompt.shape[1]
    return [
        _row(phase="prefill", int4=count / prefill, float=count / plain_prefill),
        _row(phase="decode", int4=1 / decode, float=1 / plain_decode),
    ]


def _row(**values: Any) -> dict[str, Any]:
    key, ours, baseline = values
    return {
        key: values[key],
        f"{ours}_tokens_per_second": values[ours],
        f"{baseline}_tokens_per_second": values[baseline],
        "ratio": values[ours] / values[baseline],
    }


def _seconds(layer: nn.Module, x: Tensor) -> float:
    """Median seconds of a call."""
    timer = Timer("layer(x)", globals={"layer": layer, "x": x}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=LEAST_SECONDS).median


def _medians(contenders: Sequence[Callable[[], Any]], turns: int) -> list[Any]:
    """The median result of each contender over `turns` alternating runs, after one warm-up.

    A contender returns a number, or a tuple of numbers whose medians are taken one by one.
    """
    results: list[list[Any]] = [[] for _ in contenders]
    for turn in range(-1, turns):
        for contender, times in zip(contenders, results, strict=True):
            result = contender()
            if turn >= 0:
                times.append(result)
    return [
        tuple(map(statistics.median, zip(*times, strict=True)))
        if isinstance(times[0], tuple)
        else statistics.median(times)
        for times in results
    ]
