"""The published API: eight quantize-dequantize functions and the functions for whole models.

The quantize-dequantize functions keep the published definition bit for bit, in the tensor's dtype:
s = max(max|x|, 1e-5) / (2^(n_bits - 1) - 1); x <- round(x / s) s.
They return a new tensor of the same shape and never modify their argument. As in the published
code, in float16 with 9 bits or more the smallest scale underflows to zero, and a group that small
becomes NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .channels.statistics import ChannelStats
from .core.config import check_integer, published_config
from .in_memory import quantize
from .layers.linear import FakeW4A4Linear, W4A4Linear

__all__ = [
    "FakeW4A4Linear",
    "W4A4Linear",
    "quantize_activation_per_group_absmax",
    "quantize_activation_per_group_absmax_sort",
    "quantize_activation_per_tensor_absmax",
    "quantize_activation_per_token_absmax",
    "quantize_falcon",
    "quantize_llama_like",
    "quantize_mixtral",
    "quantize_model",
    "quantize_opt",
    "quantize_weight_per_channel_absmax",
    "quantize_weight_per_group_absmax",
    "quantize_weight_per_group_absmax_sort",
    "quantize_weight_per_tensor_absmax",
]


def _rounded(t: Tensor, largest: Tensor, n_bits: int) -> Tensor:
    scales = largest.clamp(min=1e-5).div(2 ** (n_bits - 1) - 1)
    return t.div(scales).round_().mul_(scales)


def _check(name: str, t: Tensor, n_bits: int, group_size: int = 1) -> None:
    if not isinstance(t, Tensor) or not t.is_floating_point():
        kind = getattr(t, "dtype", type(t).__name__)
        raise TypeError(f"{name} must be a floating-point tensor; got {kind}")
    if t.dim() == 0:
        raise ValueError(f"{name} must have at least one dimension; got a scalar")
    check_integer("n_bits", n_bits, 2, 16)
    check_integer("group_size", group_size, 1)


@torch.no_grad()
def _per_row(name: str, t: Tensor, n_bits: int) -> Tensor:
    _check(name, t, n_bits)
    return _rounded(t, t.abs().amax(-1, keepdim=True), n_bits) if t.numel() else t.clone()


@torch.no_grad()
def _per_tensor(name: str, t: Tensor, n_bits: int) -> Tensor:
    _check(name, t, n_bits)
    return _rounded(t, t.abs().max(), n_bits) if t.numel() else t.clone()


@torch.no_grad()
def _per_group(name: str, t: Tensor, n_bits: int, group_size: int) -> Tensor:
    _check(name, t, n_bits, group_size)
    channels = t.shape[-1]
    group_size = min(group_size, max(1, channels))
    padded = F.pad(t, (0, -channels % group_size)).unflatten(-1, (-1, group_size))
    return _per_row(name, padded, n_bits).flatten(-2)[..., :channels].contiguous()


@torch.no_grad()
def _per_group_sorted(name: str, t: Tensor, n_bits: int, group_size: int) -> Tensor:
    _check(name, t, n_bits, group_size)
    if t.numel() == 0:
        return t.clone()
    order = torch.argsort(t.reshape(-1, t.shape[-1]).abs().amax(0))
    return _per_group(name, t[..., order], n_bits, group_size)[..., torch.argsort(order)]


def quantize_weight_per_channel_absmax(w: Tensor, n_bits: int) -> Tensor:
    """One scale per output channel of w [N, K]; the module's docstring has the definition.

    All eight functions accept float32, float16 and bfloat16 and 2 to 16 bits.

    Raises:
        ValueError, TypeError: an argument is out of range or has the wrong type; the message names
            it.
    """
    return _per_row("w", w, n_bits)


def quantize_weight_per_tensor_absmax(w: Tensor, n_bits: int) -> Tensor:
    """One scale for all of w [N, K]."""
    return _per_tensor("w", w, n_bits)


def quantize_weight_per_group_absmax(w: Tensor, n_bits: int, group_size: int = 128) -> Tensor:
    """One scale per `group_size` neighbouring input channels of each row of w [N, K].

    The last group of a row may be shorter.
    """
    return _per_group("w", w, n_bits, group_size)


def quantize_weight_per_group_absmax_sort(w: Tensor, n_bits: int, group_size: int = 128) -> Tensor:
    """Like `quantize_weight_per_group_absmax`, on channels sorted by ascending largest magnitude.

    The result has the original channel order.
    """
    return _per_group_sorted("w", w, n_bits, group_size)


def quantize_activation_per_token_absmax(t: Tensor, n_bits: int) -> Tensor:
    """One scale per row of t [..., K]."""
    return _per_row("t", t, n_bits)


def quantize_activation_per_tensor_absmax(t: Tensor, n_bits: int) -> Tensor:
    """One scale for all of t [..., K]."""
    return _per_tensor("t", t, n_bits)


def quantize_activation_per_group_absmax(t: Tensor, n_bits: int, group_size: int = 128) -> Tensor:
    """One scale per row and `group_size` neighbouring channels of t [..., K]."""
    return _per_group("t", t, n_bits, group_size)


def quantize_activation_per_group_absmax_sort(
    t: Tensor, n_bits: int, group_size: int = 128
) -> Tensor:
    """Like `quantize_activation_per_group_absmax`, on channels sorted by largest magnitude.

    The magnitude is taken over all rows, so a token's result depends on the rest of the batch.
    """
    return _per_group_sorted("t", t, n_bits, group_size)


def quantize_model(
    model: nn.Module,
    weight_quant: str = "per_channel",
    act_quant: str = "per_token",
    quantize_bmm_input: bool = False,
    input_feat: Mapping[str, Tensor | Sequence[Tensor] | ChannelStats] | None = None,
    salient_prop: float | None = None,
    quant_bits: int = 4,
    group_size: int = 128,
    min_prop: float = 0,
    max_prop: float = 0,
    *,
    sort: str = "rms",
    sort_by: str = "activation",
    backend: str = "int4",
    progress: bool = True,
) -> nn.Module:
    """Quantize a model of any architecture in place and return it.

    Args:
        model: a float model; see `smoothquant.models.families`.
        weight_quant: "per_group", "per_channel" or "per_tensor".
        act_quant: "per_group", "per_token" or "per_tensor". "per_tensor" depends on the whole
            batch; the int4 backend quantizes per token instead and warns.
        quantize_bmm_input: also quantize the outputs of q, k and v.
        input_feat: {module name: mean magnitude per input channel [K], a list of such tensors to
            sum, or ChannelStats}. With means only, sort keys come from the weights. Without an
            entry, salient channels come from the weights too.
        salient_prop: fraction of input channels to keep in 16 bits, in [0, 1]; None for none.
        quant_bits: bits of weights and activations: 2 to 4, or 2 to 8 with backend "fake".
        group_size: channels that share a scale in per-group quantization.
        min_prop, max_prop: ignored, as in the published code.
        sort: "none", "max", "mean3std", "argmax" or "rms".
        sort_by: compute the sort key from "activation" or "weight" statistics.
        backend: "int4" (packed weights, integer kernels) or "fake" (simulation in floats).
        progress: show a progress bar.

    Returns:
        The same model.

    Raises:
        ValueError, TypeError: an argument is invalid; the message names it. The model is unchanged.
    """
    config = published_config(
        backend,
        act_quant,
        weight_quant=weight_quant,
        num_bits=quant_bits,
        group_size=group_size,
        salient_prop=salient_prop,
        sort=sort,
        sort_by=sort_by,
        quantize_output=quantize_bmm_input,
    )
    quantize(model, config, _stats(input_feat), progress=progress)
    return model


def _for_types(
    name: str, types: Sequence[str], weight_quant: str, act_quant: str, quantize_bmm_input: bool
) -> Callable[..., nn.Module]:
    """Make a `quantize_model` for certain model types, with their published defaults."""

    def quantize_family(
        model: nn.Module,
        weight_quant: str = weight_quant,
        act_quant: str = act_quant,
        quantize_bmm_input: bool = quantize_bmm_input,
        input_feat: Mapping[str, Any] | None = None,
        salient_prop: float | None = 0,
        quant_bits: int = 4,
        group_size: int = 128,
        **options: Any,
    ) -> nn.Module:
        model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        if model_type not in types:
            raise ValueError(f"model must be of type {' or '.join(types)}; got {model_type!r}")
        return quantize_model(
            model,
            weight_quant,
            act_quant,
            quantize_bmm_input,
            input_feat,
            salient_prop,
            quant_bits,
            group_size,
            **options,
        )

    quantize_family.__name__ = quantize_family.__qualname__ = name
    quantize_family.__doc__ = (
        f"`quantize_model` for models of type {', '.join(types)}, with the same options."
    )
    return quantize_family


LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3")
quantize_opt = _for_types("quantize_opt", ["opt"], "per_tensor", "per_tensor", True)

quantize_llama_like = _for_types(
    "quantize_llama_like", LLAMA_LIKE, "per_channel", "per_token", False
)

quantize_mixtral = _for_types("quantize_mixtral", ["mixtral"], "per_channel", "per_token", False)
quantize_falcon = _for_types("quantize_falcon", ["falcon"], "per_channel", "per_token", True)


def _stats(input_feat: Mapping[str, Any] | None) -> dict[str, ChannelStats] | None:
    """Convert the published dict of means to statistics; None if there are none."""
    if input_feat is None:
        return None
    if not isinstance(input_feat, Mapping):
        raise TypeError(f"input_feat must map module names; got {type(input_feat).__name__}")
    return {name: _channel_stats(name, entry) for name, entry in input_feat.items()} or None


def _channel_stats(name: str, entry: Any) -> ChannelStats:
    if isinstance(entry, ChannelStats):
        return entry
    parts = list(entry) if isinstance(entry, Sequence) else [entry]
    shapes = {tuple(part.shape) if isinstance(part, Tensor) else None for part in parts}
    if len(shapes) != 1 or len(next(iter(shapes)) or ()) != 1:
        raise ValueError(
            f"input_feat of {name} must be a vector or vectors of equal length; got {entry!r:.80}"
        )
    try:
        return ChannelStats.from_mean(sum(part.float().cpu() for part in parts))
    except ValueError as error:
        raise ValueError(f"input_feat of {name}: {error}") from error
